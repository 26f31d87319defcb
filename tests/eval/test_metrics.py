"""Metrics: the numbers of the reference libraries, or figures worked out by hand where there is no library."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from src.errors import ConfigError
from src.eval.metric_functions import exact_match, jaccard, token_f1
from src.eval.metrics import METRICS, Scores, check, describe, needs_references, score, score_rows, try_on
from src.eval.setup import default_metrics
from src.model.tasks import TASKS
from src.schema import EvalArgs, Task

ROOT = Path(__file__).resolve().parents[2]
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

Row = dict[str, Any]


def row(prediction: str, reference: str, nll: float = 2.0, tokens: int = 4, hits: int = 3) -> Row:
    found: Row = {"prediction": prediction, "reference": reference}
    return found | {"reference_nll": nll, "reference_tokens": tokens, "reference_hits": hits}


def some_rows(seed: int, count: int = 40) -> list[Row]:
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.choice([0, 1, 2, 5, 12])))

    references = [text() for _ in range(count)]
    pairs = [("", ""), ("", "a"), ("a", ""), *((r if draw.random() < 0.2 else text(), r) for r in references)]
    sizes = [draw.randint(1, 9) for _ in pairs]
    return [
        row(p, r, draw.expovariate(0.3), n, draw.randint(0, n)) for (p, r), n in zip(pairs, sizes, strict=True)
    ]


def texts(rows: list[Row]) -> tuple[list[str], list[str]]:
    return [r["prediction"] for r in rows], [r["reference"] for r in rows]


ROWS = [some_rows(seed) for seed in range(5)]


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
@pytest.mark.parametrize("rows", ROWS)
def test_rouge_is_that_of_the_reference_library(kind: str, rows: list[Row]) -> None:
    scorer = rouge_scorer.RougeScorer([kind], use_stemmer=False)
    expected = [scorer.score(r["reference"], r["prediction"])[kind].fmeasure for r in rows]
    assert score(kind, rows) == Scores(fmean(expected), expected, None)


@pytest.mark.parametrize("rows", [*ROWS, *([r] for r in ROWS[0]), ROWS[0][:6]])
def test_bleu_and_chrf_are_those_of_the_reference_library(rows: list[Row]) -> None:
    predictions, references = texts(rows)
    found = score("bleu", rows)
    assert found.corpus == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score, abs=1e-9)
    assert found.examples == [
        sacrebleu.sentence_bleu(p, [r], use_effective_order=True).score
        for p, r in zip(predictions, references, strict=True)
    ]
    found = score("chrf", rows)
    assert found.corpus == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score, abs=1e-9)
    assert found.examples == [
        sacrebleu.sentence_chrf(p, [r]).score for p, r in zip(predictions, references, strict=True)
    ]


def test_bleu_and_chrf_name_the_signature_of_the_reference_library() -> None:
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        metric.corpus_score(["a b c d"], [["a b c d"]])
        assert describe([name])[name] == {
            "scale": "0-100",
            "implementation": f"sacrebleu {metric.get_signature()}",
            "better": "higher",
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
    ("prediction", "reference", "overlap", "f1"),
    [
        ("TOP(a)", "TOP(a)", 1.0, 1.0),
        ("TOP(a)", "TOP(b)", 3 / 5, 3 / 4),  # TOP ( ) of TOP ( ) a b
        ("a a a b", "a b b", 1.0, 4 / 7),  # of sets how often does not count, of bags it does
        ("b a", "a b", 1.0, 1.0),  # nor the order
        ("Top", "top", 0.0, 0.0),
        ("SWEEP(feed_rate, 7d)", "SWEEP(feed_rate, 7d, MEAN)", 6 / 7, 12 / 14),
        ("", "", 1.0, 1.0),
        ("", "a", 0.0, 0.0),
        (" \n", "", 1.0, 1.0),
        ("été 🙂", "été", 1 / 2, 2 / 3),
    ],
)
def test_overlap_of_tokens_as_sets_and_as_bags(prediction: str, reference: str, overlap: float, f1: float) -> None:
    for a, b in ((prediction, reference), (reference, prediction)):
        assert jaccard(a, b) == pytest.approx(overlap)
        assert token_f1(a, b) == pytest.approx(f1)


def limits(name: str) -> tuple[float, float]:
    low, _, high = METRICS[name].scale.rpartition("-")
    return (float(low), float(high)) if low else (float(METRICS[name].scale.removeprefix("from ")), math.inf)


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_scores_every_row_within_its_scale(name: str) -> None:
    low, high = limits(name)
    for rows in ROWS:
        found = score(name, rows)
        assert found.examples and len(found.examples) == len(rows)
        assert all(low <= value <= high + 1e-9 for value in [found.corpus, *found.examples])


@pytest.mark.parametrize("name", METRICS)
def test_the_sums_over_the_examples_give_the_corpus_score(name: str) -> None:
    metric = METRICS[name]
    for rows in ROWS:
        found = score(name, rows)
        if metric.corpus is None:
            assert found.statistics is None
            assert found.corpus == pytest.approx(fmean(found.examples or []), abs=1e-12)
            continue
        sums = np.array(found.statistics).sum(0)
        assert metric.corpus(sums) == pytest.approx(found.corpus, abs=1e-9)
        some = np.array(found.statistics)[:20].sum(0)
        part = score(name, rows[:20]).corpus
        assert metric.corpus(np.stack([[sums, some], [some, sums]])) == pytest.approx(
            np.array([[found.corpus, part], [part, found.corpus]])
        )


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_gives_its_best_score_to_the_reference(name: str) -> None:
    text = "sweep(rate='feed', days=7, back=True)"  # a call too
    right, wrong = (
        score(name, [row(text, text, 0.0, 5, 5)]).corpus,
        score(name, [row("something else", text, 50, 5, 0)]).corpus,
    )
    if METRICS[name].better == "higher":
        assert right == pytest.approx(limits(name)[1]) and wrong < right
    elif METRICS[name].better == "lower":
        assert right == pytest.approx(limits(name)[0]) and wrong > right


def test_perplexity_token_accuracy_and_length_are_of_the_corpus() -> None:
    rows = [row("a b", "a", nll=2.0, tokens=1, hits=0), row("a", "a b c", nll=1.0, tokens=5, hits=4)]
    assert score("perplexity", rows) == Scores(
        pytest.approx(math.exp(3 / 6)), pytest.approx([math.exp(2), math.exp(1 / 5)]), [[2, 1], [1, 5]]
    )
    assert score("token_accuracy", rows) == Scores(pytest.approx(4 / 6), [0, 4 / 5], [[0, 1], [4, 5]])
    assert score("length_ratio", rows) == Scores(3 / 4, [2, pytest.approx(1 / 3)], [[2, 1], [1, 3]])


def test_an_overflowing_perplexity_is_finite() -> None:
    assert math.isfinite(score("perplexity", [row("a", "a", nll=1e9, tokens=1)]).corpus)


def test_macro_f1_is_the_mean_of_the_labels_f1() -> None:
    # by hand: a 2*2/(2+3), b 2*1/(3+2), c predicted never 0, d real never 0
    pairs = zip(["a", "a", "b", "b", "b", "d"], ["a", "a ", "a", "b", "c", "b"], strict=True)
    found = score("f1_macro", [row(p, r) for p, r in pairs])
    assert found.corpus == pytest.approx((4 / 5 + 2 / 5 + 0 + 0) / 4)
    assert found.examples == [1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("thought", ["<think>\nIt is red.\n</think>\n\n", "It is red.\n</think>\n\n"])
def test_thoughts_before_an_answer_are_not_compared(thought: str) -> None:
    rows = [{"prediction": f"{thought}red", "reference": "red"}]
    rows += [{"prediction": f"{thought}red", "reference": "<think>\nAs ever.\n</think>\n\nred"}]
    assert score("exact_match", rows).examples == [1.0, 1.0]
    assert rows[0]["prediction"] == f"{thought}red"  # as it is recorded
    assert score("exact_match", [{"prediction": "Write </think> first", "reference": "first"}]).corpus == 0.0


def test_no_rows_have_no_score() -> None:
    with pytest.raises(ValueError, match="no rows to score by exact_match"):
        score("exact_match", [])


def test_rows_get_their_scores_and_the_counts_of_the_corpus_score() -> None:
    rows = [row("a", "a"), row("b", "c")]
    assert score_rows(["exact_match", "length_ratio"], rows) == {"exact_match": 0.5, "length_ratio": 1}
    assert [r["scores"] for r in rows] == [
        {"exact_match": 1, "length_ratio": 1},
        {"exact_match": 0, "length_ratio": 1},
    ]
    assert rows[1]["statistics"] == {"length_ratio": [1, 1]}


@pytest.mark.parametrize("name", METRICS)
def test_only_what_reads_the_reference_answers_needs_a_pass_over_them(name: str) -> None:
    rows: list[Row] = [{"prediction": "a", "reference": "a"}]
    if needs_references([name]):
        with pytest.raises(KeyError, match="reference_"):
            score(name, rows)
    else:
        score(name, rows)


def test_one_metric_that_reads_the_reference_answers_is_enough_for_a_pass() -> None:
    assert not needs_references(["bleu", "file:some.py"]) and needs_references(["bleu", "perplexity"])


def test_unknown_metrics_are_all_named_with_a_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        check(["exact_matsch", "bleu", "meteor", "file:nowhere.py"])
    assert "exact_matsch is not a metric; did you mean exact_match?" in caught.value.problems[0]
    assert "meteor is not a metric" in caught.value.problems[1]
    assert "nowhere.py does not exist" in caught.value.problems[2]
    assert len(caught.value.problems) == 3 and "evaluate:NAME" in caught.value.hint


@pytest.mark.parametrize("task", TASKS)
def test_by_default_a_task_is_evaluated_by_its_own_metrics(task: Task) -> None:
    assert EvalArgs().metrics is None
    assert default_metrics(task, "transformers", {}) == list(TASKS[task].metrics)
    with_vllm = default_metrics(task, "vllm", {})
    assert with_vllm == [name for name in TASKS[task].metrics if not METRICS[name].references]


# Metrics from outside of the table


def own(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.py").write_text(text)
    return f"file:{tmp_path / 'mine.py'}"


def test_a_file_with_one_function_is_a_metric(tmp_path: Path) -> None:
    says = "SCALE = '0-2'\nBETTER = 'lower'\n"
    name = own(tmp_path, f"{says}def score(prediction, reference): return 2 * (prediction != reference)\n")
    check([name])
    assert score(name, [row("a", "a"), row("a", "b")]) == Scores(1.0, [0, 2], None)
    about = describe([name])[name]
    assert (about["scale"], about["better"]) == ("0-2", "lower")
    before = about["implementation"]
    assert "sha256 " in before
    from src.eval import custom_metrics

    own(tmp_path, "def score(prediction, reference): return 1.0\n")
    custom_metrics.load.cache_clear()
    assert describe([name])[name]["implementation"] != before
    assert describe([name])[name]["better"] == "higher"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def skore(p, r): return 1", r"has no function score\(prediction, reference\)"),
        ("BETTER = 'up'\ndef score(p, r): return 1", "BETTER='up' should be one of higher, lower, neither"),
        ("import nothing_of_the_kind", "cannot be run: it fails with ModuleNotFoundError: No module named"),
        ("def score(p, r:", "cannot be run: it fails with SyntaxError"),
    ],
)
def test_a_file_that_is_no_metric_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check([own(tmp_path, text)])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("'much'", "ValueError"),
        ("'1'", "the text '1'"),
        ("float('nan')", "returned nan"),
    ],
)
def test_a_file_that_cannot_score_is_named(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"mine\.py: score\(\) .*{message}"):
        score(own(tmp_path, f"def score(p, r): return {body}"), [row("a", "b")])


SCRIPT = """
import datasets
import evaluate

