"""check-data: the report on the data of a run, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import AssayCommand
from tests.fixtures import World, chat, jsonl
from tests.fork_server import ForkServer

pytest_plugins = ["tests.fixtures", "tests.fork_server"]


def check(world: World, *words: str) -> int:
    places = [f"output_dir={world.output}", f"eval_path={world.splits}", f"model_name={world.model}"]
    from tests.fixtures import call

    return call("check-data", *places, f"dataset_path={world.data}", *words)


def report(world: World) -> dict[str, Any]:
    (folder,) = (world.output / "checks").iterdir()
    found: dict[str, Any] = json.loads((folder / "data_report.json").read_text())
    return found


def test_the_report_is_shown_and_kept(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(world) == 0
    shown = capsys.readouterr().out
    assert "16 in = 16 trained + 0 rejected" in shown
    assert "⟦TOP(a)<|end|>⟧" in shown
    assert "also in" in shown
    kept = report(world)
    assert (kept["rows_in"], kept["rows_trained"], kept["rejected"]) == (16, 16, [])
    (folder,) = (world.output / "checks").iterdir()
    assert "data_report.json" in {p.name for p in folder.iterdir()}
    assert (folder / "config_used.yaml").is_file()
    assert not (world.output / "runs").exists()


def test_a_training_shows_and_keeps_the_same(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(world) == 0
    checked = capsys.readouterr().out.split("16 of 16 rows")[0]
    run = world.train("max_steps=1")
    trained = capsys.readouterr().out
    assert checked.strip() in trained
    assert json.loads((run.path / "data_report.json").read_text()) == report(world)
    assert run.manifest["tokenization"] == json.loads((run.model / "tokenization.json").read_text())
    assert run.manifest["data"]["sources"] == [{"type": "local", "weight": 1}]


@pytest.mark.parametrize(
    ("row", "settings", "told"),
    [
        ({}, (), "x.jsonl:2 has no list of messages"),
        ({}, ("on_bad_row=skip", "strict_data=true"), "1 row is rejected: no_messages"),
        (chat("Top of ore rate?", "TOP(a)"), ("on_contamination=refuse",), "x.jsonl:2 is the exact duplicate of"),
    ],
)
def test_what_a_run_refuses_is_refused_after_the_report_is_written(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: Any,
    settings: tuple[str, ...],
    told: str,
) -> None:
    jsonl(tmp_path / "bad" / "x.jsonl", [chat("2+2?", "4"), row])
    words = (f"dataset_path={tmp_path / 'bad'}", *settings)
    assert check(world, *words) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert "2 in = 1 trained + 1 rejected" in said.out
    assert report(world)["rows_in"] == 2
    assert world.call("train", *words) == 2
    assert told in capsys.readouterr().err
    assert not (world.output / "runs").exists()


def test_bad_rows_are_refused_before_anything_heavy_is_loaded(assay: AssayCommand) -> None:
    jsonl(assay.cwd / "data" / "x.jsonl", [chat("2+2?", "4"), {"messages": []}])
    (assay.cwd / "data" / "eval").mkdir()
    from tests.conftest import HEAVY

    done = assay("train", "model_name=org/model", forbidden=HEAVY)  # a local model is looked at before
    assert done.returncode == 2
    assert "data/x.jsonl:2 has no list of messages (data_format=messages); fix the row" in done.stderr


def test_the_second_training_reads_its_tokens_from_the_cache(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.train("max_steps=1")
    monkeypatch.delattr("src.data.tokens._tokenize_batch")
    monkeypatch.delattr("src.data.loader._parse_batch")
    again = world.train("max_steps=1")
    weights = "adapter_model.safetensors"
    assert (again.model / weights).read_bytes() == (first.model / weights).read_bytes()


def test_the_report_is_written_when_every_row_is_too_long(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(world, "max_length=16") == 2
    said = capsys.readouterr()
    assert "no row is left to train on; raise max_length" in said.err
    assert "16 in = 0 trained + 16 rejected" in said.out
    assert "over max_length=16  16 rejected, 0 cut" in said.out
    assert "0, 0 of them with loss (0.0 %)" in said.out
    assert report(world)["tokens"] == {
        "total": 0,
        "with_loss": 0,
        "row_length": dict.fromkeys(("min", "p50", "p90", "p95", "p99", "max"), 0),
    }


def test_a_folder_that_cannot_be_written_is_refused_before_a_row_is_read(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert check(world, f"output_dir={tmp_path / 'file'}", f"dataset_path={tmp_path / 'nowhere'}") == 2
    said = capsys.readouterr().err
    assert "output_dir" in said
    assert "nowhere" not in said


def test_the_tokenizer_is_loaded_as_the_settings_say(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from src.model import tokenizer

    right, given = tokenizer.load_tokenizer, []

    def noted(*args: Any, **others: Any) -> Any:
        given.append(args)
        return right(args[0], **others)

    monkeypatch.setattr(tokenizer, "load_tokenizer", noted)
    assert check(world, "trust_remote_code=true") == 0
    assert given == [(str(world.model), None, True)]


def test_no_stdout_is_needed(world: World, fork_server: ForkServer) -> None:
    """A closed pipe, as of `make train | head`, ends nothing; a full disk, only what prints its result."""
    places = [f"output_dir={world.output}", f"eval_path={world.splits}", f"model_name={world.model}"]
    train = ["train", "max_steps=1", "cuda_visible_devices=''"]
    lost = "cannot be written to /dev/full: no space left", "warning: what was printed is incomplete"
    for words, stdout, expected, told in (
        (["check-data"], "without_a_reader", 0, ""),
        (train, "without_a_reader", 0, ""),
        (["check-data"], "on_a_full_disk", 2, lost[0]),
        (train, "on_a_full_disk", 0, lost[1]),
    ):
        fork_server.start(*words, *places, f"dataset_path={world.data}", calls=(f"tests.fork_server:{stdout}",))
        code, said = fork_server.end()
        assert code == expected and told in said and "Traceback" not in said, said
    assert [run.status for run in world.runs] == ["finished"] * 2
    log = (world.newest.logs / "run.log").read_text()
    assert "cannot write to /dev/full: no space left on device" in log
    assert len(list((world.output / "checks").iterdir())) == 2
