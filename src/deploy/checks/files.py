"""Health checks of what a training run wrote: losses, weights, checkpoints, data report, credentials, profile.

No check imports torch. Each returns whether it passed and one sentence.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...errors import RunError
from ...eval import eval_data, evaluations
from ...learning import first_and_last
from ...model import profile
from ...runs import Run
from ...utils.files import read_json, sha256
from ...utils.secrets import credentials
from ...utils.units import count
from ...utils.weights import find_weight_problems

MANIFEST = "manifest.json"  # of a published folder
COMPLETE = "COMPLETE"  # the marker of a checkpoint, with the hash of each of its files
MAX_SHOWN = 3

# Each pattern begins with fixed letters, which are found fast in gigabytes of weights.
SECRET_PATTERNS: dict[str, re.Pattern[bytes]] = {
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


# Training loss


def check_loss(
    losses: Sequence[tuple[int, float]], max_loss: float, notes: Sequence[str] = ()
) -> tuple[bool, str]:
    """Whether the logged `(step, loss)` are finite, decrease, and end between 0 and `max_loss` nats per token.

    `notes`: what the training itself has found against it.
    """
    if notes:
        return False, notes[0]
    if not losses:
        return False, "no training loss was logged"
    bad = next((step for step, value in losses if not math.isfinite(value)), None)
    if bad is not None:
        return False, f"the training loss is not finite at step {bad}"
    first, last = first_and_last([value for _, value in losses])
    change = f"the training loss went from {first:.4g} to {last:.4g} in {losses[-1][0]} steps"
    if not 0 <= last <= max_loss:
        return False, f"{change}, but it should end between 0 and {max_loss:g}"
    if len(losses) == 1:
        return True, f"the training loss is {last:.4g}; it was logged only once, so a decrease cannot be checked"
    return (True, change) if last < first else (False, f"{change}: it did not decrease")


def logged_losses(run: Run | None, training_info: Path | None) -> list[tuple[int, float]]:
    """`(step, loss)` from training_info.json if it is given, else from the run's log.

    Raises: RunError if the file has no readable losses.
    """
    if training_info is None:
        return profile.loss_history(run) if run else []
    info = read_json(training_info)
    try:
        logged = [(int(h["step"]), float(h["loss"])) for h in info.get("log_history") or [] if "loss" in h]
        mean = info.get("train_loss", info.get("final_loss"))
        return logged or ([] if mean is None else [(int(info.get("global_step") or 0), float(mean))])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RunError(f"{training_info} is not a training_info.json: its losses cannot be read") from None


# Model files and checkpoints


def check_model_files(folder: Path, recorded: Mapping[str, str]) -> tuple[bool, str]:
    """Whether every file has its recorded SHA-256, and all weights are readable and finite."""
    problems = _hash_problems(folder, recorded)
    weight_files = sorted(folder.glob("*.safetensors"))
    if not weight_files:
        problems.append("it has no *.safetensors file")
    problems += [problem for file in weight_files for problem in find_weight_problems(file)]
    if problems:
        return False, f"the model is damaged: {_first(problems)}"
    hashes = (
        f"the hashes of {count(len(recorded), 'file')} match the recorded ones"
        if recorded
        else "no file hashes were recorded"
    )
    return True, f"{hashes}, and all weights are finite"


def recorded_hashes(folder: Path, run: Run | None) -> Mapping[str, str]:
    """`{file: sha256}` from the run's manifest, or from the manifest of a published folder."""
    if run is not None:
        return dict(run.manifest.get("model_files", {}))
    manifest = folder / MANIFEST
    return dict(read_json(manifest).get("sha256", {})) if manifest.is_file() else {}


def _hash_problems(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    problems = []
    for name, digest in recorded.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != digest:
            problems.append(f"{name} differs from its recorded hash")
    return problems


def check_checkpoints(run: Run | None) -> tuple[bool, str]:
    """Whether each checkpoint has its COMPLETE marker, and the files that the marker lists, by hash."""
    folders = sorted(run.checkpoints.glob("checkpoint-*")) if run else []
    problems: list[str] = []
    for folder in folders:
        marker = folder / COMPLETE
        found = (
            _hash_problems(folder, read_json(marker)["files"]) if marker.is_file() else [f"{COMPLETE} is missing"]
        )
        problems += [f"{folder.name}: {problem}" for problem in found]
    if problems:
        return False, f"checkpoints are damaged: {_first(problems)}"
    return True, count(len(folders), "complete checkpoint") if folders else "the run has no checkpoints"


# Data, credentials, profile


def check_contamination(run: Run | None) -> tuple[bool, str]:
    """Whether training rows that also occur in the evaluation files were excluded from training."""
    assert run is not None
    newest = evaluations.newest(run)
    if newest and (invalid := eval_data.trained_on_scored_rows(newest.result)):
        return False, invalid
    found = read_json(run.path / "data_report.json").get("contamination")
    if not found:
        return True, "the training rows were not compared with the evaluation files"
    counts = {kind: found[kind] for kind in eval_data.KINDS if found.get(kind)}
    if not counts:
        return True, f"no training row occurs in {count(len(found['files']), 'evaluation file')}"
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in counts.items())
    total = sum(counts.values())
    occur = f"{count(total, 'training row')} {'occurs' if total == 1 else 'occur'}"
    if invalid := eval_data.trained_on_evaluation_data(run):
        return False, invalid
    were = "was" if total == 1 else "were"
    return True, f"{occur} in the evaluation files ({kinds}) and {were} excluded from training"


def check_secrets(folder: Path) -> tuple[bool, str]:
    """Whether no file of the model contains what looks like a credential."""
    found = find_secrets(folder)
    return not found, f"the model contains secrets: {_first(found)}" if found else "no file contains a secret"


def find_secrets(folder: Path) -> list[str]:
    """The files below `folder` that contain a credential, as `NAME contains KIND`, never with its value.

    Credentials are the values of this machine's credential variables, and SECRET_PATTERNS.
    """
    known = _spellings(credentials())
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return [f"{path.relative_to(folder)} contains {kind}" for path in paths for kind in _secret_kinds(path, known)]


def _spellings(values: Mapping[str, str]) -> dict[bytes, str]:
    """`{bytes to search for: variable name}`: each value as it is, and as JSON writes it.

    A value of letters only (`PASSWORD=password`) is skipped, since every vocabulary contains such words.
    """
    found: dict[bytes, str] = {}
    for value, name in values.items():
        if not value.isalpha():
            texts = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
            found |= {text.encode("utf-8", "surrogateescape"): name for text in texts}
    return found


def _secret_kinds(path: Path, known: Mapping[bytes, str]) -> Iterator[str]:
    """The kinds of credentials in a file, each once. The file is mapped, not read into memory."""
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield from dict.fromkeys(f"the value of {name}" for text, name in known.items() if content.find(text) >= 0)
        yield from (kind for kind, pattern in SECRET_PATTERNS.items() if pattern.search(content))


def check_profile(path: Path | None) -> tuple[bool, str]:
    """Whether aim_profile.json has the keys and types that serving platforms read."""
    if path is None:
        return False, f"{profile.PROFILE} does not exist"
    found = read_json(path)
    if problems := profile.problems(found):
        return False, f"{path.name}: {_first(problems)}"
    memory, partition = found["memory_gb"], found["recommended_partition_gb"]
    return True, f"{memory:g} GB in {found['precision']}, for a partition of at least {partition:g} GB"


def _first(problems: Sequence[str]) -> str:
    more = len(problems) - MAX_SHOWN
    return "; ".join(problems[:MAX_SHOWN]) + (f"; and {more} more" if more > 0 else "")
