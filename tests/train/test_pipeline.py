"""A training run: its directory records everything, its command reproduces the same bytes, and what cannot be
trained is refused before anything is written."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.model.source import content_hash
from src.runs import Run
from src.runs_table import format_runs
from src.train.checkpoint import COMPLETE
from tests.fixtures import EPOCHS, LESSON, ROOT, STEPS, TRAINED_ON, World, call, chat, curves, evals, jsonl, tree

pytest_plugins = ["tests.fixtures"]


@pytest.fixture
def run(finished: World) -> Run:
    return finished.newest


def read(run: Run, name: str) -> Any:
    return json.loads((run.path / name).read_text(encoding="utf-8"))


# --- the run directory -----------------------------------------------------------------------------------


def test_a_run_writes_every_file_of_a_run_directory(run: Run) -> None:
    files = set(tree(run.path))
    assert files >= {
        "config_used.yaml", "manifest.json", "data_report.json", "metrics.json", "comparison.json", "logs/run.log",
        "model/adapter_model.safetensors", "model/adapter_config.json", "model/tokenizer.json",
        "model/tokenizer_config.json", "model/chat_template.jinja",
    }  # fmt: skip
    assert {file.name for file in evals(run).iterdir()} == {
        "test.predictions.jsonl", "dev.predictions.jsonl", "adversarial.predictions.jsonl", "metrics.json",
        "comparison.json", "config_used.yaml",
    }  # fmt: skip
    assert [p for p in (run.path / "checkpoints").iterdir() if not (p / COMPLETE).is_file()] == []
    assert len(list((run.path / "checkpoints").iterdir())) == 2
    assert not [f for f in files if f.endswith(".tmp") or f.endswith(".old")]
    assert (run.path.parent / "latest").resolve() == run.path.resolve()
    modes = {p.stat().st_mode for p in run.path.rglob("*") if p.is_file()}
    assert modes == {(run.path / "manifest.json").stat().st_mode}  # weights and checkpoints, too


def test_the_manifest_records_inputs_settings_and_versions(run: Run, finished: World) -> None:
    manifest = run.manifest
    lessons = finished.data / "lessons.jsonl"
    assert (manifest["run"], manifest["stage"], manifest["status"]) == (run.path.name, "train", "finished")
    assert (manifest["method"], manifest["seed"]) == ("lora", 42)
    assert manifest["base_model"] == {"name": str(finished.model), "revision": content_hash(finished.model)}
    assert manifest["precision"] == {"value": "float32", "reason": "bf16=false"}
    assert manifest["data"]["sources"] == [{"type": "local", "weight": 1}]
    assert manifest["data"]["files"] == [
        {
            "file": str(lessons),
            "sha256": hashlib.sha256(lessons.read_bytes()).hexdigest(),
            "format": "messages",
            "rows_in": len(TRAINED_ON),
            "rows_trained": len(TRAINED_ON),
        }
    ]
    assert datetime.fromisoformat(manifest["started"]) <= datetime.fromisoformat(manifest["ended"])
    for package in ("torch", "transformers", "peft"):
        assert manifest["packages"][package] == version(package)
    assert manifest["hardware"]["python"] == sys.version.split()[0]
    assert manifest["hardware"]["memory_gib"] > 0
    assert manifest["evaluation"]["status"] == "finished"


def test_the_manifest_names_the_commit_of_the_code(run: Run) -> None:
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert run.manifest["code"]["commit"] == (asked.stdout.strip() or None)


def test_the_report_accounts_for_every_row(world: World, tmp_path: Path) -> None:
    rows = [chat("Top?", "TOP(a)"), {}, chat("Top?", "TOP(a)" * 100), chat("Top of b?", "TOP(a)")]
    data = jsonl(tmp_path / "data" / "rows.jsonl", rows)
    run = world.train(f"dataset_path={data.parent}", "on_bad_row=skip", "max_length=64", "max_steps=1")
    report = read(run, "data_report.json")
    assert (report["rows_in"], report["rows_trained"]) == (4, 2)
    assert {(r["file"], r["line"], r["reason"]) for r in report["rejected"]} == {
        (str(data), 2, "no_messages"),
        (str(data), 3, "over_length"),
    }
    log = (run.logs / "run.log").read_text()
    assert f"rejected: {data}:2 has no list of messages" in log
    assert f"rejected: {data}:3 has " in log


def test_the_curves_are_in_tensorboard(run: Run) -> None:
    shown = curves(run)
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"):
        assert [step for step, _ in shown[tag]] == list(range(2, STEPS + 1, 2)), tag
        assert all(value >= 0 for _, value in shown[tag]), tag
    assert [step for step, _ in shown["eval/loss"]] == list(range(4, STEPS + 1, 4))
    scores = read(run, "metrics.json")["eval"]
    for split, of in scores.items():
        for metric, value in of.items():
            assert shown[f"eval_{split}/{metric}"] == [(STEPS, pytest.approx(value))]


def test_the_numbers_are_those_of_the_curves(run: Run) -> None:
    figures = read(run, "metrics.json")["train"]
    losses = [value for _, value in curves(run)["train/loss"]]
    assert figures["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert figures["eval_loss"] == pytest.approx(curves(run)["eval/loss"][-1][1])
    assert figures["tokens"] == EPOCHS * read(run, "data_report.json")["tokens"]["total"]


def test_the_text_log_holds_the_run_from_its_first_line(run: Run) -> None:
    log = (run.logs / "run.log").read_text()
    assert f"{len(TRAINED_ON)} usable rows in 1 file; base model" in log
    assert "precision float32 (bf16=false)" in log
    assert f"run {run.path}\n" in log
    assert f"step {STEPS}/{STEPS}" in log
    assert f"model in {run.model}" in log


def test_each_line_of_the_log_says_how_long_it_still_takes_until_the_last(run: Run) -> None:
    lines = [x for x in (run.logs / "run.log").read_text().splitlines() if f"/{STEPS} " in x and " loss " in x]
    assert len(lines) > 2 and not lines[-1].endswith(" left")
    assert all(re.search(r"  [\d,.]+ tokens/s  ([1-4] min )?[\d.]+ s left$", line) for line in lines[:-1])


# --- the same again --------------------------------------------------------------------------------------


def test_two_runs_started_at_once_get_two_directories_and_make_the_same_bytes(world: World, run: Run) -> None:
    # Sets are iterated in another order in another process: PYTHONHASHSEED makes that sure.
    children = [world.start("train", PYTHONHASHSEED=str(seed)) for seed in (1, 2)]
    for child in children:
        said = child.communicate(timeout=240)[0]
        assert child.returncode == 0, said
    first, second = world.runs
    assert (first.status, second.status) == ("finished", "finished")
    assert tree(first.model) == tree(second.model) == tree(run.model)
    assert world.newest.path in (first.path, second.path)


def test_another_seed_makes_another_adapter(world: World, run: Run) -> None:
    other = tree(world.train("seed=7").model)
    ours = tree(run.model)
    assert other.keys() == ours.keys()
    assert {name for name in ours if ours[name] != other[name]} == {"adapter_model.safetensors"}


def test_the_configuration_of_a_run_repeats_the_run(world: World, run: Run) -> None:
    again = [f"output_dir={world.output}", f"artifacts_dir={world.artifacts}"]
    assert call("train", "--config-path", str(run.path), "--config-name", "config_used", *again) == 0
    assert tree(world.newest.model) == tree(run.model)
    used, before = (yaml.safe_load((r.path / "config_used.yaml").read_text()) for r in (world.newest, run))
    places = {"output_dir", "artifacts_dir"}
    assert {k: v for k, v in used.items() if k not in places} == {
        k: v for k, v in before.items() if k not in places
    }


def test_the_configuration_used_says_every_setting(run: Run) -> None:
    from src.config import defaults

    used = yaml.safe_load((run.path / "config_used.yaml").read_text())
    assert used.keys() == defaults("train").keys()
    for word in LESSON:
        key, value = word.split("=")
        assert used[key] == pytest.approx(float(value))


# --- what cannot be trained ------------------------------------------------------------------------------


def refused(world: World, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Train with settings that are refused, check that no run is left, and return stderr."""
    capsys.readouterr()
    assert world.call("train", *words) == 2
    assert {p.name for p in world.output.glob("*")} <= {"cache"}
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_target_that_matches_nothing_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(world, capsys, "lora_target_modules=[q_proj,c_attn]")
    assert "c_attn matches no layer of this model, which has down_proj" in said


