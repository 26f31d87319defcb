"""Whether two models differ by more than chance: interval, p-value, and the least difference that would be seen.

All of it works on sums. An example gives each model a vector of counts, a corpus score is a function of the
summed vectors (measures.py), and a mean is such a function too: of the sum of the scores and their number. A
resampled corpus is then a row of weights times a matrix, whatever the metric. See docs/gate.md for the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import log2
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from src.eval.metric_functions import Floats, ratio

CHUNK = 2_000_000  # weights drawn at once: 16 MB
POWER = 0.85  # planned for, so that the 80 % that are promised hold where the variance is an estimate
SCORERS = {"bleu": BLEU, "chrf": CHRF}  # metrics with a paired test of their library's own
SWAPS, FLIPS = "paired randomisation", "sign flips of the examples' shares"


class PairedScores(NamedTuple):
    """Two models on the same examples, by one metric.

    base, tuned: (examples, counts). corpus: from sums (..., counts) to scores (...).
    largest: the most that one example's score could change, where the scale says that.
    """

    base: Floats
    tuned: Floats
    corpus: Callable[[Floats], Floats]
    largest: float | None = None

    def difference(self) -> float:
        return float(self.corpus(self.tuned.sum(0)) - self.corpus(self.base.sum(0)))


class Comparison(NamedTuple):
    """How tuned differs from base: tuned less base, in the metric's units.

    low, high: the interval of the difference. p_value: two-sided, of a difference of `shift` (0 where none was
    asked for). detectable: the smallest difference that would have been seen with a power of 80 %.
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
    """The scores of examples, whose mean is the corpus score."""
    columns = [np.column_stack([scores, np.ones(len(scores))]) for scores in (base, tuned)]
    return PairedScores(columns[0], columns[1], ratio, largest)


def compare(
    pairs: Sequence[PairedScores], *, confidence: float, resamples: int, seed: int = 0, shift: float = 0.0
) -> list[Comparison]:
    """What is found of each of `pairs`, all of the same examples, under the same draws.

    shift: the difference that the p-value stands against.
    Deterministic: the draws depend on `seed`, the number of examples and `resamples` alone.
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
    """What each example has in the difference, shape (examples,); their mean is about the difference.

    Jackknife pseudo-values, n D - (n - 1) D_i with D_i the difference without example i (Tukey 1958; Efron and
    Tibshirani 1993, chapter 11). Of a mean they are the differences of the examples' scores.
    """
    n = len(pair.base)
    without = pair.corpus(pair.tuned.sum(0) - pair.tuned) - pair.corpus(pair.base.sum(0) - pair.base)
    return n * pair.difference() - (n - 1) * without


def detectable(pair: PairedScores, confidence: float) -> float:
    """The smallest true difference that as many examples, varying like these, promote with a power of 80 %.

    An effect brings variance of its own: where it is d because a share d/g of the examples change by g, the
    variance grows by d (g - d). Hence the fixed point d = (z_a + z_b) sqrt((s^2 + d (g - d)) / n). And so many
    examples must have changed that the randomisation test can pass at all: a Poisson number of them, whose mean
    is a floor of d n / g. One example that changes as much as any can is added to those seen: it stands for
    what was not seen by chance, and gives an answer where nothing changed.
    """
    found = pseudo_values(pair)
    n = len(found)
    largest = pair.largest if pair.largest is not None else _spread(pair)
    squares, sizes = float((found**2).sum()) + largest**2, float(np.abs(found).sum()) + largest
    if not sizes:
        return 0.0  # a scale without an end, on which not even the examples differ
    g = squares / sizes
    variance = squares / n - float(found.mean()) ** 2
    z = NormalDist().inv_cdf((1 + confidence) / 2) + NormalDist().inv_cdf(POWER)
    # d^2 (1 + c) - d c g - c s^2 = 0 with c = z^2 / n
    c = z * z / n
    solved = (c * g + (c * c * g * g + 4 * (1 + c) * c * variance) ** 0.5) / (2 * (1 + c))
    return max(solved, _fewest_changed(confidence) * g / n)


def _spread(pair: PairedScores) -> float:
    """How far examples of the base lie apart, as two that were drawn at random do."""
    alone = PairedScores(np.zeros_like(pair.base), pair.base, pair.corpus)
    return float(np.std(pseudo_values(alone))) * 2**0.5


def _fewest_changed(confidence: float) -> float:
    """The mean of a Poisson number that reaches, with a probability of POWER, the fewest changes that can pass.

    m examples that all changed for the better have a two-sided p-value of 2^(1-m).
    """
    fewest = int(np.ceil(1 - log2(1 - confidence)))
    return _poisson_mean(fewest)


@cache
def _poisson_mean(fewest: int) -> float:
    """The mean at which a Poisson number is `fewest` or more with a probability of POWER."""
    low, high = 0.0, 10.0 * (fewest + 1)
    for _ in range(60):
        mean = (low + high) / 2
        term, below = np.exp(-mean), 0.0
        for k in range(fewest):
            below += term
            term *= mean / (k + 1)
        low, high = (mean, high) if 1 - below < POWER else (low, mean)
    return high


def _shifted(pair: PairedScores, shift: float) -> PairedScores:
    """The shares of the examples, less `shift`, against nothing."""
    found = pseudo_values(pair) - shift
    return pair_means(np.zeros_like(found), found)


def _intervals(
    pairs: Sequence[PairedScores], confidence: float, resamples: int, draw: np.random.Generator
) -> tuple[Floats, Floats]:
    """Percentile intervals of the paired bootstrap over examples (Efron 1979; Koehn 2004, W04-3250)."""
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
    """Two-sided p-values of the paired randomisation test: models swapped, example by example, at random.

    Of means this flips signs (Fisher 1935); of other scores it is approximate randomisation (Noreen 1989; Riezler
    and Maxwell 2005, W05-0908). Ties count, and so does what was observed (Phipson and Smyth 2010): where the
    two models are exchangeable, p <= a has a probability of at most a, at any number of examples.
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
    metric: str, base: Sequence[str], tuned: Sequence[str], references: Sequence[str], resamples: int
) -> float:
    """The two-sided p-value of sacrebleu's own paired approximate randomisation."""
    test = PairedTest(
        [("base", list(base)), ("tuned", list(tuned))],
        {metric: SCORERS[metric]()},
        [list(references)],
        test_type="ar",
        n_samples=resamples,
    )
    _, scores = test()
    column: list[Any] = next(values for name, values in scores.items() if name != "System")
    return float(column[1].p_value)
