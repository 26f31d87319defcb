"""Metrics: scored example by example, then over the corpus, each with its scale and implementation named.

To add a metric, enter it in METRICS: per-example scores, corpus score, interval and comparison come from there.
Others are named where they are asked for: `evaluate:NAME` is one of the library `evaluate`, `file:PATH.py` a
function of one's own (see outside.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from importlib.metadata import version
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from src.errors import ConfigError, did_you_mean
from src.eval import custom_metrics, metric_functions
from src.eval.metric_functions import Floats, Row

Better = Literal["higher", "lower", "neither"]
Rows = Sequence[Row]


class Metric(NamedTuple):
    """`example` scores one row. `statistics` gives each row a vector, and `corpus` makes the corpus score of their
    sum, or of many sums, shape (..., vector); without them it is the mean of the examples.

    references: whether it reads the keys `reference_*` of a row, which a pass over the reference answers fills.
    together: whether vectors are alike only where all rows are counted together, as those of labels are.
    """

    example: Callable[[Row], float]
    scale: str
    implementation: Callable[[], str]
    better: Better = "higher"
    statistics: Callable[[Rows], list[list[float]]] | None = None
    corpus: Callable[[Floats], Floats] | None = None
    references: bool = False
    together: bool = False


class Scores(NamedTuple):
    """`corpus` is the metric over all rows, `examples` the score of each, in their order.

    examples: None where a single row has no score.
    statistics: a vector a row where the corpus score is no mean of the examples: it is made of their sum.
    """

    corpus: float
    examples: list[float] | None
    statistics: list[list[float]] | None


def _texts(function: Callable[[str, str], float]) -> Callable[[Row], float]:
    return lambda row: function(row["prediction"], row["reference"])


def _each(function: Callable[[Row], list[float]]) -> Callable[[Rows], list[list[float]]]:
    return lambda rows: [function(row) for row in rows]


def _says(text: str) -> Callable[[], str]:
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
        _texts(metric_functions.exact_match), "0-1", _says("assay exact text, outer white space stripped, mean")
    ),
    "avg_jaccard_overlap": Metric(
        _texts(metric_functions.jaccard), "0-1", _says("assay Jaccard of word and symbol sets, mean")
    ),
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "bleu": Metric(
        _texts(metric_functions.sentence_bleu),
        "0-100",
        lambda: _signature(BLEU),
        statistics=_each(metric_functions.bleu_counts),
        corpus=metric_functions.bleu,
    ),
    "chrf": Metric(
        _texts(metric_functions.sentence_chrf),
        "0-100",
        lambda: _signature(CHRF),
        statistics=_each(metric_functions.chrf_counts),
        corpus=metric_functions.chrf,
    ),
    "token_f1": Metric(
        _texts(metric_functions.token_f1),
        "0-1",
        _says("assay F1 of words and symbols, case and punctuation kept, mean"),
    ),
    "perplexity": Metric(
        metric_functions.perplexity_of,
        "from 1",
        _says("assay exp of the mean nats a reference token, its end of turn with it, over the corpus"),
        better="lower",
        statistics=_each(metric_functions.nll_counts),
        corpus=metric_functions.perplexity,
        references=True,
    ),
    "token_accuracy": Metric(
        metric_functions.hits_of,
        "0-1",
        _says("assay share of reference tokens, the end of turn with them, that the model would choose next"),
        statistics=_each(metric_functions.hit_counts),
        corpus=metric_functions.ratio,
        references=True,
    ),
    "length_ratio": Metric(
        _texts(metric_functions.length_ratio),
        "from 0",
        _says("assay words and symbols predicted for each of the references, over the corpus"),
        better="neither",
        statistics=_each(metric_functions.length_counts),
        corpus=metric_functions.ratio,
    ),
    "accuracy": Metric(_texts(metric_functions.exact_match), "0-1", _says("assay share of right labels")),
    "f1_macro": Metric(
        _texts(metric_functions.exact_match),
        "0-1",
        _says("assay macro F1, mean of the labels' F1"),
        statistics=metric_functions.label_counts,
        corpus=metric_functions.f1_macro,
        together=True,
    ),
}


def check(names: Sequence[str]) -> None:
    """Load what is named from outside of the table.

    Raises: ConfigError naming every metric that is not in the table, or cannot be used.
    """
    problems = [
        f"metrics: {n} is not a metric{did_you_mean(n, METRICS)}"
        for n in names
        if n not in METRICS and not custom_metrics.is_custom(n)
    ]
    hint = f"there are: {', '.join(METRICS)}, evaluate:NAME and file:PATH.py" if problems else ""
    for name in filter(custom_metrics.is_custom, names):
        try:
            custom_metrics.load(name)
        except ConfigError as error:
            problems += error.problems
            hint = hint or error.hint
    if problems:
        raise ConfigError(*problems, hint=hint)


def needs_references(names: Sequence[str]) -> bool:
    """Whether any of them reads the keys `reference_*` of a row."""
    return any(METRICS[n].references for n in names if n in METRICS)


def score(name: str, rows: Rows) -> Scores:
    """Score rows, which have `prediction`, `reference` and what the metric needs besides.

    Raises: ValueError if there are none.
    """
    if not rows:
        raise ValueError(f"no rows to score by {name}")
    if custom_metrics.is_custom(name):
        return Scores(*custom_metrics.load(name).score(rows), None)
    metric = METRICS[name]
    examples = [metric.example(row) for row in rows]
    if metric.statistics is None or metric.corpus is None:
        return Scores(fmean(examples), examples, None)
    statistics = metric.statistics(rows)
    return Scores(float(metric.corpus(np.sum(statistics, axis=0))), examples, statistics)


def score_rows(names: Sequence[str], rows: Sequence[MutableMapping[str, Any]]) -> dict[str, float]:
    """Give each row its `scores`, and its `statistics` where a metric has them.

    Returns: the corpus score of each metric.
    """
    scored = {name: score(name, rows) for name in names}
    for index, row in enumerate(rows):
        row["scores"] = {n: s.examples[index] for n, s in scored.items() if s.examples is not None}
        row["statistics"] = {n: s.statistics[index] for n, s in scored.items() if s.statistics is not None}
    return {name: s.corpus for name, s in scored.items()}


def describe(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """`{metric: {scale, implementation, better}}`, to stand beside the numbers."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        metric = custom_metrics.load(name) if custom_metrics.is_custom(name) else METRICS[name]
        found[name] = {
            "scale": metric.scale,
            "implementation": metric.implementation(),
            "better": metric.better,
        }
    return {name: dict(about) for name, about in found.items()}
