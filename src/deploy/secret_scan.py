"""What must not be published: values of this machine's credentials, and texts that look like anybody's."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from src.utils.secrets import credentials

# Each begins with letters of its own, which are found fast in gigabytes of weights.
SHAPES: dict[str, re.Pattern[bytes]] = {
    "a Hugging Face token": re.compile(rb"hf_[A-Za-z0-9]{34}"),
    "an AWS access key": re.compile(rb"AKIA[0-9A-Z]{16}(?![0-9A-Z])"),
    "a temporary AWS access key": re.compile(rb"ASIA[0-9A-Z]{16}(?![0-9A-Z])"),
    "a GitHub token": re.compile(rb"ghp_[A-Za-z0-9]{36}"),
    "a GitHub app's token": re.compile(rb"ghs_[A-Za-z0-9]{36}"),
    "a fine-grained GitHub token": re.compile(rb"github_pat_[A-Za-z0-9_]{22}"),
    "a GitLab token": re.compile(rb"glpat-[A-Za-z0-9_-]{20}"),
    "an OpenAI key": re.compile(rb"sk-proj-[A-Za-z0-9_-]{20}"),
    "an Anthropic key": re.compile(rb"sk-ant-[A-Za-z0-9_-]{20}"),
    "a Slack token": re.compile(rb"xox[abprs]-[0-9A-Za-z-]{10}"),
    "a Google API key": re.compile(rb"AIza[0-9A-Za-z_-]{35}"),
    "a private key": re.compile(rb"-----BEGIN (?:[A-Z]+ ){0,2}PRIVATE KEY(?: BLOCK)?-----"),
}


def scan(folder: Path) -> list[str]:
    """Which files under `folder` hold what looks like a credential: `NAME holds KIND`, never the value."""
    known = _spellings(credentials())
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [f"{path.relative_to(folder)} holds {kind}" for path in files for kind in _kinds(path, known)]


def _spellings(values: Mapping[str, str]) -> dict[bytes, str]:
    """`{bytes to look for: variable name}`: each value as it is, and as JSON writes it.

    A value of letters alone (`PASSWORD=password`) is left out: every vocabulary holds such words.
    """
    found: dict[bytes, str] = {}
    for value, name in values.items():
        if not value.isalpha():
            texts = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
            found |= {text.encode("utf-8", "surrogateescape"): name for text in texts}
    return found


def _kinds(path: Path, known: Mapping[bytes, str]) -> Iterator[str]:
    """What one file holds, each kind once; the file is looked at where it lies, not read into memory."""
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield from dict.fromkeys(f"the value of {name}" for text, name in known.items() if content.find(text) >= 0)
        yield from (kind for kind, shape in SHAPES.items() if shape.search(content))
