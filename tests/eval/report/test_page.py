"""report.html: its content for runs in every state, and its rendering in a real browser."""

from __future__ import annotations

import functools
import html
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src import config, runs, schema
from src.eval.report import charts, examples, view_model
from src.eval.report import page as report
from src.eval.report.charts import MAX_POINTS, AxisRange, bins, downsample, number, ticks
from src.eval.report.examples import DiffSpan, read_split, word_diff
from src.utils.event_files import Curves
from tests.conftest import AssayCommand
from tests.eval.browser import Browser, needs_browser
from tests.fixtures import call, jsonl

pytest_plugins = ["tests.eval.browser"]

BASE = {"name": "models/base", "revision": "sha256:1"}
CONDITIONS = {"data": {"test": "a" * 64, "adversarial": "b" * 64}, "device": "cpu"}
GATE = {"metric": "rougeL", "split": "test", "min_delta": 0.0, "confidence": 0.95}
SENTENCES = {
    "promoted": "rougeL on test rose from 0.250 to 0.500 (+0.250, 95% interval 0.190 to 0.310, 40 examples)",
    "not_better": "not better than the base: rougeL on test fell from 0.500 to 0.250",
    "cannot_tell": "inconclusive: rougeL on test rose by 0.001, 40 examples",
}
HOSTILE = (
    "</pre><script>window.ran = 1</script><img src=https://x.example/y onerror='window.ran = 2'>"
    "<svg onload='window.ran = 3'></style><a href=javascript:window.ran=4>&lt;b&gt;"
)
Predictions = list[dict[str, Any]]


def answer(n: int, score: float, text: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt": f"list the files of folder {n}", "reference": f"find ./folder{n} -type f -name '*.txt'",
        "prediction": text, "scores": {"rougeL": score, "exact_match": float(score == 1)}, "prompt_tokens": 20 + n,
        "tokens": len(text.split()), "stop": "length" if n % 5 == 0 else "end", **more,
    }  # fmt: skip


def answers(count: int = 40) -> tuple[Predictions, Predictions]:
    """Of the base and the tuned model: every eighth prediction is worse, the others are better."""
    base, tuned = [], []
    for n in range(count):
        worse = n % 8 == 7
        good, bad = (
            answer(n, 0.5 + n / 100, f"find ./folder{n} -name '*.txt'"),
            answer(n, 0.25, "you can use ls"),
        )
        base.append(good if worse else bad)
        tuned.append(bad if worse else good)
    return base, tuned


def score(split: str, metric: str, base: float, tuned: float, half: float | None, **more: Any) -> dict[str, Any]:
    """A row of comparison.json, with an interval of +-`half`; None: an older row without one."""
    row = {
        "split": split, "metric": metric, "scale": "0-1", "base": base, "tuned": tuned, "difference": tuned - base,
    }  # fmt: skip
    if half is None:
        return row
    ends = {"low": tuned - base - half, "high": tuned - base + half}
    return row | ends | {"better": "higher", "p_value": 0.01, "examples": 40, "detectable": 0.05} | more


def rows_of(half: float | None = 0.06) -> list[dict[str, Any]]:
    return [
        score("test", "exact_match", 0.0, 0.01, half),
        score("test", "rougeL", 0.25, 0.5, half),
        score("adversarial", "rougeL", 0.5, 0.25, half),
        score("adversarial", "perplexity", 9.5, 4.25, half, better="lower", scale="from 1"),
    ]


