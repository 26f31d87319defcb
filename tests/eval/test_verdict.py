"""The verdict: promoted, not better or inconclusive; and what cannot be judged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from src.errors import RunError
from src.eval.fingerprint import baseline_folder
from src.eval.significance import Comparison
from src.eval.verdict import MetricComparison, Verdict, describe, judge
from src.runs import Run
from src.schema import GateArgs, Guard
from tests.eval.evaluations import BASE, Pairs, evaluated, right

ONE = (1 / 40) + 1e-9  # one more answer that is right, of forty


def gate(metric: str | None = "exact_match", **settings: object) -> GateArgs:
    return GateArgs(**{"metric": metric, "guards": [], "resamples": 2000} | settings)  # type: ignore[arg-type]


def run_of(
    folder: Path, base: Mapping[str, Pairs], tuned: Mapping[str, Pairs], *names: str, task: str = "causal_lm"
) -> Run:
    """A run that was evaluated and compared, with the answers of its base beside it."""
    metrics = names or ("exact_match", "rougeL", "bleu", "perplexity")
    (folder / "run").mkdir(parents=True)
    (folder / "base").mkdir()
    evaluated(folder / "run", tuned, metrics, "evals", task=task)
    evaluated(folder / "base", base, metrics, task=task)
    (folder / "run" / "comparison.json").write_text(json.dumps({"baseline": str(folder / "base")}))
    return Run(folder / "run")


def of_shares(folder: Path, base: float, tuned: float, count: int = 40) -> Run:
    return run_of(folder, {"test": right(base, count)}, {"test": right(tuned, count)})


@pytest.mark.parametrize(
    ("base", "tuned", "settings", "outcome"),
    [
        (0.1, 0.6, {}, "promoted"),
        (0.6, 0.1, {}, "not_better"),
        (0.5, 0.5, {}, "not_better"),  # as good as the base is no better
        (0.5, 0.5 + 2 * ONE, {}, "cannot_tell"),  # two of forty
        (0.5, 0.5 + 4 * ONE, {}, "cannot_tell"),  # four that changed, all for the better: p 1/8
        (0.5, 0.5 + 6 * ONE, {}, "promoted"),  # six: 1/32
        (0.5, 0.5 + 6 * ONE, {"confidence": 0.99}, "cannot_tell"),
        (0.5, 0.5 + 6 * ONE, {"min_examples": 41}, "cannot_tell"),
        (0.1, 0.6, {"min_delta": 0.2}, "promoted"),
        (0.1, 0.6, {"min_delta": 0.4}, "cannot_tell"),
        (0.1, 0.6, {"min_delta": 0.6}, "not_better"),
        (0.5, 0.5 - ONE, {"min_delta": -0.3}, "promoted"),  # surely not worse by 0.3
    ],
)
def test_what_is_better_beyond_chance_is_promoted(
    tmp_path: Path, base: float, tuned: float, settings: dict[str, float], outcome: str
) -> None:
    verdict = judge(of_shares(tmp_path, base, tuned), gate(**settings))
    assert verdict.outcome == outcome
    assert verdict.promoted is (outcome == "promoted")


FIGURES = r"95% interval [-+.\d]+ to [-+.\d]+, p [.\d]+, 40 examples"


@pytest.mark.parametrize(
    ("base", "tuned", "settings", "sentence"),
    [
        (
            0.1, 0.6, {},
            rf"exact_match on test rose from 0\.100 to 0\.600 \(\+0\.500, {FIGURES}; smallest "
            r"detectable difference [.\d]+\)",
        ),
        (0.6, 0.1, {}, rf"not better than the base: .* fell from 0\.600 to 0\.100 \(-0\.500, {FIGURES};.*"),
        (0.5, 0.5, {}, r"not better than the base: exact_match on test stayed the same at 0\.500 \(\+0\.000, .*"),
        (0.5, 0.55, {}, r"inconclusive: exact_match on test rose from 0\.500 to 0\.550 .*"),
        (0.5, 0.55, {"min_examples": 50}, r"inconclusive: .*; the gate requires 50 examples .*"),
        (0.1, 0.6, {"min_delta": 0.2}, r"exact_match .*; the gate requires more than \+0\.2; smallest .*"),
        (0.1, 0.6, {"confidence": 0.9}, r"exact_match .* 90% interval .*"),
    ],
)  # fmt: skip
def test_the_verdict_is_one_sentence_with_its_figures(
    tmp_path: Path, base: float, tuned: float, settings: dict[str, float], sentence: str
) -> None:
    verdict = judge(of_shares(tmp_path, base, tuned), gate(**settings))
    assert re.fullmatch(sentence, verdict.sentence), verdict.sentence


def test_no_model_is_promoted_by_rows_that_it_was_trained_on(tmp_path: Path) -> None:
    run = of_shares(tmp_path, 0.1, 0.6)
    report = {"contamination": {"exact": 0, "normalised": 0, "near": 91, "files": {"test.jsonl": {}}}}
    (run.path / "data_report.json").write_text(json.dumps(report))
    (run.path / "config_used.yaml").write_text("on_contamination: keep")
    found = judge(run, gate())
    assert found.outcome == "cannot_tell"
    assert found.sentence.startswith(
        "inconclusive: 91 training rows occur in the evaluation files (91 near) and were"
    )
    (run.path / "config_used.yaml").write_text("on_contamination: reject")
    assert judge(run, gate()).promoted


def test_a_small_difference_is_shown_with_the_digits_that_it_needs() -> None:
    found = Comparison(base=0.02, tuned=0.01, difference=-0.01, low=-0.1, high=0.0, p_value=1.0, examples=24,
                       detectable=1.0, test="t")  # fmt: skip
    text = describe(MetricComparison("chrf", "test", 1, 1, found))
    assert text.startswith("chrf on test fell from 0.02 to 0.01 (-0.01")


def test_the_facts_hold_the_figures_and_the_settings_of_the_gate(tmp_path: Path) -> None:
    verdict = judge(of_shares(tmp_path, 0.1, 0.6), gate(None, guards=[Guard(split="test", max_drop=0.1)]))
    assert verdict.facts["metric"] == verdict.facts["gate"]["metric"] == "rougeL"
    assert verdict.facts["gate"]["guards"] == [{"metric": "rougeL", "split": "test", "max_drop": 0.1}]
    assert verdict.facts["low"] < verdict.facts["difference"] < verdict.facts["high"]
    assert verdict.facts["guards"][0]["difference"] == verdict.facts["difference"]
    json.dumps(verdict.facts)


def test_a_metric_that_cannot_see_the_script_is_named_with_one_that_can(tmp_path: Path) -> None:
    right_answers, wrong = [("退款会到账 17", "退款会到账 17")] * 40, [("不知道", "退款会到账 17")] * 40
    run = run_of(tmp_path, {"test": wrong}, {"test": right_answers}, "rougeL", "chrf")
    assert judge(run, gate("rougeL")).facts["notes"] == [
        "rougeL counts Latin letters and digits only, and 40 of 40 references of test consist mostly of others: "
        "gate.metric=chrf decides by characters"
    ]
    found = judge(run, gate("chrf"))
    assert found.promoted and found.facts["notes"] == []


def test_by_default_the_metric_of_the_task_decides(tmp_path: Path) -> None:
    labels = [("a", "a")] * 40, [("b", "a")] * 40
    run = run_of(tmp_path, {"test": labels[1]}, {"test": labels[0]}, "accuracy", "f1_macro", task="classification")
    assert judge(run, gate(None)).sentence.startswith("accuracy on test rose from 0.000 to 1.000")
    assert judge(run, gate("f1_macro")).promoted


def test_lower_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    better, worse = of_shares(tmp_path / "a", 0.1, 0.6), of_shares(tmp_path / "b", 0.6, 0.1)
    assert judge(better, gate("perplexity")).sentence.startswith("perplexity on test fell from 1.60")
    assert judge(better, gate("perplexity")).promoted
    assert judge(worse, gate("perplexity")).outcome == "not_better"
    guard = [Guard("perplexity", "test", 0.01)]
    assert judge(better, gate(guards=guard)).promoted
    assert judge(better, gate("perplexity", min_delta=0.15)).outcome == "cannot_tell"


def test_bleu_must_also_pass_the_paired_test_of_sacrebleu(tmp_path: Path) -> None:
    run = of_shares(tmp_path, 0.2, 0.7)
    assert judge(run, gate("bleu")).promoted
    assert "sacrebleu" in judge(run, gate("bleu")).facts["test"]
    assert "sacrebleu" not in judge(run, gate("exact_match")).facts["test"]


# Guards


def guarded(folder: Path, base: float, tuned: float, max_drop: float, **settings: object) -> Verdict:
    run = run_of(
        folder,
        {"test": right(0.1), "adversarial": right(base)},
        {"test": right(0.6), "adversarial": right(tuned)},
    )
    return judge(run, gate(guards=[Guard(max_drop=max_drop)], **settings))


@pytest.mark.parametrize(
    ("base", "tuned", "max_drop", "promoted"),
    [(0.5, 0.9, 0.0, True), (0.5, 0.5, 0.0, True), (0.5, 0.475, 0.03, True), (0.5, 0.475, 0.02, False)],
)
def test_what_is_guarded_must_not_drop_by_more_than_is_allowed(
    tmp_path: Path, base: float, tuned: float, max_drop: float, promoted: bool
) -> None:
    verdict = guarded(tmp_path, base, tuned, max_drop)
    assert verdict.outcome == ("promoted" if promoted else "not_better")
    if not promoted:
        assert re.search(
            r"^exact_match on test rose .*, but exact_match on adversarial fell from 0\.500 to 0\.475 \(-0\.025, "
            r"interval -0\.075 to 0\.000, p 1, 40 examples\), and the guard allows a loss of 0\.02$",
            verdict.sentence,
        ), verdict.sentence


def test_a_broken_guard_is_named_also_with_too_few_examples(tmp_path: Path) -> None:
    verdict = guarded(tmp_path, 0.5, 0.1, 0.02, min_examples=100)
    assert verdict.outcome == "not_better" and "the guard allows a loss of 0.02" in verdict.sentence


# What cannot be judged


@pytest.mark.parametrize(
    ("gate_args", "message"),
    [
        (
            gate("chrf"),
            r"needs scores of run that were not computed: gate: chrf on test; available: test: ex",
        ),
        (
            gate(split="dev"),
            r"computed: gate: exact_match on dev; available: test: .*; evaluate them, or set",
        ),
        (
            gate(guards=[Guard("bleu", "dev")]),
            r"computed: gate\.guards: bleu on dev; available: test: ex.*; evaluate them, or set gate\.guards=\[\]",
        ),
        (
            gate("chrf", guards=[Guard()]),
            r"computed: gate: chrf on test; gate\.guards: chrf on adversarial;",
        ),
        (gate("length_ratio"), "length_ratio cannot decide: it does not say which model is better"),
    ],
)
def test_what_was_not_evaluated_or_decides_nothing_is_refused(
    tmp_path: Path, gate_args: GateArgs, message: str
) -> None:
    answers = {"test": right(0.5)}
    run = run_of(tmp_path, answers, answers, "exact_match", "rougeL", "length_ratio")
    with pytest.raises(RunError, match=message) as caught:
        judge(run, gate_args)
    assert caught.value.exit_code == 2


def test_a_metric_without_scores_of_examples_decides_nothing(tmp_path: Path) -> None:
    run = of_shares(tmp_path, 0.1, 0.6)
    for folder in (run.path, tmp_path / "base"):
        result = json.loads((folder / "metrics.json").read_text())
        result["eval"]["test"]["rougeL"] += 0.01  # no mean of the examples
        (folder / "metrics.json").write_text(json.dumps(result))
    with pytest.raises(RunError, match="rougeL cannot decide: it has no scores of single examples"):
        judge(run, gate("rougeL"))


def test_a_run_that_was_not_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has not been compared with its base model; make eval RUN="):
        judge(Run(tmp_path), gate())


def test_other_conditions_are_refused_by_name(tmp_path: Path) -> None:
    run = of_shares(tmp_path, 0.1, 0.6)
    evaluated(run.path, {"test": right(0.6)}, ("exact_match", "rougeL", "bleu", "perplexity"), "evals", seed=7)
    with pytest.raises(RunError, match="run and models/x were evaluated under different seed"):
        judge(run, gate())


def test_a_baseline_that_was_moved_is_found_among_the_artifacts(tmp_path: Path) -> None:
    run = of_shares(tmp_path, 0.1, 0.6)
    conditions = json.loads((run.path / "metrics.json").read_text())["conditions"]
    moved = baseline_folder(str(tmp_path / "artifacts"), BASE, conditions)
    moved.parent.mkdir(parents=True)
    shutil.move(tmp_path / "base", moved)
    assert judge(run, gate(), str(tmp_path / "artifacts")).promoted
    with pytest.raises(RunError, match=r"there is no baseline in .*base; run make eval-baseline"):
        judge(run, gate())
