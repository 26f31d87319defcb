"""Evaluation results made without a model: predictions with their scores, as `eval` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.eval import metrics
from tests.fixtures import jsonl

BASE = {"name": "models/x", "revision": "sha256:1"}
METRICS = ("exact_match", "rougeL", "bleu")
Pairs = Sequence[tuple[str, str]]


def evaluated(
    folder: Path,
    answers: Mapping[str, Pairs],
    names: Sequence[str] = METRICS,
    rows: str = "",
    **conditions: Any,
) -> Path:
    """Write `metrics.json` and, into its folder `rows`, the predictions: `{split: [(prediction, reference)]}`."""
    scores = {}
    for split, pairs in answers.items():
        made: list[dict[str, Any]] = [
            {"prompt": f"{split} {n}?", "reference": r, "prediction": p} for n, (p, r) in enumerate(pairs)
        ]
        for row in made:
            right = float(row["prediction"] == row["reference"])
            row |= {"reference_nll": 2.0 - right, "reference_tokens": 4, "reference_hits": 4 * right}
        scores[split] = metrics.score_rows(names, made)
        jsonl(folder / rows / f"{split}.predictions.jsonl", made)
    about = metrics.describe(names)
    result = {
        "eval": scores,
        "metrics": about,
        "conditions": {"task": "causal_lm", "metrics": {n: a["implementation"] for n, a in about.items()}}
        | conditions,
        "base_model": BASE,
    }
    (folder / "metrics.json").write_text(json.dumps(result))
    return folder


def right(share: float, count: int = 40, wrong: str = "none") -> list[tuple[str, str]]:
    """`count` predictions of which the first `share` are right."""
    texts = [f"TOP ( a {n} , b , c )" for n in range(count)]
    return [(text if n < share * count else wrong, text) for n, text in enumerate(texts)]