class FakeRun:
    """A run directory with every file, made without training."""

    def __init__(self, folder: Path) -> None:
        self.output, self.artifacts = folder / "outputs", folder / "artifacts"
        self.run = runs.create(self.output, "train", config.to_yaml(schema.TrainConfig(lr=0.5)), {
            "method": "lora", "task": "causal_lm", "base_model": BASE, "seed": 7,
            "code": {"commit": "c0ffee", "diff_sha256": None}, "precision": {"value": "float32"},
            "hardware": {"cpu": "a CPU", "cores": 2, "gpus": []},
            "packages": {"torch": "2.13.0"},
            "data": {"files": [{"file": "data/a.jsonl", "sha256": "d" * 64, "rows_in": 9, "rows_trained": 7}]},
        })  # fmt: skip
        self.run.update(status=runs.FINISHED, ended=runs.now())
        self.run.unlock()
        self.base = self.artifacts / "metrics" / "base-1"

    def write(self, name: str, value: Any) -> None:
        path = self.run.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")

    def trained(self, steps: int = 40) -> FakeRun:
        curves = Curves(self.run.logs)
        for step in range(1, steps + 1):
            curves.add("train/loss", 3 / step, step)
            curves.add("train/learning_rate", 0.001 * (1 - step / steps), step)
            curves.add("train/grad_norm", 1.0 + step % 3, step)
            if step % 10 == 0:
                curves.add("eval/loss", 3.1 / step, step)
        curves.close()
        kinds = {"exact": 1, "normalised": 0, "near": 2}
        rejected = [{"file": "data/a.jsonl", "line": n, "reason": "too_long", "detail": "…"} for n in (3, 5)]
        self.write("data_report.json", {
            "rows_in": 9, "rows_trained": 7, "rejected": rejected, "rejected_by_reason": {"too_long": 2},
            "tokens": {"total": 700, "with_loss": 70, "row_length": {"min": 4, "p50": 9, "p90": 20, "max": 31}},
            "duplicates": kinds | {"rows": []}, "findings": ["3 rows are duplicates of earlier ones"],
            "contamination": {"files": {"data/eval/test.jsonl": kinds}, **kinds, "rows": []},
        })  # fmt: skip
        return self

    def evaluated(self, base: Predictions, tuned: Predictions) -> FakeRun:
        result = {
            "eval": {"test": {"rougeL": 0.5, "exact_match": 0.01}, "adversarial": {"rougeL": 0.25}},
            "metrics": {"rougeL": {"scale": "0-1", "implementation": "x"}, "perplexity": {"better": "lower"}},
            "conditions": CONDITIONS, "base_model": BASE,
        }  # fmt: skip
        self.write("metrics.json", {"train": {"steps": 40}} | result)
        self.base.mkdir(parents=True)
        (self.base / "metrics.json").write_text(json.dumps(result), encoding="utf-8")
        for split in ("test", "adversarial"):
            jsonl(self.run.path / "evals" / f"{split}.predictions.jsonl", tuned)
            jsonl(self.base / f"{split}.predictions.jsonl", base)
        return self

    def compared(self, outcome: str, rows: list[dict[str, Any]] | None = None) -> FakeRun:
        guards = [
            {"metric": metric, "split": "adversarial", "difference": change, "max_drop": 0.02}
            for metric, change in (("rougeL", -0.25), ("perplexity", -5.25))
        ]
        verdict = {"outcome": outcome, "sentence": SENTENCES[outcome], "gate": GATE, "guards": guards}
        rows = rows or rows_of()
        self.write("comparison.json", {"base_model": BASE, "confidence": 0.95, "rows": rows, "verdict": verdict})
        return self

    def page(self) -> str:
        return report.write_report(self.run, self.artifacts).read_text(encoding="utf-8")


@pytest.fixture
def made(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path)


@pytest.fixture
def complete(made: FakeRun) -> FakeRun:
    """Trained, evaluated, compared and promoted."""
    return made.trained().evaluated(*answers()).compared("promoted")


def text(page: str) -> str:
    """The visible text, without tags and with single spaces."""
    body = page.split("<body>")[1]
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


# The verdict


