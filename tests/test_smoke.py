"""The complete pipeline: a tiny model in seconds, and the demo's real model, which learns a language."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from src.main import main
from src.runs import Run
from tests.fixtures import ROOT, call, curves, evals, read_jsonl

pytest_plugins = ["tests.fixtures"]

Said = pytest.CaptureFixture[str]
FORMULA = re.compile(r"[A-Z]+\(")


def shows_a_comparison(said: str) -> bool:
    """Whether a metric was printed with its base, its tuned value and the difference with its interval."""
    return bool(re.search(r"rougeL +0-1 +[\d.]+ +[\d.]+ +[+-][\d.]+ .* to ", said.replace("│", " ")))


def newest(output: Path) -> Run:
    return Run((output / "runs" / "latest").resolve())


def test_the_complete_pipeline_on_a_tiny_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(ROOT)  # the shipped presets name data/ and data/eval
    places = (f"output_dir={tmp_path / 'outputs'}", f"artifacts_dir={tmp_path / 'artifacts'}")
    brief = (*places, "max_new_tokens=8", "max_examples=4", "bf16=false", "cuda_visible_devices=''")

    assert call("train", "experiment=smoke", f"model_name={tiny}", *places) == 0
    run = newest(tmp_path / "outputs")
    assert json.loads((run.path / "data_report.json").read_text())["rows_trained"] == 20
    assert call("eval", *brief, "baseline=cached") == 0
    assert not shows_a_comparison(capsys.readouterr().out)
    assert call("eval-baseline", f"model_name={tiny}", *brief) == 0
    assert shows_a_comparison(capsys.readouterr().out)
    assert (run.path / "comparison.json").exists()

    # Four examples are too few for a verdict.
    assert call("publish", *places) == 4
    assert not (tmp_path / "artifacts" / "models").exists()
    assert call("publish", *places, "--force") == 0
    assert (tmp_path / "artifacts" / "models" / "tiny-lora" / "latest" / "adapter_model.safetensors").is_file()
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "outputs")]) == 0
    assert re.search(rf"^{run.id} .* finished +lora .* inconclusive ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.smollm2
def test_the_demo_model_learns_the_formula_language(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(ROOT)
    places = (f"output_dir={tmp_path / 'outputs'}", f"artifacts_dir={tmp_path / 'artifacts'}")
    brief = (
        *places,
        "eval_path=data/eval",
        "splits=[test]",
        "max_examples=8",
        "max_new_tokens=32",
        "cuda_visible_devices=''",
    )
    steps = ("max_steps=12", "batch_size=8", "lr=0.003", "warmup_ratio=0", "logging_steps=2", "save_steps=1000")

    def answers(folder: Path) -> list[str]:
        rows: list[Any] = read_jsonl(folder / "test.predictions.jsonl")
        return [row["prediction"] for row in rows]

    words = ("data=ingot", f"model_name={smollm2}", "eval_path=none", "cuda_visible_devices=''")
    assert call("train", *words, *steps, *places) == 0
    run = newest(tmp_path / "outputs")
    losses = [value for _, value in curves(run)["train/loss"]]
    assert losses[0] > 2 * losses[-1]

    assert call("eval", *brief) == 0
    assert call("eval-baseline", f"model_name={smollm2}", *brief) == 0
    tuned = answers(evals(run))
    base = answers(next((tmp_path / "artifacts" / "metrics").iterdir()))
    assert len(tuned) == len(base) == 8
    assert sum(bool(FORMULA.match(text)) for text in tuned) >= 4
    assert not any(FORMULA.match(text) for text in base)

    assert shows_a_comparison(capsys.readouterr().out)
    gate = ("gate.min_examples=8", "gate.guards=[]", "cuda_visible_devices=''")
    assert call("publish", *gate, *places) == 0
    assert "promoted: rougeL on test rose from 0." in capsys.readouterr().out