def test_rows_that_are_all_too_long_are_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(world, capsys, "max_length=8")
    assert f"{world.data / 'lessons.jsonl'}:16 has " in said
    assert "raise max_length" in said


def test_bad_rows_are_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path / "data" / "rows.jsonl", [chat("Top?", "TOP(a)"), {}, chat("Top?")])
    said = refused(world, capsys, f"dataset_path={path.parent}")
    assert f"{path}:2 has no list of messages" in said
    assert f"{path}:3 has no assistant turn" in said


def test_a_bad_row_in_the_dev_split_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "eval" / "dev.jsonl", [{"prompt": "Top?"}])
    assert f"{path}:1 has no text under 'completion'" in refused(world, capsys, f"eval_path={path.parent}")


def test_training_on_the_evaluation_split_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"dataset_path={world.splits}", "data_format=prompt_completion"]
    said = refused(world, capsys, *words)
    for split in ("test", "dev", "adversarial"):
        assert f"training file {world.splits / split}.jsonl is the evaluation file" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dataset_path=nowhere"], "dataset_path nowhere is not a folder"),
        (["dataset_pattern=*.csv"], "it holds lessons.jsonl"),
        (["num_processes=999"], "num_processes=999, but this machine has no GPU of cuda_visible_devices='' and"),
        (["data_source.type=lakefs"], "data_source.type=lakefs names no server"),
        (["data_source.repo=x"], "data_source.repo is not supported with data_source.type=local"),
        (["model_name=./nowhere"], "model_name ./nowhere does not exist"),
        (["lora_rr=4", "epochs=0"], "lora_rr is not a setting; did you mean lora_r?"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    world: World, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert told in refused(world, capsys, *words)


@pytest.mark.parametrize("word", ["trainer.log_level=nonsense", "peft.bias=nonsense"])
def test_a_further_argument_of_the_wrong_value_is_refused(
    world: World, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert "nonsense" in refused(world, capsys, word)


def test_a_refused_run_leaves_the_newest_run_alone(copied: World) -> None:
    before = tree(copied.output)
    assert copied.call("train", "lora_target_modules=[c_attn]") == 2
    assert tree(copied.output) == before


def test_an_unexpected_error_is_recorded_and_keeps_its_traceback(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("one in a million")

    monkeypatch.setattr("transformers.Trainer.training_step", broken)
    with pytest.raises(ZeroDivisionError):
        world.call("train")
    (run,) = world.runs
    assert run.status == "failed"
    assert run.manifest["error"] == "ZeroDivisionError: one in a million"
    assert run.manifest["ended"]
    assert not run.model.exists()
    assert "failed: ZeroDivisionError: one in a million" in format_runs(world.output)


# --- the path from the command to the trainer ------------------------------------------------------------


def test_seven_files_at_most_are_on_the_stack_when_training_starts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TrainingStarts(Exception):
        pass

    path: list[str] = []

    def enter(*_: Any, **__: Any) -> None:
        called = [Path(frame.filename) for frame in inspect.stack()]
        sources = [file.relative_to(ROOT).as_posix() for file in called if file.is_relative_to(ROOT / "src")]
        path.extend(dict.fromkeys(reversed(sources)))
        raise TrainingStarts

    monkeypatch.setattr("transformers.Trainer.train", enter)
    monkeypatch.chdir(ROOT)
    with pytest.raises(TrainingStarts):
        call("train", "experiment=smoke", f"model_name={tiny}", f"output_dir={tmp_path / 'outputs'}")
    print("\n".join(path))
    assert path[0] == "src/main.py" and "src/train/pipeline.py" in path
    assert len(path) <= 7, path