@pytest.mark.parametrize(
    ("outcome", "word"), [("promoted", "Promoted"), ("not_better", "Not better"), ("cannot_tell", "Inconclusive")]
)
def test_the_verdict_comes_first_as_a_word_and_a_sentence(made: FakeRun, outcome: str, word: str) -> None:
    page = made.evaluated(*answers()).compared(outcome).page()
    first = text(page).split("At a glance")[0]
    assert word in first and SENTENCES[outcome] in first
    assert f"<title>{word}: run {made.run.id}</title>" in page
    assert "0.250 → 0.500" in first
    assert "Guard broken rougeL on adversarial changed by \N{MINUS SIGN}0.25; it may get worse by 0.02" in first
    assert "Guard holds perplexity on adversarial changed by \N{MINUS SIGN}5.25" in first


def test_a_difference_is_read_by_its_interval(complete: FakeRun) -> None:
    shown = text(complete.page())
    assert "+0.250 +0.190 to +0.310" in shown
    rows = view_model.scores({"rows": rows_of()}, {})
    found = {(s, r.metric): r.tone for s, scores in rows.items() for r in scores}
    assert found == {
        ("test", "exact_match"): "unclear", ("test", "rougeL"): "better", ("adversarial", "rougeL"): "worse",
        ("adversarial", "perplexity"): "better",
    }  # fmt: skip
    by_test = view_model.scores({"rows": [score("test", "rougeL", 0.25, 0.5, 0.06, p_value=0.06)]}, {})
    assert by_test["test"][0].tone == "unclear"  # the interval alone is not enough
    assert rows["adversarial"][1].on_axis == pytest.approx((5.19, 5.25, 5.31))  # better lies to the right


def test_a_comparison_from_before_intervals_is_shown_and_not_judged(made: FakeRun) -> None:
    made.evaluated(*answers()).write("comparison.json", {"base_model": BASE, "rows": rows_of(None)[:3]})
    shown = text(made.page())
    assert "Not judged" in shown and "without intervals" in shown and "? no interval" in shown
    assert "+0.250" in shown and "Got better" in shown


def test_without_a_comparison_the_report_names_the_command_that_makes_one(made: FakeRun) -> None:
    assert "Not compared" in text(made.page()) and "make eval evaluates it" in text(made.page())
    made.evaluated(*answers())
    shutil.rmtree(made.artifacts)
    shown = text(made.page())
    assert "Not compared" in shown and "make eval-baseline evaluates and compares it" in shown
    assert "Highest" in shown and "Got better" not in shown and "0.500" in shown


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_an_unfinished_run_has_a_report_too(made: FakeRun, status: str) -> None:
    made.trained().run.update(status=status, error="OSError: no more cheese" if status == "failed" else None)
    shown = text(made.page())
    assert "Not compared" in shown and f"The run is {status}" in shown
    assert ("no more cheese" in shown) == (status == "failed")
    assert "Loss" in shown and "9 rows read = 7 trained on + 2 rejected: too long" in shown


def test_a_bare_run_has_a_report_too(made: FakeRun) -> None:
    for path in made.run.path.iterdir():
        if path.name != "manifest.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    keep = ("run", "stage", "status", "started", "process")
    made.write("manifest.json", {k: v for k, v in made.run.manifest.items() if k in keep})
    assert "Not compared" in text(made.page())


def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_shown(complete: FakeRun) -> None:
    (complete.run.path / "data_report.json").write_text('{"rows_in": 9')
    events = next(complete.run.logs.glob("events*"))
    events.write_bytes(events.read_bytes()[:-5])  # a killed process was writing it
    answers_of_test = complete.run.path / "evals/test.predictions.jsonl"
    answers_of_test.write_bytes(answers_of_test.read_bytes()[:-30])
    shown = text(complete.page())
    assert "data_report.json cannot be read" in shown and "rows read =" not in shown
    assert "Promoted" in shown and "Loss" in shown and "35 better, 4 worse by rougeL" in shown


@pytest.mark.parametrize("name", ["data_report.json", "comparison.json", "metrics.json"])
def test_any_missing_key_of_an_older_file_leaves_the_rest_shown(complete: FakeRun, name: str) -> None:
    text_of_all = (complete.run.path / name).read_text()
    for place in places_of(json.loads(text_of_all)):
        poorer = json.loads(text_of_all)
        holder = functools.reduce(lambda value, key: value[key], place[:-1], poorer)
        del holder[place[-1]]
        complete.write(name, poorer)
        assert "Lineage" in report.render_page(complete.run, complete.artifacts), place


