"""Two equal models, or one that is better by a known difference, drawn at random.

If they are equal, both are drawn from the same distribution, example by example. An improvement is an
effect on some of the examples, or a small one on all, scaled to the requested true difference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from src.eval import metric_functions
from src.eval.metric_functions import Floats
from src.eval.significance import PairedScores, pair_means

Kind = Callable[[Generator, int], PairedScores]
TOKENS = 12  # of an example's reference, about


def binary(draw: Generator, examples: int, changed: float) -> PairedScores:
    """0 or 1, of which a share `changed` differs between the two."""
    base = (draw.random(examples) < 0.5).astype(float)
    return pair_means(base, np.where(draw.random(examples) < changed, 1 - base, base), 1.0)


def overlap(draw: Generator, examples: int) -> PairedScores:
    """Like rougeL: between 0 and 1, often either, correlated between the models and often the same."""
    kept = draw.beta(0.6, 0.6, examples)
    base, tuned = (np.clip(np.round((kept + draw.normal(0, 0.25, examples)) * 20) / 20, 0, 1) for _ in range(2))
    return pair_means(base, np.where(draw.random(examples) < 0.3, base, tuned), 1.0)


def bleu(draw: Generator, examples: int, better: float = 0.0) -> PairedScores:
    """Counts of n-grams of texts whose tokens are right at random, those of tuned by `better` more often."""
    lengths = np.maximum(draw.poisson(TOKENS, examples), 4)
    rates = draw.beta(4, 2, examples)
    base, tuned = (_counts(draw, lengths, chance) for chance in (rates, rates + (1 - rates) * better))
    return PairedScores(base, tuned, metric_functions.bleu, 100.0)


def _counts(draw: Generator, lengths: NDArray[np.int64], chance: Floats) -> Floats:
    """Like metric_functions.bleu_counts, for texts of right and wrong tokens: an n-gram needs all its tokens."""
    present = np.arange(lengths.max() + 3) < lengths[:, None]
    right = present & (draw.random(present.shape) < chance[:, None])
    windows = np.ones((4, *right[:, 3:].shape), dtype=bool)
    for order in range(4):
        for k in range(order + 1):
            windows[order] &= right[:, k : k + windows.shape[2]]
    totals = [lengths - k for k in range(4)]
    return np.column_stack([lengths, lengths, *windows.sum(2), *totals]).astype(float)


KINDS: dict[str, Kind] = {
    "sparse 0/1": partial(binary, changed=0.04),
    "dense 0/1": partial(binary, changed=0.4),
    "rougeL-like": overlap,
    "bleu": bleu,
}


def improved(kind: str, draw: Generator, examples: int, effect: float) -> PairedScores:
    """A pair of which the tuned model is truly better by `effect`."""
    if kind == "bleu":
        return bleu(draw, examples, _better_by(effect))
    pair = KINDS[kind](draw, examples)
    base, tuned = pair.base[:, 0].copy(), pair.tuned[:, 0].copy()
    size = 1.0 if kind.endswith("0/1") else 0.5
    better = draw.random(examples) < effect / size  # these go from worst to better by `size`
    base[better], tuned[better] = 0.0, size
    return pair_means(base, tuned, 1.0)


def _better_by(effect: float) -> float:
    """The `better` of bleu() that makes a difference of `effect`, by a line through differences drawn."""
    steps, made = _line()
    return float(np.interp(effect, made, steps))


@cache
def _line() -> tuple[Floats, Floats]:
    draw = np.random.default_rng(7)
    steps = np.linspace(0, 1, 21)
    made = np.array([bleu(draw, 20_000, float(step)).difference() for step in steps])
    return steps, np.maximum.accumulate(made)
