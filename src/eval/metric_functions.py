"""The formulas of the metrics: scores of one row, and corpus scores as functions of summed counts.

A corpus score that is not the mean of its examples (BLEU, chrF, perplexity, ...) is a function of sums: each
example has a vector of counts, and the function takes their sum. It maps sums, (..., counts), to scores, (...), so
that ten thousand resamples of a corpus are one call.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rouge_score import rouge_scorer
from sacrebleu.metrics.bleu import BLEU, BLEUScore
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.helpers import extract_all_char_ngrams

Floats = NDArray[np.float64]
Row = Mapping[str, Any]

CHRF_ORDER, CHRF_BETA = 6, 2  # as in sacrebleu, after Popovic (2016), "chrF deconstructed"
LARGEST_EXPONENT = 700.0  # exp(709) is about the largest float


def tokens(text: str) -> list[str]:
    """Words, and single characters that are neither word nor white space."""
    return re.findall(r"\w+|[^\w\s]", text)


def exact_match(prediction: str, reference: str) -> float:
    """1 if both texts are equal, apart from white space at the ends."""
    return float(prediction.strip() == reference.strip())


def jaccard(prediction: str, reference: str) -> float:
    """Distinct tokens in both texts over distinct tokens in either (Jaccard 1912); 1 for two empty texts."""
    a, b = set(tokens(prediction)), set(tokens(reference))
    return len(a & b) / len(a | b) if a | b else 1.0


def token_f1(prediction: str, reference: str) -> float:
    """F1 = 2 c / (p + r) for c tokens in common, counted as often as they occur; 1 for two empty texts.

    The F1 of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1) without its normalisation: SQuAD drops
    case, punctuation and articles, which carry the meaning of a formula.
    """
    a, b = Counter(tokens(prediction)), Counter(tokens(reference))
    return 2 * (a & b).total() / (a.total() + b.total()) if a or b else 1.0


def rouge(kind: str, prediction: str, reference: str) -> float:
    return float(_rouge_scorer(kind).score(reference, prediction)[kind].fmeasure)


@cache
def _rouge_scorer(kind: str) -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer([kind], use_stemmer=False)


def sentence_bleu(prediction: str, reference: str) -> float:
    return float(_bleu_of(prediction, reference).score)


def _bleu_of(prediction: str, reference: str) -> BLEUScore:
    return _sentence_scorer().sentence_score(prediction, [reference])


@cache
def _sentence_scorer() -> BLEU:
    return BLEU(effective_order=True)


def bleu_counts(row: Row) -> list[float]:
    """Tokens of prediction and reference, then n-grams in common and n-grams predicted, for n = 1 to 4."""
    made = _bleu_of(row["prediction"], row["reference"])
    return [made.sys_len, made.ref_len, *made.counts, *made.totals]


def bleu(sums: Floats) -> Floats:
    """Corpus BLEU, 0-100, from summed `bleu_counts`, as sacrebleu computes it with its smoothing `exp`.

    Papineni et al. (2002), P02-1040. The k-th order without a match counts 1/2^k n-grams (Chen and Cherry 2014,
    W14-3346, method 3). The score is 0 if no prediction has four tokens, or nothing matches.
    """
    predicted, wanted = sums[..., 0], sums[..., 1]
    common, total = sums[..., 2:6], sums[..., 6:10]
    counted = np.where(common > 0, common, 0.5 ** np.cumsum(common == 0, axis=-1))
    scored = (common > 0).any(-1) & (total > 0).all(-1)
    logs = np.log(counted) - np.log(np.maximum(total, 1))
    brevity = np.minimum(0, 1 - wanted / np.maximum(predicted, 1))
    return np.where(scored, 100 * np.exp(brevity + logs.mean(-1)), 0.0)


def sentence_chrf(prediction: str, reference: str) -> float:
    return float(_chrf_scorer().sentence_score(prediction, [reference]).score)


@cache
def _chrf_scorer() -> CHRF:
    return CHRF(char_order=CHRF_ORDER, beta=CHRF_BETA)


def chrf_counts(row: Row) -> list[float]:
    """Character n-grams of the prediction, of the reference and in common, for n = 1 to 6."""
    a, b = (extract_all_char_ngrams(row[k], CHRF_ORDER, False) for k in ("prediction", "reference"))
    counts = ((p.total() if r else 0, r.total(), (p & r).total()) for p, r in zip(a, b, strict=True))
    return [float(x) for order in counts for x in order]


def chrf(sums: Floats) -> Floats:
    """Corpus chrF, 0-100, from summed `chrf_counts`, as sacrebleu computes it.

    F_2 of precision and recall, each averaged over the orders that both texts have (Popovic 2015, W15-3049).
    """
    predicted, wanted, common = (sums[..., i::3] for i in range(3))
    both = (predicted > 0) & (wanted > 0)
    orders = np.maximum(both.sum(-1), 1)
    precision, recall = (
        (np.where(both, common, 0) / np.maximum(n, 1)).sum(-1) / orders for n in (predicted, wanted)
    )
    weight = CHRF_BETA**2
    weighted = weight * precision + recall
    return 100 * (1 + weight) * precision * recall / np.where(weighted > 0, weighted, 1)


def length_ratio(prediction: str, reference: str) -> float:
    """Predicted tokens per token of the reference; an empty reference counts as one token."""
    return len(tokens(prediction)) / max(len(tokens(reference)), 1)


def length_counts(row: Row) -> list[float]:
    return [float(len(tokens(row[key]))) for key in ("prediction", "reference")]


def ratio(sums: Floats) -> Floats:
    """The first sum over the second."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def row_perplexity(row: Row) -> float:
    return math.exp(min(row["reference_nll"] / max(row["reference_tokens"], 1), LARGEST_EXPONENT))


def nll_counts(row: Row) -> list[float]:
    return [float(row["reference_nll"]), float(row["reference_tokens"])]


def perplexity(sums: Floats) -> Floats:
    """exp of the mean negative log-likelihood of a token in nats, so that long references weigh more."""
    return np.exp(np.minimum(ratio(sums), LARGEST_EXPONENT))


def hit_counts(row: Row) -> list[float]:
    return [float(row["reference_hits"]), float(row["reference_tokens"])]


def row_token_accuracy(row: Row) -> float:
    return float(row["reference_hits"]) / max(row["reference_tokens"], 1)


def label_counts(rows: Sequence[Row]) -> list[list[float]]:
    """For each label of all rows, sorted: whether it is a true positive, predicted, and the reference."""
    pairs = [(row["prediction"].strip(), row["reference"].strip()) for row in rows]
    labels = sorted({label for pair in pairs for label in pair})
    return [[float(x) for n in labels for x in (p == r == n, p == n, r == n)] for p, r in pairs]


def f1_macro(sums: Floats) -> Floats:
    """The unweighted mean of F1 = 2 TP / (2 TP + FP + FN) over the labels in references or predictions.

    "Averaged F1" of Opitz and Burst (2019, arXiv:1911.03347), and `f1_score(average="macro")` of scikit-learn.
    """
    true_positives, predicted, actual = (sums[..., i::3] for i in range(3))
    labels = (predicted + actual > 0).sum(-1)
    return (2 * true_positives / np.maximum(predicted + actual, 1)).sum(-1) / np.maximum(labels, 1)
