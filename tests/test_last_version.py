"""What the previous version wrote is still read: a finished and an interrupted run, a baseline, a published model.

`last_version.tar.xz` was made by that version on a CPU: `train`, `eval` and `publish` of run FINISHED (10 epochs),
and `train` of run STOPPED (30 epochs), which SIGTERM ended after step 51 of 120. Both used settings that have
another name today: near_threshold, data_workers, allow_other_base, gate.reload_examples.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from src.eval import evaluations
from src.runs import Run
from tests.fixtures import ROOT, call, tree

FINISHED, STOPPED = "2026-11-30_13-19-20", "2026-11-30_13-20-29"
OUTPUT = ("output_dir=outputs", "cuda_visible_devices=''")
ARTIFACTS = "artifacts_dir=artifacts"
EVALUATION = (*OUTPUT, ARTIFACTS, "eval_path=eval", "bf16=false", "max_new_tokens=16")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, as the previous version left it."""
    with tarfile.open(ROOT / "tests" / "last_version.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def manifest(folder: Path, run: str) -> dict[str, object]:
    found = json.loads((folder / "outputs" / "runs" / run / "manifest.json").read_text())
    assert isinstance(found, dict)
    return found


def test_runs_lists_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("runs", "outputs") == 0
    lines = {
        run: line for line in capsys.readouterr().out.splitlines() for run in (FINISHED, STOPPED) if run in line
    }
    assert "promoted" in lines[FINISHED]
    assert "stopped" in lines[STOPPED]


def test_a_finished_run_is_evaluated_against_the_cached_baseline(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "outputs" / "runs" / FINISHED
    before, baseline = json.loads((run / "metrics.json").read_text()), tree(folder / "artifacts" / "metrics")
    assert call("eval", *EVALUATION, f"model_path={run}", "overwrite_answers=true") == 0
    assert "promoted: rougeL on test rose from 0.000 to 1.000" in capsys.readouterr().out
    after = json.loads((run / "metrics.json").read_text())
    assert {key: after[key] for key in ("eval", "conditions")} == {
        key: before[key] for key in ("eval", "conditions")
    }
    assert tree(folder / "artifacts" / "metrics") == baseline, "the base model was evaluated again"


def test_a_finished_run_keeps_its_evaluation_when_it_is_evaluated_otherwise(folder: Path) -> None:
    run = Run(folder / "outputs" / "runs" / FINISHED)
    before = {path.name: path.read_bytes() for path in (run.path / "evals").glob("*.predictions.jsonl")}
    assert call("eval", FINISHED, *EVALUATION, "splits=[dev]", "baseline=never") == 0
    newest, former = evaluations.all_of(run)
    assert newest.result["eval"].keys() == {"dev"} and former.result["eval"].keys() > {"dev"}
    assert {path.name: path.read_bytes() for path in former.folder.glob("*.predictions.jsonl")} == before


@pytest.mark.parametrize("stage", ["compare", "report", "validate"])
def test_a_finished_run_passes_every_stage_that_reads_it(folder: Path, stage: str) -> None:
    places = OUTPUT if stage == "validate" else (OUTPUT[0], ARTIFACTS)
    words = (FINISHED,) if stage == "compare" else (f"model_path=outputs/runs/{FINISHED}",)
    assert call(stage, *words, *places) == 0


def test_a_finished_run_is_published(folder: Path) -> None:
    old = folder / "artifacts" / "models" / "tiny-lora" / FINISHED
    shutil.move(old, folder / "old")
    assert call("publish", *OUTPUT, ARTIFACTS, f"model_path=outputs/runs/{FINISHED}") == 0
    assert (old / "adapter_model.safetensors").read_bytes() == (
        folder / "old" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_published_model_is_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("eval", *EVALUATION, f"model_path=artifacts/models/tiny-lora/{FINISHED}") == 0
    assert "promoted: rougeL on test rose from 0.000 to 1.000" in capsys.readouterr().out


def test_an_interrupted_run_is_resumed_in_its_directory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = folder / "outputs" / "runs"
    assert call("train", f"resume={STOPPED}", "output_dir=outputs") == 0
    printed = capsys.readouterr()
    assert {path.name for path in runs.iterdir() if not path.is_symlink()} == {FINISHED, STOPPED}
    assert manifest(folder, STOPPED)["status"] == "finished"
    steps = [line.split()[1] for line in printed.out.splitlines() if line.startswith("step ")]
    assert steps[0] == "52/120" and steps[-1] == "120/120"
    assert "is now" not in printed.out + printed.err, "nobody typed an old name"


def test_the_recorded_settings_of_a_run_are_a_configuration(folder: Path) -> None:
    run = folder / "outputs" / "runs" / FINISHED
    recorded = ("--config-path", str(run), "--config-name", "config_used")
    assert call("train", *recorded, "resume=never", "output_dir=again") == 0
    (again,) = (path for path in (folder / "again" / "runs").iterdir() if not path.is_symlink())
    assert (again / "model" / "adapter_model.safetensors").is_file()
