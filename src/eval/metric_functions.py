"""The formulas of the metrics: scores of one pair of texts, and sums of which a corpus score is made.

A corpus score that is no mean of its examples (BLEU, chrF, perplexity, ...) is a function of sums: each example
gives a vector of counts, and the function takes their sum. It takes many sums at once, shape (..., counts), so
that ten thousand resamples of a corpus cost one call.
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

CHRF_ORDER, CHRF_BETA = 6, 2  # Popovic (2016), "chrF deconstructed": the order and weight that sacrebleu takes
LARGEST_EXPONENT = 700.0  # e^709 is the largest that a float holds


def tokens(text: str) -> list[str]:
    """Words, and single characters that are neither word nor white space."""
    return re.findall(r"\w+|[^\w\s]", text)


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same text, white space at either end aside."""
    return float(prediction.strip() == reference.strip())


def jaccard(prediction: str, reference: str) -> float:
    """Distinct tokens in both over distinct tokens in either (Jaccard, 1912); two empty texts are alike."""
    a, b = set(tokens(prediction)), set(tokens(reference))
    return len(a & b) / len(a | b) if a | b else 1.0


def token_f1(prediction: str, reference: str) -> float:
    """F1 = 2 c / (p + r) of c tokens in common, each as often as it occurs; two empty texts are alike.

    The F1 of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1), but of `tokens` as they stand: SQuAD
    drops case, punctuation and articles, which carry the meaning of a formula.
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
    """Tokens of the prediction and of the reference, then n-grams in common and n-grams predicted, n = 1 to 4."""
    made = _bleu_of(row["prediction"], row["reference"])
    return [made.sys_len, made.ref_len, *made.counts, *made.totals]


def bleu(sums: Floats) -> Floats:
    """Corpus BLEU, 0-100, of summed `bleu_counts`: sacrebleu's, with its smoothing `exp`.

    Papineni et al. (2002), P02-1040; the k-th order without a match counts 1/2^k n-grams (Chen and Cherry 2014,
    W14-3346, method 3). No prediction of four tokens, or no match at all, is 0.
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
    """Character n-grams predicted, of the reference, and in common, for n = 1 to 6."""
    a, b = (extract_all_char_ngrams(row[k], CHRF_ORDER, False) for k in ("prediction", "reference"))
    counts = ((p.total() if r else 0, r.total(), (p & r).total()) for p, r in zip(a, b, strict=True))
    return [float(x) for order in counts for x in order]


def chrf(sums: Floats) -> Floats:
    """Corpus chrF, 0-100, of summed `chrf_counts`: sacrebleu's.

    F_2 of precision and recall, each the mean over the orders that both texts have (Popovic 2015, W15-3049).
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
    """Tokens predicted for each token of the reference; an empty reference counts as one token."""
    return len(tokens(prediction)) / max(len(tokens(reference)), 1)


def length_counts(row: Row) -> list[float]:
    return [float(len(tokens(row[key]))) for key in ("prediction", "reference")]


def ratio(sums: Floats) -> Floats:
    """The first sum over the second."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def perplexity_of(row: Row) -> float:
    return math.exp(min(row["reference_nll"] / max(row["reference_tokens"], 1), LARGEST_EXPONENT))


def nll_counts(row: Row) -> list[float]:
    return [float(row["reference_nll"]), float(row["reference_tokens"])]


def perplexity(sums: Floats) -> Floats:
    """e to the mean negative log-likelihood of a token, in nats: long references weigh more."""
    return np.exp(np.minimum(ratio(sums), LARGEST_EXPONENT))


def hit_counts(row: Row) -> list[float]:
    return [float(row["reference_hits"]), float(row["reference_tokens"])]


def hits_of(row: Row) -> float:
    return float(row["reference_hits"]) / max(row["reference_tokens"], 1)


def label_counts(rows: Sequence[Row]) -> list[list[float]]:
    """For each label of the rows, sorted: whether it was chosen rightly, chosen, and right."""
    pairs = [(row["prediction"].strip(), row["reference"].strip()) for row in rows]
    labels = sorted({label for pair in pairs for label in pair})
    return [[float(x) for n in labels for x in (p == r == n, p == n, r == n)] for p, r in pairs]


def f1_macro(sums: Floats) -> Floats:
    """The mean over the labels of F1 = 2 TP / (2 TP + FP + FN), each label counting the same.

    Labels are those that occur in references or predictions; as in Opitz and Burst (2019,
    arXiv:1911.03347), "averaged F1", and as scikit-learn computes `f1_score(average="macro")`.
    """
    right, chosen, real = (sums[..., i::3] for i in range(3))
    occurring = (chosen + real > 0).sum(-1)
    return (2 * right / np.maximum(chosen + real, 1)).sum(-1) / np.maximum(occurring, 1)
