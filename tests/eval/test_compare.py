"""The comparison: each metric with its difference under equal conditions, or an error that names what differs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from src import outcome
from src.errors import RunError
from src.eval import verdict_text
from src.eval.compare import compare, record, show
from src.eval.fingerprint import baseline_folder, fingerprint
from src.eval.metrics import METRICS
from src.eval.results import EvalResult, pair_scores
from src.runs import Run
from src.schema import GateArgs, Guard
from tests.eval.evaluations import BASE, evaluated, right
from tests.fixtures import call, jsonl, read_jsonl

Capture = pytest.CaptureFixture[str]
GATE = GateArgs(guards=[], resamples=500)
CONDITIONS: dict[str, Any] = {
    "data": {"test": "sha-of-test", "dev": "sha-of-dev"},
    "max_examples": None,
    "chat_template": "sha-of-template",
    "decoding": {"max_new_tokens": 64, "seed": 42},
    "precision": "float32",
}
OTHERS: dict[str, Any] = {
    "data": {"test": "sha-of-another-test", "dev": "sha-of-dev"},
    "max_examples": 8,
    "chat_template": "sha-of-another-template",
    "decoding": {"max_new_tokens": 64, "seed": 42, "do_sample": True},
    "precision": "bfloat16",
}
NAMED = {"data": r"data \(test\)", "decoding": r"decoding \(do_sample\)"}


def run_of(folder: Path, share: float, *names: str, **conditions: Any) -> Run:
    """An evaluated run with a share of right predictions."""
    answers = {"test": right(share), "dev": right(1 - share)}
    (folder / "logs").mkdir(parents=True)
    facts = {"run": folder.name, "stage": "train", "status": "finished", "started": folder.name, "method": "lora"}
    (folder / "manifest.json").write_text(json.dumps(facts))
    evaluated(folder, answers, names or ("exact_match", "bleu"), "evals", **(CONDITIONS | conditions))
    return Run(folder)


def base_of(folder: Path, share: float, *names: str, **conditions: Any) -> EvalResult:
    folder.mkdir(parents=True)
    answers, names = {"test": right(share), "dev": right(1 - share)}, names or ("exact_match", "bleu")
    return EvalResult.of_base(evaluated(folder, answers, names, **CONDITIONS | conditions))


def both(folder: Path, *names: str, **conditions: Any) -> tuple[EvalResult, EvalResult]:
    tuned = run_of(folder / "run", 0.75, *names, **conditions)
    return EvalResult.of_run(tuned), base_of(folder / "base", 0.25, *names)


def test_each_metric_of_each_split_is_compared_with_its_interval(tmp_path: Path) -> None:
    made = compare(*both(tmp_path), GATE)
    assert list(made["rows"][0]) == [
        "split", "metric", "scale", "better", "base", "tuned", "difference", "low", "high", "p_value", "test",
        "examples", "detectable",
    ]  # fmt: skip
    test, _, dev, _ = made["rows"]
    assert [(r["split"], r["metric"]) for r in made["rows"]] == [
        (s, m) for s in ("test", "dev") for m in ("exact_match", "bleu")
    ]
    assert (test["base"], test["tuned"], test["difference"], test["examples"]) == (0.25, 0.75, 0.5, 40)
    assert (
        0.3 < test["low"] < 0.5 < test["high"] < 0.7 and test["p_value"] < 0.01 and 0.1 < test["detectable"] < 0.5
    )
    assert dev["low"] == pytest.approx(-test["high"]) and dev["difference"] == -0.5
    assert made["base_model"] == BASE and made["confidence"] == 0.95
    assert made["baseline"] == str(tmp_path / "base")
    assert made["verdict"] is None  # rougeL was not evaluated


def test_the_scores_of_every_metric_come_from_the_examples(tmp_path: Path) -> None:
    made = compare(*both(tmp_path, *METRICS), GATE)
    assert made["verdict"]["outcome"] == "promoted" and made["verdict"]["gate"]["metric"] == "rougeL"
    for row in made["rows"]:
        assert row["low"] <= row["difference"] <= row["high"], row
        assert row["difference"] == pytest.approx(row["tuned"] - row["base"])
    assert {r["better"] for r in made["rows"] if r["metric"] == "perplexity"} == {"lower"}


def test_a_metric_without_scores_of_examples_has_no_interval(tmp_path: Path) -> None:
    tuned, base = both(tmp_path)
    for model in (tuned, base):
        path = model.folder / "metrics.json"
        result = json.loads(path.read_text())
        result["metrics"]["unpaired"] = {"scale": "own", "implementation": "x", "better": "higher"}
        result["eval"]["test"]["unpaired"] = 0.5
        path.write_text(json.dumps(result))
    tuned, base = EvalResult("run", tuned.folder, tuned.folder / "evals"), EvalResult.of_base(base.folder)
    row = compare(tuned, base, GATE)["rows"][2]
    assert (row["metric"], row["difference"], row["low"], row["p_value"], row["detectable"]) == (
        "unpaired", 0, None, None, None,
    )  # fmt: skip


def test_labels_that_only_one_model_predicts_are_counted_for_both(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    tuned = evaluated(tmp_path, {"test": [("a", "a"), ("b", "b")]}, ["f1_macro"], "evals")
    base = evaluated(tmp_path / "base", {"test": [("a", "a"), ("z", "b")]}, ["f1_macro"])
    models = EvalResult("run", tuned, tuned / "evals"), EvalResult.of_base(base)
    pair = pair_scores(*models, "test", "f1_macro")
    assert pair and pair.base.shape == pair.tuned.shape == (2, 9)
    assert pair.difference() == pytest.approx(1 - 1 / 3)
    assert [m.result["eval"]["test"]["f1_macro"] for m in models] == pytest.approx([1, 1 / 3])


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_different_condition_is_refused_by_name(tmp_path: Path, name: str) -> None:
    message = f"under different {NAMED.get(name, name)}; run make eval-baseline"
    with pytest.raises(RunError, match=message) as caught:
        compare(*both(tmp_path, **{name: OTHERS[name]}), GATE)
    assert caught.value.exit_code == 2


def test_all_that_differs_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="under different max_examples, precision, temperature;"):
        compare(*both(tmp_path, max_examples=8, precision="bfloat16", temperature=1), GATE)


def test_predictions_for_other_prompts_are_not_compared(tmp_path: Path) -> None:
    tuned, base = both(tmp_path)
    rows = read_jsonl(base.folder / "test.predictions.jsonl")
    jsonl(base.folder / "test.predictions.jsonl", rows[::-1])
    with pytest.raises(RunError, match="run and models/x were not evaluated on the same prompts of test"):
        compare(tuned, base, GATE)
    (base.folder / "test.predictions.jsonl").unlink()
    with pytest.raises(RunError, match=r"test\.predictions\.jsonl does not exist; evaluate again"):
        compare(tuned, EvalResult.of_base(base.folder), GATE)


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_condition_has_a_separate_baseline(name: str) -> None:
    other = CONDITIONS | {name: OTHERS[name]}
    assert fingerprint(other) != fingerprint(CONDITIONS)
    assert baseline_folder("a", BASE, other) != baseline_folder("a", BASE, CONDITIONS)


def test_the_order_of_the_conditions_does_not_matter() -> None:
    assert fingerprint(dict(reversed(CONDITIONS.items()))) == fingerprint(CONDITIONS)


def test_each_revision_of_the_base_has_a_separate_baseline() -> None:
    folders = {
        baseline_folder("a", {"name": "org/x", "revision": r}, CONDITIONS) for r in ("sha256:1", "sha256:2", None)
    }
    assert len(folders) == 3
    assert all(f.parent == Path("a/metrics") and f.name.startswith("x-") for f in folders)


def cells_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.replace("│", " ").splitlines()]


def test_a_comparison_is_written_and_printed_with_stars_where_significant(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = ("rougeL", "length_ratio")
    run, base = run_of(tmp_path / "run", 0.75, *names), base_of(tmp_path / "base", 0.7, *names)
    gate = GateArgs(guards=[Guard("rougeL", "dev", 0.2)])
    made = record(run, base.folder, gate)
    assert json.loads((run.path / "comparison.json").read_text()) == made
    verdict_text.report(made, run)
    outcome.print_end("", "")
    output = capsys.readouterr().out
    row = made["rows"][0]
    cells = f"rougeL 0-1 0.700 0.750 +0.050 {row['low']:+.3f} to {row['high']:+.3f}"
    assert cells.split() in cells_of(output)  # no star: two examples of forty
    assert "…" not in output
    assert output.splitlines()[-1] == made["verdict"]["sentence"]
    record(run, base_of(tmp_path / "other", 0.1, *names).folder, gate)
    lines = cells_of(capsys.readouterr().out)
    place = lines.index(["test,", "40", "rows"])
    (line,) = (line for line in lines[place : place + 3] if line[0] == "rougeL")
    assert line[1:4] == ["0-1", "0.100", "0.750"] and line[-1] == "*"


@pytest.mark.parametrize(
    ("columns", "tuned", "scale"), [("80", 509.99, ["≥", "1"]), ("80", 12509.99, []), ("40", 509.99, [])]
)
def test_no_figure_and_no_star_is_truncated(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, columns: str, tuned: float, scale: list[str]
) -> None:
    """Where a line would be too long, the scales are left out."""
    monkeypatch.setenv("COLUMNS", columns)
    change, interval = tuned - 526.401, (tuned - 527.395, tuned - 525.482)
    row = {
        "split": "adversarial", "metric": "perplexity", "scale": "from 1", "better": "lower", "base": 526.401,
        "tuned": tuned, "difference": change, "low": interval[0], "high": interval[1], "p_value": 0.001,
        "examples": 60,
    }  # fmt: skip
    longest = row | {"metric": "avg_jaccard_overlap", "scale": "0-100"}
    show({"confidence": 0.95, "rows": [row, longest], "verdict": None}, "a against b")
    output = capsys.readouterr().out
    cells = f"526.401 {tuned:.3f} {change:+.3f} {interval[0]:+.3f} to {interval[1]:+.3f} *"
    assert ["perplexity", *scale, *cells.split()] in cells_of(output)
    assert tuned > 1000 or max(map(len, output.splitlines()[:-1])) <= 80


# The stage


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """An output directory with two evaluated runs and, beside it, artifacts with the base of both."""
    for name, share in (("2026-01-01_10-00-00", 0.5), ("2026-01-02_10-00-00", 0.9)):
        run_of(tmp_path / "outputs" / "runs" / name, share, *METRICS)
    os.symlink("2026-01-02_10-00-00", tmp_path / "outputs" / "runs" / "latest")
    result = json.loads((tmp_path / "outputs/runs/latest/metrics.json").read_text())
    base_of(baseline_folder(str(tmp_path / "artifacts"), BASE, result["conditions"]), 0.1, *METRICS)
    return tmp_path


def compared(folder: Path, *words: str) -> int:
    places = (f"output_dir={folder / 'outputs'}", f"artifacts_dir={folder / 'artifacts'}")
    return call("compare", *words, *places, "gate.guards=[]", "gate.resamples=500")


def test_two_runs_are_compared_the_first_against_the_second(two: Path, capsys: Capture) -> None:
    older, newer = "2026-01-01_10-00-00", str(two / "outputs/runs/2026-01-02_10-00-00")
    assert compared(two, "latest", older) == 0
    assert "promoted: rougeL on test rose from 0.500 to 0.900 (+0.400" in capsys.readouterr().out
    assert compared(two, "2026-01-01", newer) == 0
    output = capsys.readouterr().out
    assert "\nnot better than the base: rougeL on test fell" in output
    assert "2026-01-01_10-00-00 against 2026-01-02_10-00-00" in output
    assert not (two / "outputs/runs/latest/comparison.json").exists()


def test_a_run_is_compared_with_its_cached_baseline(two: Path, capsys: Capture) -> None:
    for words in ((), ("latest", "baseline"), ("run_a=latest",)):
        assert compared(two, *words) == 0
        output = capsys.readouterr().out
        assert "2026-01-02_10-00-00 against models/x" in output and "from 0.100 to 0.900" in output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["latset"], "there is no run latset in "),
        (["2026-01-01_10-00-01"], "did you mean 2026-01-01_10-00-00?"),
        (["2026"], "2026 is a prefix of 2 runs: "),
        (["latest", "baseline", "more"], "more is not an override; write key=value"),
        (["gate.metrik=x"], "gate.metrik is not a setting; did you mean gate.metric?"),
    ],
)
def test_what_cannot_be_compared_is_reported_in_one_sentence(
    two: Path, capsys: Capture, words: list[str], sentence: str
) -> None:
    assert compared(two, *words) == 2
    assert sentence in capsys.readouterr().err


def test_runs_under_other_conditions_are_refused_by_name(two: Path, capsys: Capture) -> None:
    run_of(two / "outputs/runs/2026-01-03_10-00-00", 0.5, *METRICS, max_examples=8)
    assert compared(two, "2026-01-03", "latest") == 2
    message = "2026-01-03_10-00-00 and 2026-01-02_10-00-00 were evaluated under different max_examples"
    assert message in capsys.readouterr().err
    assert compared(two, "2026-01-03") == 2
    message = "has no baseline under the conditions of 2026-01-03_10-00-00; its newest one differs in max_examples"
    assert message in capsys.readouterr().err


def test_a_run_that_was_not_evaluated_is_refused(two: Path, capsys: Capture) -> None:
    (two / "outputs/runs/latest/metrics.json").write_text('{"train": {}}')
    assert compared(two) == 2
    message = "run 2026-01-02_10-00-00 has not been evaluated; make eval RUN="
    assert message in capsys.readouterr().err
