"""The examples on which a tuned model did worse than its base, from the rows that both evaluations have kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from src.eval.results import baseline_folder
from src.model.tasks import TASKS
from src.runs import Run
from src.schema import PublishConfig

SHOWN = 3


class Worse(NamedTuple):
    """An example, the tuned model's answer to it, and both scores."""

    split: str
    metric: str
    prompt: str
    reference: str
    prediction: str
    base: float
    tuned: float


def worst(run: Run, comparison: Mapping[str, Any], cfg: PublishConfig) -> list[Worse]:
    """The largest drops against the base by the gate's metric, over all splits; none where no row got worse."""
    metric = cfg.gate.metric or TASKS[run.manifest.get("task", "causal_lm")].decides
    base = baseline_folder(cfg.artifacts_dir, comparison["base_model"], comparison["conditions"])
    found = []
    for about in (row for row in comparison["rows"] if row["metric"] == metric):
        split, sign = about["split"], -1 if about.get("better") == "lower" else 1
        for before, row in zip(predictions(base, split), predictions(run.path / "evals", split), strict=False):
            was, now = (each.get("scores", {}).get(metric) for each in (before, row))
            if before["prompt"] == row["prompt"] and None not in (was, now) and sign * (was - now) > 0:
                found.append(Worse(split, metric, row["prompt"], row["reference"], row["prediction"], was, now))
    return sorted(found, key=lambda w: -abs(w.base - w.tuned))[:SHOWN]


def predictions(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of an evaluation; none where they are not kept."""
    path = folder / f"{split}.predictions.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
