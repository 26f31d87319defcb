"""Metrics: the numbers of the reference libraries, and of a pencil where there is no library."""

from __future__ import annotations

import random
from importlib.metadata import version
from statistics import fmean

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from src.config import EvalArgs
from src.errors import ConfigError
from src.eval.metrics import METRICS, Scores, check, describe, exact_match, jaccard, score
from src.model.tasks import TASKS

WORDS = [
    "feed",
    "rate",
    "SWEEP(",
    "7d,",
    "MEAN)",
    "été",
    "naïve",
    "数据",
    "🙂",
    "FLAG",
    "_x_",
    "4.6",
    "",
    " ",
    "\n",
]


def some_pairs(seed: int, count: int = 40) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.choice([0, 1, 2, 5, 12])))

    references = [text() for _ in range(count)]
    predictions = [r if draw.random() < 0.2 else text() for r in references]
    return ["", "", "a", *predictions], ["", "a", "", *references]


PAIRS = [some_pairs(seed) for seed in range(5)]


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_rouge_is_that_of_the_reference_library(kind: str, pairs: tuple[list[str], list[str]]) -> None:
    scorer = rouge_scorer.RougeScorer([kind], use_stemmer=False)
    expected = [scorer.score(r, p)[kind].fmeasure for p, r in zip(*pairs, strict=True)]
    assert score(kind, *pairs) == Scores(fmean(expected), expected)


@pytest.mark.parametrize("pairs", PAIRS)
def test_bleu_is_that_of_the_reference_library(pairs: tuple[list[str], list[str]]) -> None:
    predictions, references = pairs
    found = score("bleu", predictions, references)
    assert found.corpus == sacrebleu.corpus_bleu(predictions, [references]).score
    expected = [
        sacrebleu.sentence_bleu(p, [r], use_effective_order=True).score for p, r in zip(*pairs, strict=True)
    ]
    assert found.examples == expected


def test_bleu_names_the_signature_of_the_reference_library() -> None:
    metric = sacrebleu.BLEU()
    metric.corpus_score(["a b c d"], [["a b c d"]])
    assert describe(["bleu"])["bleu"] == {
        "scale": "0-100",
        "implementation": f"sacrebleu {metric.get_signature()}",
    }


def test_rouge_names_the_version_of_the_reference_library() -> None:
    about = describe(["rougeL"])["rougeL"]
    assert about["scale"] == "0-1"
    assert about["implementation"].startswith(f"rouge_score {version('rouge-score')} rougeL")


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("TOP(a)", "TOP(a)", 1.0),
        (" TOP(a)\n", "TOP(a)", 1.0),
        ("TOP( a)", "TOP(a)", 0.0),
        ("top(a)", "TOP(a)", 0.0),
        ("", "", 1.0),
        ("", "TOP(a)", 0.0),
        ("e\u0301", "\u00e9", 0.0),  # alike to the eye, and not the same text
    ],
)
def test_exact_match_is_the_same_text_white_space_at_the_ends_aside(
    prediction: str, reference: str, expected: float
) -> None:
    assert exact_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("TOP(a)", "TOP(a)", 1.0),
        ("TOP(a)", "TOP(b)", 3 / 5),  # TOP ( ) of TOP ( ) a b
        ("a a a b", "a b b", 1.0),  # sets: how often does not count
        ("b a", "a b", 1.0),  # nor the order
        ("SWEEP(feed_rate, 7d)", "SWEEP(feed_rate, 7d, MEAN)", 6 / 7),
        ("", "", 1.0),
        ("", "a", 0.0),
        (" \n", "", 1.0),
        ("été 🙂", "été", 1 / 2),
    ],
)
def test_jaccard_is_what_is_in_both_over_what_is_in_either(
    prediction: str, reference: str, expected: float
) -> None:
    assert jaccard(prediction, reference) == pytest.approx(expected)
    assert jaccard(reference, prediction) == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_scores_every_pair_within_its_scale(name: str) -> None:
    low, high = (float(x) for x in METRICS[name].scale.split("-"))
    for predictions, references in PAIRS:
        found = score(name, predictions, references)
        assert len(found.examples) == len(predictions)
        assert all(low <= value <= high + 1e-9 for value in [found.corpus, *found.examples])


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_gives_its_best_to_what_is_right(name: str) -> None:
    high = float(METRICS[name].scale.split("-")[1])
    text = "SWEEP(feed_rate, 7d, MEAN, BACK)"
    assert score(name, [text], [text]).corpus == pytest.approx(high)
    assert score(name, ["something else"], [text]).corpus < high / 10


def test_the_corpus_score_is_the_mean_where_no_other_is_defined() -> None:
    assert score("exact_match", ["a", "b", "x", "d"], ["a", "b", "c", "d"]) == Scores(0.75, [1, 1, 0, 1])


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_lists_of_different_lengths_have_no_score(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{len(predictions)} predictions for {len(references)} references"):
        score("exact_match", predictions, references)


def test_unknown_metrics_are_all_named_with_what_was_meant() -> None:
    with pytest.raises(ConfigError) as caught:
        check(["exact_matsch", "bleu", "meteor"])
    assert "exact_matsch is not a metric; did you mean exact_match?" in caught.value.problems[0]
    assert "meteor is not a metric" in caught.value.problems[1]
    assert len(caught.value.problems) == 2


def test_every_metric_is_asked_for_by_default_of_some_task() -> None:
    assert EvalArgs().metrics is None
    assert {name for task in TASKS.values() for name in task.metrics} == METRICS.keys()


def test_macro_f1_is_the_mean_of_the_labels_f1() -> None:
    # by hand: a 2*2/(2+3), b 2*1/(3+2), c predicted never 0, d real never 0
    found = score("f1_macro", ["a", "a", "b", "b", "b", "d"], ["a", "a ", "a", "b", "c", "b"])
    assert found.corpus == pytest.approx((4 / 5 + 2 / 5 + 0 + 0) / 4)
    assert found.examples == [1, 1, 0, 1, 0, 0]
    assert score("accuracy", ["a", "b"], ["a", "c"]) == Scores(0.5, [1, 0])
