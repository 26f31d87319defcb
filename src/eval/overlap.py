"""Evaluation rows that a run was trained on, found by the fingerprints that the run keeps of its training rows.

Training compares its rows with its evaluation files. So only files that it did not see are compared here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..data.duplicates import KINDS
from ..data.trained_rows import FILE, TrainedRows
from ..errors import MAX_LISTED
from ..runs import Run
from ..utils.logs import log
from ..utils.units import count
from . import eval_data
from .setup import EvalSplits


def find_overlaps(run: Run, splits: EvalSplits) -> dict[str, Any]:
    """The rows that the run was trained on, as metrics.json records them; a warning tells of them.

    Returns: `{split: {exact, normalised, near, lines}}` of the splits that have any. A near duplicate is likely,
        not certain.
    """
    unseen = eval_data.changes_since_training(run, splits.files, splits.sha256)
    if not unseen:
        return {}
    if not (run.path / FILE).is_file():  # a run of an earlier version
        for sentence in unseen.values():
            log.warning("%s: its rows may be among the training rows", sentence)
        return {}
    trained = TrainedRows(run.path / FILE)
    found: dict[str, Any] = {}
    for split, sentence in unseen.items():
        rows = splits.rows[split]
        matches = [(row.line, kind) for row, kind in zip(rows, trained.matches(rows), strict=True) if kind]
        tell = log.warning if matches else log.info
        tell("%s: %s", sentence, _describe(len(rows), matches))
        if matches:
            kinds = Counter(kind for _, kind in matches)
            counts = {kind: kinds[kind] for kind in KINDS}
            found[split] = counts | {"lines": [line for line, _ in matches]}
    return found


def _describe(rows: int, matches: list[tuple[int, Any]]) -> str:
    if not matches:
        return f"none of its {count(rows, 'row')} is among the training rows"
    kinds = Counter(kind for _, kind in matches)
    shown = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind])
    lines = ", ".join(str(line) for line, _ in matches[:MAX_LISTED])
    lines += ", ..." if len(matches) > MAX_LISTED else ""
    are = "is" if len(matches) == 1 else "are"
    return f"{len(matches)} of its {count(rows, 'row')} {are} among the training rows ({shown}): line {lines}"