def places_of(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of keys to each value of a nested mapping."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict):
            yield (*before, key)
        if isinstance(inner, dict | list):
            yield from places_of(inner, (*before, key))


def test_a_baseline_under_other_conditions_is_not_used(complete: FakeRun) -> None:
    result = json.loads((complete.base / "metrics.json").read_text())
    for other in ({"conditions": {"device": "cuda"}}, {"base_model": {"revision": "sha256:2"}}):
        (complete.base / "metrics.json").write_text(json.dumps(result | other))
        shown = text(complete.page())
        assert "base model's predictions on these prompts are not in" in shown and "Got better" not in shown


def test_the_baseline_that_the_comparison_names_is_used(complete: FakeRun, tmp_path: Path) -> None:
    moved = shutil.move(complete.base, tmp_path / "elsewhere")
    comparison = json.loads((complete.run.path / "comparison.json").read_text())
    complete.write("comparison.json", comparison | {"baseline": str(moved)})
    assert "Got better" in text(complete.page())


# The examples


def changed(tmp_path: Path, scores: list[tuple[float, float]], lower: bool = False) -> examples.SplitView:
    base = jsonl(tmp_path / "base.jsonl", (answer(n, a, "x") for n, (a, _) in enumerate(scores)))
    tuned = jsonl(tmp_path / "tuned.jsonl", (answer(n, b, "x") for n, (_, b) in enumerate(scores)))
    split = read_split("test", tuned, base, "rougeL", lower)
    assert split is not None
    return split


def test_the_examples_that_changed_most_are_found_in_both_directions(tmp_path: Path) -> None:
    source = random.Random(1)
    scores = [(source.random(), source.random()) for _ in range(200)] + [(0.5, 0.5)] * 10
    split = changed(tmp_path, scores)
    change = [b - a for a, b in scores]
    order = sorted(range(len(scores)), key=lambda n: change[n])
    most = examples.MAX_SHOWN
    assert [e.number - 1 for e in split.downs] == order[:most]
    assert [e.number - 1 for e in split.ups] == order[::-1][:most]
    assert split.ups[0].change == pytest.approx(max(change))
    assert (split.better, split.same, split.worse) == (sum(c > 0 for c in change), 10, sum(c < 0 for c in change))


def test_lower_scores_are_better_for_a_lower_is_better_metric(tmp_path: Path) -> None:
    split = changed(tmp_path, [(9.0, 2.0), (3.0, 4.0)], lower=True)
    assert [(e.number, e.change) for e in split.ups] == [(1, -7.0)]
    assert [(e.number, e.change) for e in split.downs] == [(2, 1.0)]


def test_nothing_that_stayed_the_same_is_shown_as_changed(tmp_path: Path) -> None:
    split = changed(tmp_path, [(0.5, 0.5), (0.1, 0.4)])
    assert [e.number for e in split.ups] == [2] and split.downs == []


def test_answers_to_other_prompts_are_not_compared(tmp_path: Path) -> None:
    base, tuned = answers(4)
    base[1]["prompt"] = "something else"
    del base[3]
    files = [jsonl(tmp_path / name, rows) for name, rows in (("base", base), ("tuned", tuned))]
    split = read_split("test", files[1], files[0], "rougeL", False)
    assert split is not None and [e.number for e in split.ups] == [3, 1] and split.examples == 2


@pytest.mark.parametrize(
    ("reference", "given", "words"),
    [
        ("find . -name x", "find . -name x", [("same", "find . -name x")]),
        ("find . -name x", "find . -iname x",
         [("same", "find . -"), ("missing", "name "), ("extra", "iname "), ("same", "x")]),
        ("gzip -d a &", "gzip -d a", [("same", "gzip -d a"), ("same", " "), ("missing", "&")]),
        ("a b c", "a  b\nc", [("same", "a  b\nc")]),
        ("tac file", "you may use ls for that", [("other", "you may use ls for that")]),
        ("a b", "", []),
    ],
)  # fmt: skip
def test_an_answer_is_held_against_its_reference_word_by_word(
    reference: str, given: str, words: list[tuple[str, str]]
) -> None:
    assert word_diff(reference, given) == [DiffSpan(*word) for word in words]


def test_a_long_answer_is_clipped_and_not_marked() -> None:
    long = "word " * 5000
    assert examples.truncate(long).endswith(" … and 23,800 more characters")
    for reference, given in ((long, long), (long, "word " * 300), ("word " * 300, long)):
        assert [w.kind for w in word_diff(reference[:2500], given[:2500])] == ["other"]


def test_lengths_are_in_one_unit(tmp_path: Path) -> None:
    base, tuned = answers(4)
    paths = [jsonl(tmp_path / name, rows) for name, rows in (("b", base), ("t", tuned))]
    split = read_split("test", paths[1], paths[0], "rougeL", False)
    assert split is not None and split.unit == "words"
    assert [length.values[0] for length in split.lengths] == [6, 4, 4]
    for path, rows in zip(paths, (base, tuned), strict=True):
        jsonl(path, (row | {"reference_tokens": 11} for row in rows))
    split = read_split("test", paths[1], paths[0], "rougeL", False)
    assert split is not None and split.unit == "tokens" and split.lengths[0].values == [11] * 4


# The charts


def test_a_downsampled_curve_keeps_its_peaks_and_its_order() -> None:
    points = [(float(n), 1.0) for n in range(10_000)]
    points[4321], points[77] = (4321.0, 99.0), (77.0, -5.0)
    kept = downsample(points)
    assert len(kept) <= MAX_POINTS and kept == sorted(kept)
    assert {(4321.0, 99.0), (77.0, -5.0)} <= set(kept)
    assert downsample(points[:MAX_POINTS]) == points[:MAX_POINTS]


@pytest.mark.parametrize(
    "span",
    [AxisRange(0, 1), AxisRange(-0.31, 0.07), AxisRange(2.9, 3.1), AxisRange(0, 12345), AxisRange(1e-9, 4e-9)],
)
def test_ticks_are_few_round_and_on_the_axis(span: AxisRange) -> None:
    found = ticks(span, 4)
    assert 2 <= len(found) <= 9
    assert all(span.low - 1e-12 <= t <= span.high + 1e-12 for t in found)


def test_bins_hold_every_value_and_one_outlier_does_not_flatten_them() -> None:
    edges, beyond = bins([1, 2, 3, 50])
    assert not beyond and edges[-1] > 50
    edges, beyond = bins([*range(100), *range(100), 9000])
    assert beyond and edges[-1] <= 110
    assert sum(charts._counts([0, 99, 9000], edges)) == 3
    assert bins([0]) == ([0, 1], False)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.12345, "0.1235"), (-3.0, "\N{MINUS SIGN}3"), (1234.5, "1,234"), (-1e-17, "0"), (float("nan"), "n/a")],
)
def test_numbers_are_written_for_people(value: float, shown: str) -> None:
    assert number(value) == shown
    assert number(0.25, 3, sign=True) == "+0.250"


