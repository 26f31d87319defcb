"""Metrics: a score for each example and one for the corpus, with the scale and the implementation's name.

To add a metric, add an entry to METRICS: scores, interval, comparison, verdict and report follow from it. It is
evaluated where `metrics` names it; model/tasks.py has the defaults of each task. custom_metrics.py has the metrics
outside of the table: `evaluate:NAME` of the library `evaluate`, and `file:PATH.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from importlib.metadata import version
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from ..data.thoughts import split_thought
from ..errors import ConfigError, did_you_mean
from . import custom_metrics, metric_functions, tool_calls
from .metric_functions import Floats, Row

Better = Literal["higher", "lower", "neither"]
Rows = Sequence[Row]
CALLS = "tool_call_match"  # a default metric where an evaluation row ends in a call


class Metric(NamedTuple):
    """The corpus score is the mean of the examples' scores, or a function of summed counts.

    example: the score of a row.
    scale: "LOW-HIGH" or "from LOW".
    implementation: names library, version and settings; two results are compared only if it is equal.
    better: the direction.
    statistics, corpus: counts of each row, and the corpus score of their sum; `corpus` maps sums, (..., counts),
        to scores, (...).
    references: whether it reads the keys `reference_*` of a row (see generate.py, ReferenceScorer).
    joint: whether rows have comparable counts only if all rows are counted in one call, as with labels.
    scorer: makes the metric of sacrebleu, whose own paired test the verdict then consults too.
    """

    example: Callable[[Row], float]
    scale: str
    implementation: Callable[[], str]
    better: Better = "higher"
    statistics: Callable[[Rows], list[list[float]]] | None = None
    corpus: Callable[[Floats], Floats] | None = None
    references: bool = False
    joint: bool = False
    scorer: Callable[[], Any] | None = None


class Scores(NamedTuple):
    """corpus: the score over all rows.
    examples: the score of each row, in order; None where single rows have none.
    statistics: the counts of each row, where the corpus score is a function of their sum.
    """

    corpus: float
    examples: list[float] | None
    statistics: list[list[float]] | None


def _texts(function: Callable[[str, str], float]) -> Callable[[Row], float]:
    return lambda row: function(row["prediction"], row["reference"])


def _by_row(function: Callable[[Row], list[float]]) -> Callable[[Rows], list[list[float]]]:
    return lambda rows: [function(row) for row in rows]


def _named(text: str) -> Callable[[], str]:
    return lambda: text


def _rouge(kind: str) -> Metric:
    return Metric(
        _texts(partial(metric_functions.rouge, kind)),
        "0-1",
        lambda: f"rouge_score {version('rouge-score')} {kind} F-measure, no stemming, mean",
    )


def _signature(scorer: type[BLEU] | type[CHRF]) -> str:
    metric = scorer()
    metric.corpus_score(["a"], [["a"]])
    return f"sacrebleu {metric.get_signature()}"


METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        _texts(metric_functions.exact_match), "0-1", _named("assay exact text, outer white space stripped, mean")
    ),
    "avg_jaccard_overlap": Metric(
        _texts(metric_functions.jaccard), "0-1", _named("assay Jaccard of word and symbol sets, mean")
    ),
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "bleu": Metric(
        _texts(metric_functions.sentence_bleu),
        "0-100",
        lambda: _signature(BLEU),
        statistics=_by_row(metric_functions.bleu_counts),
        corpus=metric_functions.bleu,
        scorer=BLEU,
    ),
    "chrf": Metric(
        _texts(metric_functions.sentence_chrf),
        "0-100",
        lambda: _signature(CHRF),
        statistics=_by_row(metric_functions.chrf_counts),
        corpus=metric_functions.chrf,
        scorer=CHRF,
    ),
    "token_f1": Metric(
        _texts(metric_functions.token_f1),
        "0-1",
        _named("assay F1 of words and symbols, case and punctuation kept, mean"),
    ),
    "perplexity": Metric(
        metric_functions.row_perplexity,
        "from 1",
        _named("assay exp of the mean nats a reference token, its end of turn with it, over the corpus"),
        better="lower",
        statistics=_by_row(metric_functions.nll_counts),
        corpus=metric_functions.perplexity,
        references=True,
    ),
    "token_accuracy": Metric(
        metric_functions.row_token_accuracy,
        "0-1",
        _named("assay share of reference tokens, the end of turn with them, that the model would choose next"),
        statistics=_by_row(metric_functions.hit_counts),
        corpus=metric_functions.ratio,
        references=True,
    ),
    "length_ratio": Metric(
        _texts(metric_functions.length_ratio),
        "from 0",
        _named("assay words and symbols predicted for each of the references, over the corpus"),
        better="neither",
        statistics=_by_row(metric_functions.length_counts),
        corpus=metric_functions.ratio,
    ),
    "tool_call_match": Metric(
        lambda row: float(tool_calls.same_calls(row["prediction"], row["reference"], row.get("calls", ()))),
        "0-1",
        _named("assay same tool calls, names and arguments as JSON in any order, mean"),
    ),
    "accuracy": Metric(_texts(metric_functions.exact_match), "0-1", _named("assay share of right labels")),
    "f1_macro": Metric(
        _texts(metric_functions.exact_match),
        "0-1",
        _named("assay macro F1, mean of the labels' F1"),
        statistics=metric_functions.label_counts,
        corpus=metric_functions.f1_macro,
        joint=True,
    ),
}


def check(names: Sequence[str]) -> None:
    """Load the metrics outside of METRICS.

    Raises: ConfigError naming every metric that is unknown or cannot be used.
    """
    problems = unknown("metrics", names)
    hint = f"there are: {', '.join(METRICS)}, evaluate:NAME and file:PATH.py" if problems else ""
    for name in filter(custom_metrics.is_custom, names):
        try:
            custom_metrics.load(name)
        except ConfigError as error:
            problems += error.problems
            hint = hint or error.hint
    if problems:
        raise ConfigError(*problems, hint=hint)


def unknown(key: str, names: Iterable[str]) -> list[str]:
    """A sentence for each name in the setting `key` that is no metric. Files and the Hub are not read."""
    return [
        f"{key}: {name} is not a metric{did_you_mean(name, METRICS)}"
        for name in names
        if name not in METRICS and not custom_metrics.is_custom(name)
    ]


def try_on(names: Sequence[str], answers: Sequence[str]) -> None:
    """Try the metrics of files on two pairs of the reference `answers`, before a model is loaded.

    Raises: ConfigError naming every metric that cannot score them.
    """
    pairs = [(answers[0], answers[0]), (answers[-1], answers[0])] if answers else []
    problems: list[str] = []
    for name in filter(custom_metrics.is_custom, names):
        try:
            custom_metrics.load(name).try_on(pairs)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems, hint="fix the file; nothing was generated")


def needs_references(names: Sequence[str]) -> bool:
    """Whether a metric reads the keys `reference_*` of a row."""
    return any(METRICS[n].references for n in names if n in METRICS)


def score(name: str, rows: Rows) -> Scores:
    """Score rows with the keys `prediction` and `reference`, and `reference_*` where the metric needs them.

    Raises: ValueError if there are no rows.
    """
    if not rows:
        raise ValueError(f"no rows to score by {name}")
    if custom_metrics.is_custom(name):
        return Scores(*custom_metrics.load(name).score(rows), None)
    metric = METRICS[name]
    rows = [_without_thoughts(row) for row in rows]
    examples = [metric.example(row) for row in rows]
    if metric.statistics is None or metric.corpus is None:
        return Scores(fmean(examples), examples, None)
    statistics = metric.statistics(rows)
    return Scores(float(metric.corpus(np.sum(statistics, axis=0))), examples, statistics)


def _without_thoughts(row: Row) -> Row:
    texts = {key: row[key] for key in ("prediction", "reference") if isinstance(row.get(key), str)}
    found = {key: answer_of(text) for key, text in texts.items()}
    return row if found == texts else {**row, **found}


def answer_of(text: str) -> str:
    """What follows the thoughts of a prediction or reference, which are not judged by their wording."""
    return split_thought(text, source=text)[1]


def score_rows(names: Sequence[str], rows: Sequence[MutableMapping[str, Any]]) -> dict[str, float]:
    """Add `scores` and `statistics` by metric to each row.

    Returns: the corpus score of each metric.
    """
    scored = {name: score(name, rows) for name in names}
    for index, row in enumerate(rows):
        row["scores"] = {n: s.examples[index] for n, s in scored.items() if s.examples is not None}
        row["statistics"] = {n: s.statistics[index] for n, s in scored.items() if s.statistics is not None}
    return {name: s.corpus for name, s in scored.items()}


def describe(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """`{metric: {scale, implementation, better}}`, stored with the scores."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        metric = custom_metrics.load(name) if custom_metrics.is_custom(name) else METRICS[name]
        found[name] = {
            "scale": metric.scale,
            "implementation": metric.implementation(),
            "better": metric.better,
        }
    return {name: dict(about) for name, about in found.items()}
