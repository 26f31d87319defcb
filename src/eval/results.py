"""Stored evaluation results, and the scores of two of them paired example by example."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import runs
from ..errors import RunError
from ..runs import FIGURES, Run
from ..utils.commands import command
from ..utils.files import read_json, read_object
from ..utils.logs import log
from . import evaluations, significance
from .evaluations import Evaluation
from .fingerprint import baseline_folder, differing_conditions
from .metric_functions import Row
from .metrics import METRICS

LARGEST_CHANGE = {"0-1": 1.0, "0-100": 100.0}  # of an example's score, by the metric's scale
BASELINE_HINT = f"run {command('eval-baseline')} with the settings of {command('eval')}"


class EvalResult:
    """The evaluation of a model: its `metrics.json`, and the rows that the scores come from.

    name: of the model, for tables. folder: has metrics.json. predictions: has `<split>.predictions.jsonl`.
    run: the run that was evaluated; None for a base model.
    """

    run: Run | None = None

    def __init__(self, name: str, folder: Path, predictions: Path) -> None:
        self.name, self.folder, self._predictions = name, folder, predictions
        self._rows: dict[str, list[Row]] = {}

    @classmethod
    def of_run(cls, run: Run, evaluation: Evaluation | None = None) -> EvalResult:
        """An evaluation of a run, by default the newest. Raises: RunError if the run has not been evaluated."""
        found = evaluation or evaluations.require(run)
        result = cls(run.id, found.records, found.folder)
        result.run = run
        return result

    @classmethod
    def of_base(cls, folder: Path) -> EvalResult:
        """The cached result of a base model. Raises: RunError if `folder` has none."""
        if not (folder / "metrics.json").is_file():
            raise RunError(f"there is no baseline in {folder}", hint=BASELINE_HINT)
        found = cls("base", folder, folder)
        found.name = str(found.result["base_model"]["name"])
        return found

    @cached_property
    def result(self) -> Mapping[str, Any]:
        return read_object(self.folder / "metrics.json", FIGURES)

    def rows(self, split: str) -> list[Row]:
        """The predictions with their scores. Raises: RunError if the file is missing."""
        path = self._predictions / f"{split}.predictions.jsonl"
        if split not in self._rows:
            if not path.is_file():
                raise RunError(f"{path} does not exist", hint="evaluate again")
            lines = path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")
            try:
                self._rows[split] = [json.loads(line) for line in lines if line]
            except ValueError as error:
                raise RunError(f"{path} is truncated or corrupt: {error}", hint="evaluate again") from None
        return self._rows[split]


def baseline_of(tuned: EvalResult, artifacts_dir: str) -> EvalResult:
    """The cached result of the model's base under the model's conditions.

    Raises: RunError if there is none, naming what differs from the newest result of that base.
    """
    base, conditions = tuned.result["base_model"], tuned.result["conditions"]
    folder = baseline_folder(artifacts_dir, base, conditions)
    if (folder / "metrics.json").is_file():
        return EvalResult.of_base(folder)
    paths = sorted((Path(artifacts_dir) / "metrics").glob("*/metrics.json"), key=lambda p: p.stat().st_mtime)
    results = [read_json(path) for path in paths]
    others = [r["conditions"] for r in results if r["base_model"]["revision"] == base["revision"]]
    problem = f"{base['name']} has no baseline under the conditions of {tuned.name}"
    if others:
        problem += f"; its newest one differs in {', '.join(differing_conditions(conditions, others[-1]))}"
    raise RunError(problem, hint=BASELINE_HINT)


def newest_comparable(output_dir: str, base: Mapping[str, Any]) -> tuple[Run, Evaluation] | None:
    """The newest run with the base model of the result `base` and its evaluation under the same conditions."""
    for run in runs.all_runs(output_dir):
        try:
            for evaluation in evaluations.all_of(run):
                result = evaluation.result
                same_base = result.get("base_model", {}).get("revision") == base["base_model"]["revision"]
                if same_base and result.get("conditions") == base["conditions"]:
                    return run, evaluation
        except RunError as error:
            log.warning("%s", error.problems[0])
    return None


def comparable(first: Run, second: Run) -> tuple[EvalResult, EvalResult]:
    """The newest evaluations of two runs that were made under the same conditions; without any, the newest ones.

    Raises: RunError if one of the runs has not been evaluated.
    """
    newest = EvalResult.of_run(first), EvalResult.of_run(second)
    for mine in evaluations.all_of(first):
        conditions = mine.result.get("conditions")
        for other in evaluations.all_of(second):
            if other.result.get("conditions") == conditions:
                return EvalResult.of_run(first, mine), EvalResult.of_run(second, other)
    return newest


def require_same_conditions(tuned: EvalResult, base: EvalResult) -> None:
    """Raises: RunError if the models were evaluated under different conditions, naming what differs."""
    ours, theirs = tuned.result["conditions"], base.result["conditions"]
    if ours != theirs:
        raise RunError(
            f"not comparable: {tuned.name} and {base.name} were evaluated under different "
            f"{', '.join(differing_conditions(ours, theirs))}",
            hint="evaluate both with the same eval_path and settings" if base.run else BASELINE_HINT,
        )


def pair_scores(tuned: EvalResult, base: EvalResult, split: str, metric: str) -> significance.PairedScores | None:
    """Both models' scores of the examples; None for a metric whose corpus score is not made of them.

    Raises: RunError if the predictions are not for the same requests.
    """
    ours, theirs = tuned.rows(split), base.rows(split)
    requests = [[(row["prompt"], row["reference"]) for row in rows] for rows in (ours, theirs)]
    if requests[0] != requests[1]:
        raise RunError(
            f"not comparable: {tuned.name} and {base.name} were not evaluated on the same prompts of {split}",
            hint=BASELINE_HINT,
        )
    known = METRICS.get(metric)
    if known and known.statistics and known.corpus:
        counts = _counts(metric, ours, theirs)
        if counts is None:
            return None
        return significance.PairedScores(counts[1], counts[0], known.corpus, _largest_change(tuned, metric))
    scores = [[row["scores"].get(metric) for row in rows] for rows in (ours, theirs)]
    if not all(_is_mean(e, s, split, metric) for e, s in zip((tuned, base), scores, strict=True)):
        return None
    return significance.pair_means(scores[1], scores[0], _largest_change(tuned, metric))


def _counts(metric: str, *models: Sequence[Row]) -> list[Any] | None:
    """The counts of each model's rows, (rows, counts), in the same columns."""
    known = METRICS[metric]
    if known.joint and known.statistics:
        counts = np.array(known.statistics([row for rows in models for row in rows]), dtype=float)
        return np.split(counts, len(models))
    found = [[row.get("statistics", {}).get(metric) for row in rows] for rows in models]
    return None if any(None in rows for rows in found) else [np.array(rows, dtype=float) for rows in found]


def _is_mean(model: EvalResult, scores: Sequence[float | None], split: str, metric: str) -> bool:
    corpus = float(model.result["eval"][split][metric])
    numbers = [s for s in scores if s is not None]
    return len(numbers) == len(scores) and abs(float(np.mean(numbers)) - corpus) <= 1e-9 * max(1.0, abs(corpus))


def _largest_change(model: EvalResult, metric: str) -> float | None:
    return LARGEST_CHANGE.get(model.result["metrics"][metric]["scale"])