def test_curves_are_read_as_they_were_written(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    for step in (1, 2, 3):
        curves.add("train/loss", 1 / step, step)
    curves.add("train/loss", 0.25, 2)
    curves.close()
    assert Curves.read(tmp_path)["train/loss"] == [(1, 1.0), (2, 0.25), (3, pytest.approx(1 / 3))]


# Harm, secrets and size


def test_what_a_model_wrote_stays_text(complete: FakeRun) -> None:
    base, tuned = answers()
    for row in (*base, *tuned):
        row |= {"prompt": row["prompt"] + HOSTILE, "prediction": HOSTILE + row["prediction"], "stop": HOSTILE}
    shutil.rmtree(complete.artifacts)
    complete.evaluated(base, tuned)
    hostile_rows = [*rows_of(), score(f"test{HOSTILE}", HOSTILE, 0.1, 0.2, 0.01, scale=HOSTILE)]
    complete.compared("promoted", hostile_rows)
    complete.run.update(method=HOSTILE, command=["python", HOSTILE], packages={HOSTILE: HOSTILE})
    page = complete.page()
    assert "&lt;script&gt;" in page
    assert set(re.findall(r"<(script|img|iframe|object|link|a|meta)\b", page.lower())) == {"a", "link", "meta"}
    body = page.split("<body>")[1]
    assert not [tag for tag in re.findall(r"<[a-z][^>]*>", body) if re.search(r"\son\w+=|javascript:", tag)]
    assert set(re.findall(r"(?:href|src)=[\"']?([^\"'#\s>]*)", re.sub(r">[^<]*<", "><", page))) <= {"", "data:,"}


def test_no_secret_is_shown(complete: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was written before it was known to be a secret, and one that HTML escaping changes."""
    secrets = {"HF_TOKEN": "hf_abcdefgh12345", "MY_SECRET": "p&ss<w>rd'\"9876"}
    base, tuned = answers()
    tuned[0] |= {"prediction": " ".join([*secrets.values(), tuned[0]["reference"]])}
    tuned[0]["scores"]["rougeL"] = 1.0
    shutil.rmtree(complete.artifacts)
    complete.evaluated(base, tuned).run.update(command=["python", f"token={secrets['HF_TOKEN']}"])
    for name in ("config_used.yaml", "evals/config_used.yaml"):
        with (complete.run.path / name).open("a") as file:
            file.write(f"# {secrets['HF_TOKEN']}\n")
    assert complete.page().count("hf_abcdefgh12345") == 5  # two splits, two files, one command
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    page = complete.page()
    assert "hf_abc" not in page and "p&amp;ss" not in page and "rd&#39;" not in page
    assert "${oc.env:HF_TOKEN}" in re.sub(r"</?(ins|del)>", "", page)


def test_a_huge_run_makes_a_small_page(made: FakeRun) -> None:
    made.trained(2000)
    base, tuned = answers(10_000)
    for row in (*base[-100:], *tuned[-100:]):  # the largest changes
        row |= {"prompt": "& <why> " * 2000, "prediction": "& <so> that " * 2000}
    path = report.write_report(made.evaluated(base, tuned).compared("promoted").run, made.artifacts)
    assert path.stat().st_size < 1_000_000
    lines = re.findall(r'<polyline class="train" points="([^"]*)"', path.read_text(encoding="utf-8"))
    assert len(lines) == 3 and all(100 < len(line.split()) <= MAX_POINTS for line in lines)


# The stage


def test_the_stage_writes_the_report_of_the_named_run(complete: FakeRun) -> None:
    places = [f"output_dir={complete.output}", f"artifacts_dir={complete.artifacts}"]
    assert call("report", complete.run.id, *places) == 0
    assert "Got better" in text((complete.run.path / "report.html").read_text(encoding="utf-8"))


def test_a_run_is_found_by_its_directory_its_name_or_as_the_newest(complete: FakeRun) -> None:
    places = [f"output_dir={complete.output}", f"artifacts_dir={complete.artifacts}"]
    path = complete.run.path.resolve() / "report.html"
    for word in (
        [],
        [str(complete.run.path)],
        [complete.run.id],
        [str(complete.output / "runs/latest")],
        ["latest"],
    ):
        path.unlink(missing_ok=True)
        assert call("report", *word, *places) == 0
        assert path.is_file()


def test_the_stage_refuses_before_anything_heavy(assay: AssayCommand) -> None:
    done = assay("report", "nowhere")
    assert (done.returncode, done.stderr) == (2, "there is no run nowhere in outputs/runs; make runs lists them\n")
    assert assay.left() == []


# In a browser


class TestInABrowser:
    pytestmark = needs_browser

    @pytest.mark.parametrize("dark", [False, True])
    @pytest.mark.parametrize("width", [360, 1280])
    def test_a_complete_report_is_drawn_without_network_or_overflow(
        self, complete: FakeRun, browser: Browser, width: int, dark: bool
    ) -> None:
        page = report.write_report(complete.run, complete.artifacts)
        browser.open(page, width, dark)
        assert browser.requests == [page.resolve().as_uri()]
        assert browser.js("text('#verdict h2')") == "Promoted"
        assert browser.js("boxes('#verdict h2')[0].bottom") < 400
        assert browser.js("count('svg') > 30")
        for _ in ("folded", "open"):
            assert browser.js("widerThanTheScreen()") == 0
            assert browser.js("outsideTheirBoxes()") == []
            assert browser.js("tooPale()") == []
            assert browser.js("labelsOverOneAnother()") == []
            browser.js("openAll()")
        background = browser.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        assert (int(background) < 80) == dark
        assert browser.complaints == []

    def test_each_kind_of_chart_is_drawn(self, complete: FakeRun, browser: Browser) -> None:
        browser.open(report.write_report(complete.run, complete.artifacts))
        browser.js("openAll()")
        shown = {
            css: browser.js(f"count({css!r})")
            for css in (
                ".bars .base", ".bars .tuned", ".interval circle", ".interval .range", "polyline.train",
                "polyline.held-out", ".histogram", ".histogram .area", ".percentiles", ".shares",
            )
        }  # fmt: skip
        assert list(shown.values()) == [6, 6, 6, 3 * 6, 3, 1, 4, 8, 1, 3]
        base, tuned = (box["width"] for box in browser.js("boxes('.glance .bars rect:not(.track)')")[:2])
        assert tuned == pytest.approx(2 * base, rel=0.02)  # 0.50 against 0.25

    def test_the_interval_is_on_its_side_of_zero(self, complete: FakeRun, browser: Browser) -> None:
        browser.open(report.write_report(complete.run, complete.artifacts))
        zeros, dots = browser.js("boxes('.glance .zero')"), browser.js("boxes('.glance .interval circle')")
        assert [dot["left"] > zero["right"] for zero, dot in zip(zeros, dots, strict=True)] == [True, False]

    def test_model_output_is_not_executed(self, complete: FakeRun, browser: Browser) -> None:
        base, tuned = answers()
        for row in (*base, *tuned):
            row |= {"prompt": row["prompt"] + HOSTILE, "prediction": HOSTILE}
        shutil.rmtree(complete.artifacts)
        page = report.write_report(complete.evaluated(base, tuned).run, complete.artifacts)
        browser.open(page)
        assert "<script>window.ran = 1" in browser.js("text('#examples')")
        assert browser.js("[typeof window.ran, document.scripts.length, document.images.length]") == [
            "undefined",
            0,
            0,
        ]
        assert browser.requests == [page.resolve().as_uri()] and browser.complaints == []

    @pytest.mark.parametrize("width", [360, 1280])
    def test_an_unfinished_run_is_drawn_as_well(self, made: FakeRun, browser: Browser, width: int) -> None:
        made.trained(3).run.update(status="failed", error="no" * 400)
        browser.open(report.write_report(made.run, made.artifacts), width)
        assert browser.js("text('#verdict h2')") == "Not compared"
        assert browser.js("[widerThanTheScreen(), outsideTheirBoxes(), tooPale()]") == [0, [], []]
        assert browser.complaints == []

    def test_nothing_is_folded_in_print(self, complete: FakeRun, browser: Browser) -> None:
        browser.open(report.write_report(complete.run, complete.artifacts))
        assert browser.js("foldedAway()") > 0
        browser.send("Emulation.setEmulatedMedia", media="print")
        assert browser.js("foldedAway()") == 0
        assert browser.js("seen('nav').length") == 0
        browser.send("Emulation.setEmulatedMedia", media="")