class Shared(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({{"predictions": text, "references": text}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, power=1):
        hits = [float(p == r) ** power for p, r in zip(predictions, references)]
        {end}
"""


def script(tmp_path: Path, name: str, end: str) -> str:
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.py").write_text(SCRIPT.format(end=end))
    return f"evaluate:{folder}"


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import evaluate

    cache = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
            patch.delitem(sys.modules, name)  # that of another test, in another cache
        patch.syspath_prepend(str(cache))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


def test_a_local_script_of_the_library_is_a_metric_without_the_hub(offline: None, tmp_path: Path) -> None:
    rows = [row("a", "a"), row("a", "b"), row("c", "c"), row("d", "e")]
    each = script(tmp_path, "each", "return {'f1': hits, 'hash': 'x'}")
    total = script(tmp_path, "total", "return {'total': 1 - sum(hits) ** 2, 'count': len(hits)}")
    check([each, total])
    assert score(each, rows) == Scores(0.5, [1, 0, 1, 0], None)
    assert score(total, rows) == Scores(-3.0, [0, 1, 0, 1], None)  # by its own compute, no mean
    assert score(f"{total}:count", rows) == Scores(4.0, [1, 1, 1, 1], None)
    about = describe([each, f"{each}?power=2"])
    assert about[each]["implementation"].startswith(f"evaluate {version('evaluate')} ")
    assert about[f"{each}?power=2"]["implementation"].endswith("f1, power=2")


def test_a_score_that_single_pairs_do_not_have_is_of_the_corpus_only(offline: None, tmp_path: Path) -> None:
    name = script(tmp_path, "spread", "return {'spread': 1 / (len(hits) - 1)}")
    assert score(name, [row("a", "a")] * 3) == Scores(0.5, None, None)
    rows = [row("a", "a")] * 3
    assert score_rows([name], rows) == {name: 0.5}
    assert rows[0]["scores"] == {}


@pytest.mark.parametrize(
    ("end", "suffix", "message"),
    [
        ("return {'a': 1.0, 'b': 2.0}", "", "returns a, b; name one: evaluate:.*:FIGURE"),
        ("return {'a': 1.0, 'best': 2.0}", ":bets", "returns no bets; did you mean best"),
        (
            "raise ValueError('a language is needed')",
            "",
            "cannot score texts: a language is needed; pass",
        ),
    ],
)
def test_a_script_that_gives_no_figure_is_refused(
    offline: None, tmp_path: Path, end: str, suffix: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        score(script(tmp_path, f"many{len(end)}", end) + suffix, [row("a", "a")])


def test_a_metric_of_the_hub_that_cannot_be_loaded_is_reported_in_one_sentence(offline: None) -> None:
    with pytest.raises(ConfigError, match="evaluate:rogue is not a local folder, and is not on the Hub or"):
        check(["evaluate:rogue"])


def test_the_library_is_imported_only_for_its_metrics() -> None:
    code = "import sys, src.eval.evaluator as e; e.metrics.check(['bleu']); sys.exit('evaluate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_metric_imports_the_files_beside_it_and_has_their_hash(tmp_path: Path) -> None:
    """Another folder's file of the same name is another module, and an import inside the function works too."""
    from src.eval import custom_metrics

    names = {}
    for folder, factor in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper_of_mine.py").write_text(f"FACTOR = {factor}\n")
        lazy = "def score(p, r):\n    from helper_of_mine import FACTOR\n    return FACTOR\n"
        early = "from helper_of_mine import FACTOR\ndef score(p, r): return FACTOR\n"
        names[folder] = own(tmp_path / folder, lazy if folder == "a" else early)
    check(list(names.values()))
    assert [score(name, [row("x", "y")]).corpus for name in names.values()] == [1, 2]
    before = describe([names["a"]])[names["a"]]["implementation"]
    (tmp_path / "a" / "helper_of_mine.py").write_text("FACTOR = 3\n")
    custom_metrics.load.cache_clear()
    assert describe([names["a"]])[names["a"]]["implementation"] != before
    assert score(names["a"], [row("x", "y")]).corpus == 3


@pytest.mark.parametrize("body", ["import sys; sys.exit(3)", "def score(p, r): raise SystemExit(3)"])
def test_a_metric_that_exits_does_not_end_the_evaluation_in_silence(tmp_path: Path, body: str) -> None:
    name = own(tmp_path, body)
    with pytest.raises(ConfigError, match="fails with SystemExit: 3"):
        check([name])
        try_on([name], ["a"])
