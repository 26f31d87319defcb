"""Whether two models differ by more than chance: confidence interval, p-value and smallest detectable difference.

Everything is computed from sums. Each example has a vector of counts for each model, and a corpus score is a
function of the summed vectors (metric_functions.py); a mean is one too, of the sum of the scores and their number.
A resampled corpus is then a row of weights times the matrix of counts, for every metric. docs/gate.md has the
sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import log2
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.significance import PairedTest

from .metric_functions import Floats, ratio

CHUNK = 2_000_000  # weights drawn at once: 16 MB
POWER = 0.85  # used in place of the documented 0.80, as the variance is only an estimate
SWAPS, FLIPS = "paired randomisation", "sign flips of the examples' shares"


class PairedScores(NamedTuple):
    """The counts of two models on the same examples, for one metric.

    base, tuned: (examples, counts).
    corpus: maps sums, (..., counts), to corpus scores, (...).
    largest: how much the score of one example can change at most, or None where the scale has no end.
    """

    base: Floats
    tuned: Floats
    corpus: Callable[[Floats], Floats]
    largest: float | None = None

    def difference(self) -> float:
        return float(self.corpus(self.tuned.sum(0)) - self.corpus(self.base.sum(0)))


class Comparison(NamedTuple):
    """The difference tuned - base of a corpus score, in the metric's units.

    low, high: the confidence interval of the difference.
    p_value: two-sided, of the null hypothesis that the difference is `shift` (see `compare`).
    test: the name of the test.
    detectable: the smallest true difference that is detected with a power of 80 %.
    """

    base: float
    tuned: float
    difference: float
    low: float
    high: float
    p_value: float
    test: str
    examples: int
    detectable: float


def pair_means(
    base: Sequence[float] | Floats, tuned: Sequence[float] | Floats, largest: float | None = None
) -> PairedScores:
    """Pair the scores of examples whose mean is the corpus score; `base` and `tuned` are (examples,)."""
    columns = [np.column_stack([scores, np.ones(len(scores))]) for scores in (base, tuned)]
    return PairedScores(columns[0], columns[1], ratio, largest)


def compare(
    pairs: Sequence[PairedScores], *, confidence: float, resamples: int, seed: int = 0, shift: float = 0.0
) -> list[Comparison]:
    """Compare the models by each of `pairs`, which hold the same examples, with the same random draws.

    Args:
        confidence: of the intervals, such as 0.95.
        resamples: bootstrap samples, and draws of the randomisation test.
        shift: the difference under the null hypothesis.

    Deterministic: the draws depend only on `seed`, `resamples` and the number of examples.
    """
    examples = len(pairs[0].base)
    tested = [_shifted(pair, shift) if shift else pair for pair in pairs]
    low, high = _intervals(pairs, confidence, resamples, np.random.default_rng([seed, 0]))
    p_values = _p_values(tested, resamples, np.random.default_rng([seed, 1]))
    return [
        Comparison(
            base=float(pair.corpus(pair.base.sum(0))),
            tuned=float(pair.corpus(pair.tuned.sum(0))),
            difference=pair.difference(),
            low=float(low[i]),
            high=float(high[i]),
            p_value=float(p_values[i]),
            test=FLIPS if shift else SWAPS,
            examples=examples,
            detectable=detectable(pair, confidence),
        )
        for i, pair in enumerate(pairs)
    ]


def pseudo_values(pair: PairedScores) -> Floats:
    """The contribution of each example to the difference, (examples,); their mean approximates the difference.

    Jackknife pseudo-values: n D - (n - 1) D_i, where D_i is the difference without example i (Tukey 1958; Efron
    and Tibshirani 1993, chapter 11). For a mean they are the differences of the examples' scores.
    """
    n = len(pair.base)
    without = pair.corpus(pair.tuned.sum(0) - pair.tuned) - pair.corpus(pair.base.sum(0) - pair.base)
    return n * pair.difference() - (n - 1) * without


def detectable(pair: PairedScores, confidence: float) -> float:
    """The minimum detectable difference: promoted with 80 % power, given this number of examples and variance.

    An effect d adds variance: if a share d/g of the examples changes by g, the variance grows by d (g - d). This
    gives the fixed point d = (z_a + z_b) sqrt((s^2 + d (g - d)) / n). The result is bounded below by what the
    randomisation test needs: the number of changed examples is Poisson with mean d n / g, and must be large enough
    for the test to pass. One maximally changed pseudo-example is added, so that the bound is defined when nothing
    changed.
    """
    values = pseudo_values(pair)
    n = len(values)
    largest = pair.largest if pair.largest is not None else _spread(pair)
    squares, sizes = float((values**2).sum()) + largest**2, float(np.abs(values).sum()) + largest
    if not sizes:
        return 0.0  # a scale without an end, and examples with equal scores
    g = squares / sizes
    variance = squares / n - float(values.mean()) ** 2
    z = NormalDist().inv_cdf((1 + confidence) / 2) + NormalDist().inv_cdf(POWER)
    # d^2 (1 + c) - d c g - c s^2 = 0 with c = z^2 / n
    c = z * z / n
    solved = (c * g + (c * c * g * g + 4 * (1 + c) * c * variance) ** 0.5) / (2 * (1 + c))
    return max(solved, _min_changed(confidence) * g / n)


def _spread(pair: PairedScores) -> float:
    """The standard deviation of the difference between two random examples of the base."""
    alone = PairedScores(np.zeros_like(pair.base), pair.base, pair.corpus)
    return float(np.std(pseudo_values(alone))) * 2**0.5


def _min_changed(confidence: float) -> float:
    """The expected number of changed examples for which the randomisation test has the power POWER.

    If m examples changed, all for the better, the two-sided p-value is 2^(1-m).
    """
    return _poisson_mean(int(np.ceil(1 - log2(1 - confidence))))


@cache
def _poisson_mean(least: int) -> float:
    """The mean of the Poisson distribution that gives `least` or more with a probability of POWER (bisection)."""
    low, high = 0.0, 10.0 * (least + 1)
    for _ in range(60):
        mean = (low + high) / 2
        term, below = np.exp(-mean), 0.0
        for k in range(least):
            below += term
            term *= mean / (k + 1)
        low, high = (mean, high) if 1 - below < POWER else (low, mean)
    return high


def _shifted(pair: PairedScores, shift: float) -> PairedScores:
    """The pseudo-values minus `shift`, paired with zeros."""
    values = pseudo_values(pair) - shift
    return pair_means(np.zeros_like(values), values)


def _intervals(
    pairs: Sequence[PairedScores], confidence: float, resamples: int, draw: np.random.Generator
) -> tuple[Floats, Floats]:
    """Percentile intervals, (pairs,) each, of the paired bootstrap (Efron 1979; Koehn 2004, W04-3250)."""
    n = len(pairs[0].base)
    differences = np.empty((resamples, len(pairs)))
    for part in _parts(resamples, n):
        size = part.stop - part.start
        drawn = draw.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(float)
        for i, pair in enumerate(pairs):
            differences[part, i] = pair.corpus(weights @ pair.tuned) - pair.corpus(weights @ pair.base)
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def _p_values(pairs: Sequence[PairedScores], resamples: int, draw: np.random.Generator) -> Floats:
    """Two-sided p-values, (pairs,), of the paired randomisation test, which swaps the models at random by example.

    For means it flips signs (Fisher 1935); for other scores it is approximate randomisation (Noreen 1989; Riezler
    and Maxwell 2005, W05-0908). Ties and the observed difference count (Phipson and Smyth 2010): if the two models
    are exchangeable, p <= a has a probability of at most a, for any number of examples.
    """
    n = len(pairs[0].base)
    least = np.array([abs(pair.difference()) for pair in pairs]) * (1 - 1e-9)
    reached = np.ones(len(pairs))
    for part in _parts(resamples, n):
        swapped = draw.integers(2, size=(part.stop - part.start, n), dtype=np.int8).astype(float)
        for i, pair in enumerate(pairs):
            moved = swapped @ (pair.tuned - pair.base)
            found = pair.corpus(pair.tuned.sum(0) - moved) - pair.corpus(pair.base.sum(0) + moved)
            reached[i] += np.count_nonzero(np.abs(found) >= least[i])
    return reached / (resamples + 1)


def _parts(resamples: int, n: int) -> Iterator[slice]:
    step = max(1, CHUNK // n)
    return (slice(start, min(start + step, resamples)) for start in range(0, resamples, step))


def sacrebleu_p_value(
    scorer: Any, base: Sequence[str], tuned: Sequence[str], references: Sequence[str], resamples: int
) -> float:
    """The two-sided p-value of sacrebleu's paired approximate randomisation, for its metric `scorer`."""
    test = PairedTest(
        [("base", list(base)), ("tuned", list(tuned))],
        {"metric": scorer},
        [list(references)],
        test_type="ar",
        n_samples=resamples,
    )
    _, scores = test()
    column: list[Any] = next(values for name, values in scores.items() if name != "System")
    return float(column[1].p_value)
