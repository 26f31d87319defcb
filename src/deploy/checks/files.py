"""Health checks of what a training wrote. None imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from src.deploy.findings import Subject
from src.deploy.secret_scan import scan
from src.errors import RunError
from src.model import profile
from src.utils.files import read_json, sha256
from src.utils.weights import find_problems as weight_problems

COMPLETE = "COMPLETE"  # the marker of a checkpoint, with the hash of each of its files
PART = 5  # the first and the last fifth of the logged losses are compared
SHOWN = 3


def loss(about: Subject) -> tuple[bool, str]:
    """Whether the logged losses are finite, fell, and ended where a loss can end."""
    values = _losses(about)
    if not values:
        return False, "no training loss was logged"
    bad = next((step for step, value in values if not math.isfinite(value)), None)
    if bad is not None:
        return False, f"the training loss is not finite at step {bad}"
    part = max(1, len(values) // PART)
    first, last = (median(v for _, v in some) for some in (values[:part], values[-part:]))
    told = f"the training loss went from {first:.4g} to {last:.4g} in {values[-1][0]} steps"
    if not 0 <= last <= about.max_loss:
        return False, f"{told}, and should end between 0 and {about.max_loss:g}"
    if len(values) == 1:
        return True, f"the training loss is {last:.4g}; it was logged once, which shows no fall"
    return (True, told) if last < first else (False, f"{told}: it did not fall")


def _losses(about: Subject) -> list[tuple[int, float]]:
    """`(step, loss)`, of training_info.json where that is named, else of the run. Raises: RunError."""
    if about.info is None:
        return profile.losses(about.run) if about.run else []
    kept = read_json(about.info)
    try:
        logged = [(int(h["step"]), float(h["loss"])) for h in kept.get("log_history") or [] if "loss" in h]
        mean = kept.get("train_loss", kept.get("final_loss"))
        return logged or ([] if mean is None else [(int(kept.get("global_step") or 0), float(mean))])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RunError(f"{about.info} is no training_info.json: its losses cannot be read") from None


def model_files(about: Subject) -> tuple[bool, str]:
    """Whether the files are those that were written, by hash, and the weights readable and finite."""
    recorded = _recorded(about)
    told = _differing(about.model, recorded)
    files = sorted(about.model.glob("*.safetensors"))
    if not files:
        told.append("there are no weights")
    told += [problem for file in files for problem in weight_problems(file)]
    if told:
        return False, f"the model is damaged: {_some(told)}"
    by = f"{len(recorded)} files are as they were written" if recorded else "no hashes of its files were recorded"
    return True, f"{by}, and all weights are finite"


def _recorded(about: Subject) -> Mapping[str, str]:
    """The hashes of the model's files: of its run's manifest, or of the manifest that it was published with."""
    if about.run is not None:
        return dict(about.run.manifest.get("model_files", {}))
    manifest = about.model / "manifest.json"
    return dict(read_json(manifest).get("sha256", {})) if manifest.is_file() else {}


def _differing(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    return [
        f"{name} is missing" if not (folder / name).is_file() else f"{name} is not what was written"
        for name, digest in recorded.items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]


def checkpoints(about: Subject) -> tuple[bool, str]:
    """Whether each checkpoint that is kept has its marker, and the files of which that speaks."""
    folders = sorted(about.run.checkpoints.glob("checkpoint-*")) if about.run else []
    told: list[str] = []
    for folder in folders:
        marker = folder / COMPLETE
        found = _differing(folder, read_json(marker)["files"]) if marker.is_file() else [f"{COMPLETE} is missing"]
        told += [f"{folder.name}: {problem}" for problem in found]
    if told:
        return False, f"checkpoints are damaged: {_some(told)}"
    return True, f"{len(folders)} checkpoints are complete" if folders else "no checkpoints are kept"


def data(about: Subject) -> tuple[bool, str]:
    """Whether rows that occur in the evaluation files were kept out of the training."""
    assert about.run is not None
    found = read_json(about.run.path / "data_report.json").get("contamination")
    if not found:
        return True, "the training rows were not compared with the evaluation files"
    counts = {kind: found[kind] for kind in ("exact", "normalised", "near") if found.get(kind)}
    if not counts:
        return True, f"no training row occurs in {len(found['files'])} evaluation files"
    told = f"{sum(counts.values())} training rows occur in the evaluation files"
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    if about.run.settings.get("on_contamination") == "keep":
        return False, f"{told} ({kinds}) and were trained on (on_contamination=keep): the scores tell nothing"
    return True, f"{told} ({kinds}) and were left out"


def secrets(about: Subject) -> tuple[bool, str]:
    """Whether any file of the model holds what looks like a credential."""
    found = scan(about.model)
    return (False, f"the model holds secrets: {_some(found)}") if found else (True, "no file holds a secret")


def profile_format(about: Subject) -> tuple[bool, str]:
    """Whether aim_profile.json is what serving platforms read."""
    if about.profile is None:
        return False, f"there is no {profile.PROFILE}"
    found = read_json(about.profile)
    told = profile.problems(found)
    if told:
        return False, f"{about.profile.name}: {_some(told)}"
    return True, f"{found['memory_gb']:g} GB in {found['precision']}, a partition of at least " + (
        f"{found['recommended_partition_gb']:g} GB"
    )


def _some(told: Sequence[str]) -> str:
    more = len(told) - SHOWN
    return "; ".join(told[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
