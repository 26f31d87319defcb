"""How tables name a run and its data: the setting run_name, or a name made from method, learning rate and data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

MAX_CHARS = 60
RESERVED = {"latest", "baseline", "auto", "never"}  # words that have a meaning where a run is named


def problem_of(name: object) -> str | None:
    """Why `name` cannot be the setting run_name, in one sentence; None if it can."""
    if name is None or (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) and len(name) <= MAX_CHARS):
        return f"run_name={name}: {name} has another meaning where a run is named" if name in RESERVED else None
    return f"run_name={name}: should be a name of letters, digits, '.', '_' and '-', at most {MAX_CHARS} of them"


def run_name(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The name of a run for people: `lora-2e-4-tickets`, unless it was named."""
    if manifest.get("run_name"):
        return str(manifest["run_name"])
    parts = (str(manifest.get("method", "")), format_lr(settings.get("lr")), data_name(manifest.get("data", {})))
    return "-".join(part for part in parts if part)


def format_lr(value: Any) -> str:
    """A learning rate as people write it: 2e-4, 1.5e-5, 0.01."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return ""
    if value >= 0.01 or value <= 0:
        return f"{value:g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def data_name(data: Mapping[str, Any]) -> str:
    """The name of the training data: its repository, or its file or folder, without the path and the extension."""
    places = [_place(source) for source in data.get("sources") or [data]]
    named = [place for place in dict.fromkeys(places) if place]
    if not named:
        paths = [PurePosixPath(str(file["file"])) for file in data.get("files") or [] if file.get("file")]
        single = len(paths) == 1
        named = list(dict.fromkeys(_stem(path) if single else path.parent.name or _stem(path) for path in paths))
    return named[0] + (f"+{len(named) - 1}" if len(named) > 1 else "") if named else ""


def _place(source: Mapping[str, Any]) -> str:
    """The name of a remote source; empty for local files."""
    found = source.get("repo") or source.get("url") or source.get("path") or source.get("bucket") or ""
    return _stem(PurePosixPath(str(found).split("?")[0].rstrip("/"))) if found else ""


def _stem(path: PurePosixPath) -> str:
    """The name of a file without the extensions of data files and archives."""
    return re.sub(r"\.(jsonl?|csv|tsv|parquet|ndjson|gz|zst|bz2|xz|zip)", "", path.name)
