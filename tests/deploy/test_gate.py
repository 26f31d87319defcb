"""The gate: only a healthy model that beats its base is published, unless force=true, which the card states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.deploy.gate import CheckResult, check_gate
from src.errors import Inconclusive, NotPromoted, RunError
from src.runs import Run
from src.schema import GateArgs
from tests.eval.evaluations import evaluated, right
from tests.fixtures import World, tree

pytest_plugins = ["tests.fixtures"]

GATE = GateArgs(metric="exact_match", guards=[], resamples=500)


HEALTHY = CheckResult("loss", True, "the loss fell")
DAMAGED = CheckResult("files", False, "model.safetensors was changed")


def compared(folder: Path, base: float, tuned: float) -> Run:
    """A run directory with only evaluation results and a comparison."""
    (folder / "base").mkdir()
    evaluated(folder, {"test": right(tuned)}, ["exact_match"], "evals")
    evaluated(folder / "base", {"test": right(base)}, ["exact_match"])
    (folder / "comparison.json").write_text(json.dumps({"baseline": str(folder / "base")}))
    return Run(folder)


@pytest.mark.parametrize(
    ("tuned", "error", "code", "message"),
    [
        (
            0.25,
            NotPromoted,
            3,
            "not published: not better than the base: .*; publish anyway with force=true",
        ),
        (
            0.55,
            Inconclusive,
            4,
            "not published: inconclusive: .*; evaluate more examples, or pub",
        ),
    ],
)
def test_a_model_that_is_not_promoted_is_refused_unless_forced(
    tmp_path: Path, tuned: float, error: type[Exception], code: int, message: str
) -> None:
    run = compared(tmp_path, 0.5, tuned)
    with pytest.raises(error, match=message) as caught:
        check_gate(run, GATE, force=False)
    assert caught.value.exit_code == code  # type: ignore[attr-defined]
    assert not check_gate(run, GATE, force=True).promoted


def test_a_damaged_model_is_refused_however_good_it_is(tmp_path: Path) -> None:
    run = compared(tmp_path, 0.25, 0.75)
    assert check_gate(run, GATE, force=False, results=[HEALTHY]).promoted
    with pytest.raises(NotPromoted, match=r"^not published: model\.safetensors was changed; publish anyway"):
        check_gate(run, GATE, force=False, results=[HEALTHY, DAMAGED])
    assert check_gate(run, GATE, force=True, results=[DAMAGED]).promoted


def test_all_reasons_against_publishing_are_reported(tmp_path: Path) -> None:
    with pytest.raises(NotPromoted) as caught:
        check_gate(compared(tmp_path, 0.5, 0.55), GATE, force=False, results=[DAMAGED])
    assert caught.value.problems[0].startswith("not published: inconclusive")
    assert caught.value.problems[1] == "not published: model.safetensors was changed"


def test_force_does_not_override_a_missing_evaluation(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="that were not computed"):
        check_gate(compared(tmp_path, 0.25, 0.75), GateArgs(metric="rougeL"), force=True)


# On the command line


@pytest.mark.parametrize("stage", ["publish", "publish-hf"])
def test_a_model_that_does_not_beat_its_base_is_refused_and_nothing_is_written(
    copied: World, stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_REPO_ID", "me/ingot")
    monkeypatch.setenv("HF_TOKEN", "hf_token-of-the-tests")
    before = tree(copied.output.parent)
    assert copied.call(stage, "gate.min_delta=2") == 3
    error = capsys.readouterr().err
    assert error.startswith("not published: not better than the base: rougeL on test rose from 0.000 to 1.000")
    assert "publish anyway with force=true" in error
    assert tree(copied.output.parent) == before


def test_too_few_examples_are_refused(copied: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert copied.call("publish", "gate.min_examples=1000") == 4
    assert "the gate requires 1000 examples or more" in capsys.readouterr().err
    assert not (copied.artifacts / "models").exists()


@pytest.mark.parametrize("word", ["force=true", "--force"])
def test_force_publishes_against_the_gate_and_the_card_says_so(copied: World, word: str) -> None:
    assert copied.call("publish", "gate.min_delta=2", word) == 0
    folder = copied.artifacts / "models" / "tiny-lora" / "latest"
    assert "**published against the gate**: not better than the base: rougeL" in (folder / "README.md").read_text()
    assert json.loads((folder / "manifest.json").read_text())["publication"]["promoted"] is False


@pytest.mark.parametrize("word", ["gate.metrik=bleu", "gate.metric=[bleu]", "gate=3"])
def test_a_gate_that_is_misspelt_is_refused(copied: World, word: str) -> None:
    assert copied.call("publish", word) == 2
    assert not (copied.artifacts / "models").exists()
