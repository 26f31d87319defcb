"""What happened to every row, as `data_report.json` keeps it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.data.loader import IGNORED, Example, Rejection
from src.errors import DataError
from src.utils.files import sha256


def refuse_evaluation_files(files: Sequence[Path], eval_path: str | Path) -> None:
    """Raises: DataError if a training file is one of the evaluation files, by path or by content."""
    held = {sha256(p): p for p in sorted(Path(eval_path).glob("*.jsonl"))}
    same = [(f, held[h]) for f in files if (h := sha256(f)) in held]
    if same:
        raise DataError(
            *(f"training file {f} is the evaluation file {e}" for f, e in same),
            hint="set dataset_pattern so that it leaves evaluation data out",
        )


def report(files: Sequence[Path], examples: Sequence[Example], rejected: Sequence[Rejection]) -> dict[str, Any]:
    """The report: `rows_in == rows_trained + len(rejected)`, and each rejection by name."""
    lengths = sorted(len(e.input_ids) for e in examples)
    learned = sum(label != IGNORED for e in examples for label in e.labels)
    return {
        "rows_in": len(examples) + len(rejected),
        "rows_trained": len(examples),
        "rejected": [
            {"file": str(r.file), "line": r.line, "reason": r.reason, "detail": r.detail} for r in rejected
        ],
        "rejected_by_reason": dict(Counter(r.reason for r in rejected)),
        "files": [
            {
                "file": str(f),
                "sha256": sha256(f),
                "rows_in": sum(e.row.file == f for e in examples) + sum(r.file == f for r in rejected),
                "rows_trained": sum(e.row.file == f for e in examples),
            }
            for f in files
        ],
        "tokens": {
            "total": sum(lengths),
            "with_loss": learned,
            "row_length": {
                name: lengths[min(len(lengths) - 1, int(share * len(lengths)))]
                for name, share in (("min", 0), ("p50", 0.5), ("p95", 0.95), ("max", 1))
            },
        },
    }
