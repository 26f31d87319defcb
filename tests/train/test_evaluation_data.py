"""The evaluation data of a training run: rows that it holds out, the files beside its data, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.runs import Run
from src.utils.files import read_json, sha256, write_json
from tests.fixtures import ANSWER, ON_CPU, ROOT, World, call, chat, curves, jsonl, read_jsonl

pytest_plugins = ["tests.fixtures"]

NAMES = [f"{a} {b}" for a in ("ash", "elm", "oil", "ore") for b in range(12)]
SHORT = ("max_steps=2", "eval_path=null")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Training data of the user's own, without evaluation data."""
    return jsonl(
        tmp_path / "mine" / "rows.jsonl", (chat(f"Top of {name}?", ANSWER, system="Be brief.") for name in NAMES)
    )


def check(world: World, data: Path, *words: str) -> int:
    places = (f"output_dir={world.output}", f"model_name={world.model}", f"dataset_path={data}")
    return call("check-data", *places, *words)


def held_out(run: Run) -> list[Any]:
    return read_jsonl(run.path / "held_out" / "test.jsonl")


def test_a_run_writes_the_rows_that_it_holds_out_and_repeats_and_resumes_with_the_same(
    world: World, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"dataset_path={mine}", *SHORT, "eval_split=0.25", "dev_split=test", "load_best_model_at_end=true")
    run = world.train(*words)
    file = run.path / "held_out" / "test.jsonl"
    rows = held_out(run)
    assert len(rows) == 12 and all(row["messages"][0]["content"] == "Be brief." for row in rows)
    assert run.manifest["evaluation_data"] == {
        "path": None, "held_out": "held_out/test.jsonl", "files": {"test": sha256(file)},
    }  # fmt: skip
    report = read_json(run.path / "data_report.json")
    assert (report["rows_in"], report["rows_trained"], report["rows_held_out"]) == (48, 36, 12)
    assert report["held_out"]["sha256"] == sha256(file) == run.manifest["data"]["held_out"]["sha256"]
    assert [step for step, _ in curves(run)["eval/loss"]] == [2]
    shown = capsys.readouterr().out
    assert "48 in = 36 trained + 0 rejected + 12 held out" in shown and "no evaluation data" not in shown
    assert "load_best_model_at_end chooses the model on the split test, by which the gate judges it" in shown

    places = (f"output_dir={world.output}", f"artifacts_dir={world.artifacts}", *ON_CPU)
    assert call("eval", run.id, *places, "max_new_tokens=4") == 0
    assert "12</b> held out" in (run.path / "report.html").read_text(encoding="utf-8")
    judged = read_json(run.path / "comparison.json")
    assert judged["conditions"]["data"] == {"test": sha256(file)}
    assert (judged["verdict"]["split"], judged["verdict"]["examples"]) == ("test", 12)

    assert call("train", "--config-path", str(run.path), "--config-name", "config_used", "resume=never") == 0
    repeated = world.newest
    assert repeated.id != run.id and held_out(repeated) == rows
    assert (repeated.model / "adapter_model.safetensors").read_bytes() == (
        run.model / "adapter_model.safetensors"
    ).read_bytes()

    write_json(repeated.path / "manifest.json", repeated.manifest | {"status": "interrupted"})
    file = repeated.path / "held_out" / "test.jsonl"
    file.unlink()  # written again from the same choice
    assert world.train(*words).id == repeated.id
    assert held_out(repeated) == rows
    manifest = read_json(repeated.path / "manifest.json")
    manifest["data"]["held_out"]["sha256"] = "0" * 64
    write_json(repeated.path / "manifest.json", manifest | {"status": "interrupted"})
    assert world.train(*words).id not in (run.id, repeated.id)  # the rows that it trained on cannot be known


def test_evaluation_files_beside_the_data_are_taken_and_rows_held_out_get_another_name(
    world: World, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"prompt": f"Top of {NAMES[0]}?", "completion": ANSWER}]
    file = jsonl(mine.parent / "eval" / "test.jsonl", asked)
    run = world.train(f"dataset_path={mine.parent}", *SHORT, "eval_split=20")
    assert run.manifest["evaluation_data"] == {
        "path": str(file.parent),
        "held_out": "held_out/held_out.jsonl",
        "files": {"test": sha256(file), "held_out": sha256(run.path / "held_out" / "held_out.jsonl")},
    }
    assert f"eval_path: {file.parent}" in (run.path / "config_used.yaml").read_text()
    report = read_json(run.path / "data_report.json")
    assert (report["rows_trained"], report["rows_held_out"]) == (27, 20)
    assert report["rejected_by_reason"] == {"contamination": 1}
    assert "no evaluation loss: there is no split dev (there is test, held_out); dev_split=test" in (
        " ".join(capsys.readouterr().out.split())
    )


def test_check_data_shows_and_writes_the_rows_that_are_held_out(
    world: World, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(world, mine, "eval_split=9") == 0
    shown = capsys.readouterr().out
    assert "eval_split=9 holds out 9 rows, and a verdict needs 20 or more" in shown
    assert "9 as the split test, by eval_split=9 and seed=42" in shown
    (folder,) = (world.output / "checks").iterdir()
    assert len(read_jsonl(folder / "held_out" / "test.jsonl")) == 9


def test_without_evaluation_data_a_line_names_both_remedies(
    world: World, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.train(f"dataset_path={mine}", *SHORT)
    assert run.manifest["evaluation_data"] == {"path": None, "held_out": None, "files": {}}
    shown = " ".join(capsys.readouterr().out.split())
    told = "no evaluation data: the run cannot be judged; eval_split=0.1 holds rows out for it, or eval_path names"
    assert shown.count(told) == 2  # and once more at the end
    (mine.parent / "eval").symlink_to(ROOT / "data" / "eval")
    assert check(world, mine) == 0
    assert f"no evaluation data ({mine.parent / 'eval'} belongs to other training files)" in (
        " ".join(capsys.readouterr().out.split())
    )


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("eval_path=nowhere",), "eval_path nowhere is not a folder or a file"),
        (
            ("load_best_model_at_end=true",),
            "load_best_model_at_end needs an evaluation loss, and there is no",
        ),
        (("early_stopping_patience=2", "eval_split=5"), "there is no split dev (there is test); dev_split=test"),
        (
            ("search=lora", "eval_split=5"),
            "search.metric=eval_loss needs an evaluation loss, and there is no",
        ),
        (("eval_split=48",), "eval_split=48 of 48 rows that can be held out leaves none to train on"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    world: World, mine: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], problem: str
) -> None:
    assert world.call("train", f"dataset_path={mine}", *SHORT, *words) == 2
    assert problem in " ".join(capsys.readouterr().err.split())
    assert not world.runs
