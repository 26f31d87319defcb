"""Significance: intervals and p-values against closed forms, and error rates in simulated comparisons."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import sacrebleu

from bench.simulated import KINDS, improved
from src.eval import metric_functions
from src.eval.significance import (
    Comparison,
    PairedScores,
    compare,
    detectable,
    pair_means,
    pseudo_values,
    sacrebleu_p_value,
)

draw = np.random.default_rng(0)


def found(pair: PairedScores, confidence: float = 0.95, resamples: int = 4000, shift: float = 0.0) -> Comparison:
    return compare([pair], confidence=confidence, resamples=resamples, shift=shift)[0]


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution_where_there_are_many() -> None:
    base, tuned = draw.random(400), draw.random(400) + 0.1
    changes = tuned - base
    half = 1.96 * changes.std() / 20
    made = found(pair_means(base, tuned), resamples=10_000)
    assert made.difference == pytest.approx(changes.mean())
    assert (made.low, made.high) == pytest.approx((changes.mean() - half, changes.mean() + half), abs=0.1 * half)
    wider = found(pair_means(base, tuned), confidence=0.99)
    assert wider.low < made.low < made.high < wider.high


@pytest.mark.parametrize("changes", [[1, 1, 1, 1], [0.3, -0.1, 0.2, 0.2, 0.5, -0.4], [1, 0, 0, 1, -1, 1, 0, 1]])
def test_the_p_value_is_the_share_of_sign_flips_with_as_large_a_difference(changes: list[float]) -> None:
    flips = np.array(list(product([1, -1], repeat=len(changes)))) @ np.array(changes)
    exact = np.mean(np.abs(flips) >= abs(sum(changes)) - 1e-12)
    assert found(pair_means([0.0] * len(changes), changes)).p_value == pytest.approx(exact, abs=0.03)


def test_shift_is_the_difference_of_the_null_hypothesis() -> None:
    base, tuned = np.zeros(100), np.where(np.arange(100) < 30, 1.0, 0.0)
    assert found(pair_means(base, tuned)).p_value < 0.001
    assert found(pair_means(base, tuned), shift=0.29).p_value > 0.5
    assert found(pair_means(base, base), shift=-0.1).p_value < 0.001  # surely no worse by a tenth


def test_models_with_equal_scores_do_not_differ() -> None:
    scores = draw.random(50)
    made = found(pair_means(scores, scores, 1.0))
    assert (made.difference, made.low, made.high, made.p_value) == (0, 0, 0, 1)
    assert 0.1 < made.detectable < 0.25  # some eight changes of 50 would have been seen


def test_the_same_draws_give_the_same_and_another_seed_others() -> None:
    pair = pair_means(draw.random(30), draw.random(30))
    assert found(pair) == found(pair)
    one, other = (compare([pair], confidence=0.95, resamples=500, seed=s)[0] for s in (0, 1))
    assert one.low != other.low and one.difference == other.difference


def test_metrics_compared_together_give_the_same_as_alone() -> None:
    pairs = [pair_means(draw.random(30), draw.random(30)), KINDS["bleu"](draw, 30)]
    assert compare(pairs, confidence=0.9, resamples=300) == [found(p, 0.9, 300) for p in pairs]


def test_many_resamples_are_drawn_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_means(draw.random(50), draw.random(50) + 0.1)
    at_once = found(pair, resamples=1000)
    monkeypatch.setattr("src.eval.significance.CHUNK", 700)
    parts = found(pair, resamples=1000)
    assert (parts.low, parts.high) == pytest.approx((at_once.low, at_once.high), abs=0.02)


def test_pseudo_values_of_a_mean_are_its_differences_and_those_of_bleu_average_to_it() -> None:
    base, tuned = draw.random(40), draw.random(40)
    assert pseudo_values(pair_means(base, tuned)) == pytest.approx(tuned - base)
    pair = KINDS["bleu"](draw, 200)
    assert pseudo_values(pair).mean() == pytest.approx(pair.difference(), abs=0.5)


def test_the_detectable_difference_shrinks_with_examples_and_grows_with_confidence() -> None:
    few, many = (pair_means(np.zeros(n), np.resize([1.0, 0.0, -1.0, 0.0], n), 1.0) for n in (40, 400))
    assert detectable(few, 0.95) > 2.5 * detectable(many, 0.95)
    assert detectable(few, 0.99) > detectable(few, 0.95)


def test_a_scale_without_an_end_uses_the_spread_of_the_examples() -> None:
    scores = np.array([1.0, 5.0, 9.0, 3.0])
    assert detectable(pair_means(scores, scores), 0.95) > 1
    assert detectable(pair_means(np.ones(4), np.ones(4)), 0.95) == 0


def test_the_paired_test_of_sacrebleu_is_that_of_sacrebleu() -> None:
    texts = [" ".join(draw.choice(list("abcdef"), 9)) for _ in range(60)]
    worse = [" ".join(w if draw.random() < 0.6 else "x" for w in t.split()) for t in texts]
    better = [" ".join(w if draw.random() < 0.75 else "x" for w in t.split()) for t in texts]
    for name, scorer in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        theirs = sacrebleu_p_value(scorer, worse, better, texts, 500)
        test = sacrebleu.significance.PairedTest(
            [("a", worse), ("b", better)], {"x": scorer}, [texts], test_type="ar", n_samples=500
        )
        assert theirs == list(test()[1].values())[1][1].p_value
        count, score = getattr(metric_functions, f"{name}_counts"), getattr(metric_functions, name)
        columns = [
            np.array([count({"prediction": p, "reference": r}) for p, r in zip(made, texts, strict=True)])
            for made in (worse, better)
        ]
        assert found(PairedScores(*columns, score), resamples=2000).p_value == pytest.approx(theirs, abs=0.03)


def promoted(pairs: list[PairedScores]) -> float:
    made = compare(pairs, confidence=0.95, resamples=1000)
    return float(np.mean([f.low > 0 and f.p_value <= 0.05 for f in made]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [20, 60])
def test_equal_models_are_seldom_promoted(kind: str, examples: int) -> None:
    at_random = np.random.default_rng(examples)
    assert promoted([KINDS[kind](at_random, examples) for _ in range(400)]) <= 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [20, 60])
def test_the_detectable_difference_is_mostly_detected(kind: str, examples: int) -> None:
    at_random = np.random.default_rng(examples)
    alike = [KINDS[kind](at_random, examples) for _ in range(200)]
    better = [improved(kind, at_random, examples, detectable(pair, 0.95)) for pair in alike]
    assert promoted(better) >= 0.75  # 80 %, less what 200 tries leave to chance
