"""The gate: only what beats its base is published, unless force is used, and then the card says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.config import GateArgs
from src.deploy.gate import judge, require
from src.errors import NotPromoted, RunError
from src.runs import Run
from tests.fixtures import World, tree

pytest_plugins = ["tests.fixtures"]


def compared(folder: Path, base: float, tuned: float, metric: str = "exact_match", split: str = "test") -> Run:
    """A run that has been compared, and nothing else."""
    row = {"split": split, "metric": metric, "base": base, "tuned": tuned, "difference": tuned - base}
    decoy = {"split": "dev", "metric": metric, "base": 0.0, "tuned": 1.0, "difference": 1.0}
    (folder / "comparison.json").write_text(json.dumps({"rows": [decoy, row]}))
    return Run(folder)


@pytest.mark.parametrize(
    ("base", "tuned", "min_delta", "promoted"),
    [
        (0.25, 0.5, 0.0, True),
        (0.25, 0.25, 0.0, False),  # as good as the base is not better
        (0.5, 0.25, 0.0, False),
        (0.25, 0.5, 0.25, False),
        (0.25, 0.5, 0.125, True),
        (0.5, 0.25, -0.5, True),
    ],
)
def test_the_base_must_be_beaten_by_more_than_the_minimum(
    tmp_path: Path, base: float, tuned: float, min_delta: float, promoted: bool
) -> None:
    run = compared(tmp_path, base, tuned)
    assert judge(run, GateArgs(metric="exact_match", min_delta=min_delta)).promoted is promoted
    assert require(run, GateArgs(metric="exact_match", min_delta=min_delta), force=True).promoted is promoted
    if not promoted:
        with pytest.raises(NotPromoted) as caught:
            require(run, GateArgs(metric="exact_match", min_delta=min_delta), force=False)
        assert caught.value.exit_code == 3


def test_the_verdict_tells_the_numbers(tmp_path: Path) -> None:
    verdict = judge(compared(tmp_path, 0.25, 0.125), GateArgs(metric="exact_match", min_delta=0.5))
    assert (
        verdict.sentence
        == "exact_match on test went from 0.25 to 0.125 (-0.125; the gate asks for more than +0.5)"
    )


def test_metric_and_split_are_those_asked_for(tmp_path: Path) -> None:
    run = compared(tmp_path, 20, 10, metric="bleu")
    assert not judge(run, GateArgs(metric="bleu")).promoted
    assert judge(run, GateArgs(metric="bleu", split="dev")).promoted


def test_a_metric_that_was_not_compared_is_refused_with_those_that_were(tmp_path: Path) -> None:
    run = compared(tmp_path, 20, 10, metric="bleu")
    with pytest.raises(RunError, match=r"not compared by rougeL on test; .* one of: bleu on dev, bleu on test"):
        judge(run, GateArgs(metric="rougeL"))


def test_a_run_that_was_not_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has not been compared with its base model; make eval and make eval-base"):
        judge(Run(tmp_path), GateArgs())


@pytest.mark.parametrize("stage", ["publish", "publish-hf"])
def test_what_does_not_beat_its_base_is_refused_and_nothing_is_written(
    copied: World, stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_REPO_ID", "me/ingot")
    monkeypatch.setenv("HF_TOKEN", "hf_token-of-the-tests")
    before = tree(copied.output.parent)
    assert copied.call(stage, "gate.min_delta=2") == 3
    said = capsys.readouterr().err
    assert said.startswith("not published: rougeL on test went from 0 to 1")
    assert "publish anyway with force=true" in said
    assert tree(copied.output.parent) == before


@pytest.mark.parametrize("word", ["force=true", "--force"])
def test_force_publishes_against_the_gate_and_the_card_says_so(copied: World, word: str) -> None:
    assert copied.call("publish", "gate.min_delta=2", word) == 0
    folder = copied.artifacts / "models" / "tiny-lora" / "latest"
    assert "**published against the gate**: rougeL on test" in (folder / "README.md").read_text()
    assert json.loads((folder / "manifest.json").read_text())["publication"]["promoted"] is False


@pytest.mark.parametrize("word", ["gate.metrik=bleu", "gate.metric=[bleu]", "gate=3"])
def test_a_gate_that_is_misspelt_is_refused(copied: World, word: str) -> None:
    assert copied.call("publish", word) == 2
    assert not (copied.artifacts / "models").exists()
