"""Metrics: scored example by example, then over the corpus, each with its scale and implementation named.

To add a metric, enter it in METRICS: per-example scores, corpus score and the comparison come from there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from statistics import fmean
from typing import NamedTuple

from rouge_score import rouge_scorer
from sacrebleu.metrics.bleu import BLEU

from src.errors import ConfigError, did_you_mean


class Metric(NamedTuple):
    """`example(prediction, reference)` scores one pair; `corpus` scores all, None being the mean of them."""

    example: Callable[[str, str], float]
    scale: str
    implementation: Callable[[], str]
    corpus: Callable[[Sequence[str], Sequence[str]], float] | None = None


class Scores(NamedTuple):
    """`corpus` is the metric over all pairs, `examples` the score of each, in their order."""

    corpus: float
    examples: list[float]


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same text, white space at either end aside."""
    return float(prediction.strip() == reference.strip())


def jaccard(prediction: str, reference: str) -> float:
    """Distinct tokens in both over distinct tokens in either (Jaccard, 1912); two empty texts are alike.

    A token is a word, or one character that is neither word nor white space.
    """
    a, b = (set(re.findall(r"\w+|[^\w\s]", text)) for text in (prediction, reference))
    return len(a & b) / len(a | b) if a | b else 1.0


def f1_macro(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean over the labels of F1 = 2 TP / (2 TP + FP + FN), each label counting the same.

    Labels are those that occur in `references` or `predictions`; as in Opitz and Burst (2019,
    arXiv:1911.03347), "averaged F1", and as scikit-learn computes `f1_score(average="macro")`.
    """
    pairs = [(p.strip(), r.strip()) for p, r in zip(predictions, references, strict=True)]
    predicted, real = Counter(p for p, _ in pairs), Counter(r for _, r in pairs)
    right = Counter(p for p, r in pairs if p == r)
    return fmean(2 * right[label] / (predicted[label] + real[label]) for label in sorted({*predicted, *real}))


def _rouge(kind: str) -> Metric:
    def example(prediction: str, reference: str) -> float:
        return float(_scorer(kind).score(reference, prediction)[kind].fmeasure)

    return Metric(
        example, "0-1", lambda: f"rouge_score {version('rouge-score')} {kind} F-measure, no stemming, mean"
    )


@cache
def _scorer(kind: str) -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer([kind], use_stemmer=False)


def _sentence_bleu(prediction: str, reference: str) -> float:
    return float(_sentence_scorer().sentence_score(prediction, [reference]).score)


@cache
def _sentence_scorer() -> BLEU:
    return BLEU(effective_order=True)


def _corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    return float(BLEU().corpus_score(list(predictions), [list(references)]).score)


def _bleu_signature() -> str:
    metric = BLEU()
    metric.corpus_score(["a"], [["a"]])
    return f"sacrebleu {metric.get_signature()}"


METRICS: dict[str, Metric] = {
    "exact_match": Metric(exact_match, "0-1", lambda: "assay exact text, outer white space stripped, mean"),
    "avg_jaccard_overlap": Metric(jaccard, "0-1", lambda: "assay Jaccard of word and symbol sets, mean"),
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "bleu": Metric(_sentence_bleu, "0-100", _bleu_signature, _corpus_bleu),
    "accuracy": Metric(exact_match, "0-1", lambda: "assay share of right labels"),
    "f1_macro": Metric(exact_match, "0-1", lambda: "assay macro F1, mean of the labels' F1", f1_macro),
}


def check(names: Sequence[str]) -> None:
    """Raises: ConfigError naming every metric that is not in the table."""
    unknown = [n for n in names if n not in METRICS]
    if unknown:
        raise ConfigError(
            *(f"metrics: {n} is not a metric{did_you_mean(n, METRICS)}" for n in unknown),
            hint=f"there are: {', '.join(METRICS)}",
        )


def score(name: str, predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """Score pairs by the metric `name`.

    Raises: ValueError if there are no pairs, or not as many predictions as references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    metric = METRICS[name]
    examples = [metric.example(p, r) for p, r in zip(predictions, references, strict=True)]
    corpus = metric.corpus(predictions, references) if metric.corpus else fmean(examples)
    return Scores(corpus, examples)


def describe(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """`{metric: {scale, implementation}}`, to stand beside the numbers."""
    return {n: {"scale": METRICS[n].scale, "implementation": METRICS[n].implementation()} for n in names}
