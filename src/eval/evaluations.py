"""The evaluations of a run, side by side: a folder for each set of conditions, which no later evaluation removes.

RUN/evals/<fingerprint>/    <split>.predictions.jsonl  metrics.json  comparison.json  config_used.yaml
RUN/metrics.json, RUN/comparison.json    those of the newest evaluation; the run is judged by it

A run of an earlier version has one evaluation, with its predictions and settings in RUN/evals itself.
Imports neither torch nor numpy.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RunError
from ..runs import CONFIG, FIGURES, Run, read_settings
from ..utils.commands import command
from ..utils.files import atomic_dir, read_object, write_json

EVALS, NAME = "evals", "evaluation"  # NAME: key of RUN/metrics.json, the folder of the newest evaluation
METRICS, COMPARISON = "metrics.json", "comparison.json"


class Evaluation(NamedTuple):
    """A stored evaluation.

    Args:
        folder: has the predictions and the settings.
        records: has metrics.json and comparison.json: `folder`, or of the newest evaluation the run directory.
    """

    folder: Path
    records: Path

    def predictions(self, split: str) -> Path:
        return self.folder / f"{split}.predictions.jsonl"

    @property
    def result(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return read_object(self.records / METRICS, FIGURES)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, under their current names; empty if they are not stored.

        Raises: RunError if they cannot be read.
        """
        path = self.folder / CONFIG
        return read_settings(path, "restore it, or remove it and evaluate again") if path.exists() else {}

    @property
    def is_former(self) -> bool:
        """Whether an earlier version wrote it."""
        return self.folder.name == EVALS


def fingerprint(conditions: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of the conditions' sha256."""
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:12]


def folder_of(run: Run, conditions: Mapping[str, Any]) -> Path:
    """The folder of the run's evaluation under these conditions."""
    return run.path / EVALS / fingerprint(conditions)


def newest(run: Run) -> Evaluation | None:
    """The newest evaluation of a run; None if there is none. Raises: RunError if metrics.json is corrupt."""
    if not (run.path / METRICS).is_file():
        return None
    result = read_object(run.path / METRICS, FIGURES)
    if "eval" not in result:
        return None
    name = str(result.get(NAME, ""))
    if not re.fullmatch(r"([0-9a-f]{12})?", name):
        raise RunError(
            f"{run.path / METRICS} names no evaluation: {name!r}", hint="restore it, or start a new run"
        )
    return Evaluation(run.path / EVALS / name, run.path)


def all_of(run: Run) -> list[Evaluation]:
    """All evaluations of a run, the newest first. Raises: as `newest`."""
    first = newest(run)
    folders = (path.parent for path in (run.path / EVALS).glob(f"*/{METRICS}"))
    others = [Evaluation(folder, folder) for folder in folders if first is None or folder != first.folder]
    return [*([first] if first else []), *sorted(others, key=_ended, reverse=True)]


def require(run: Run) -> Evaluation:
    """The newest evaluation. Raises: RunError if the run was not evaluated."""
    found = newest(run)
    if found is None:
        raise RunError(f"run {run.id} has not been evaluated", hint=f"{command('eval', run.word)} does that")
    return found


def _ended(evaluation: Evaluation) -> str:
    try:
        return str(evaluation.result.get("generated", {}).get("at", ""))
    except RunError:
        return ""


def keep_former(run: Run) -> None:
    """Give the evaluation of an earlier version a folder of its own, so that the next one does not replace it."""
    found = newest(run)
    if found is None or not found.is_former or not found.folder.is_dir():
        return
    result = found.result
    files = [*found.folder.glob("*.predictions.jsonl"), found.folder / CONFIG, run.path / COMPARISON]
    with atomic_dir(folder_of(run, result.get("conditions", {}))) as temporary:
        for file in filter(Path.is_file, files):
            shutil.copy2(file, temporary / file.name)
        write_json(temporary / METRICS, {key: value for key, value in result.items() if key != "train"})
    write_json(run.path / METRICS, result | {NAME: fingerprint(result.get("conditions", {}))})
    for file in files:
        if file.parent == found.folder:
            file.unlink(missing_ok=True)
