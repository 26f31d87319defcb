"""An evaluation that is interrupted at any moment resumes, and gives the same predictions byte for byte."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from src import runs
from src.errors import RunError
from src.eval.partial_results import SUFFIX, PartialResults
from tests.fixtures import World, evals, jsonl, read_jsonl, tree
from tests.fork_server import ForkServer, KillPoint

pytest_plugins = ["tests.fixtures", "tests.fork_server"]

Capture = pytest.CaptureFixture[str]
SAMPLED = ("generation.do_sample=true", "generation.temperature=3.0", "eval_batch_size=8", "max_examples=12")


def predictions(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if name.endswith(".predictions.jsonl")}


def left(world: World) -> list[Path]:
    return sorted(world.output.parent.rglob(f"*{SUFFIX}"))


@pytest.mark.parametrize(
    ("moment", "kept"),
    [
        (KillPoint("src.eval.partial_results:Part.add", 1, after=True), 8),  # of the base, in its first split
        (
            KillPoint("src.eval.evaluator:_write_evaluation", 2, after=True),
            72,
        ),  # all but the metrics of the run
    ],
)
def test_a_killed_evaluation_resumes_to_the_same_bytes(
    copied: World, fork_server: ForkServer, capsys: Capture, moment: KillPoint, kept: int
) -> None:
    run = copied.newest
    uninterrupted = copied.copy(copied.output.parent / "uninterrupted")
    assert uninterrupted.call("eval", str(uninterrupted.newest.path), *SAMPLED) == 0
    words = ("eval", *copied.settings("eval"), str(run.path), *SAMPLED)
    code, output = fork_server(*words, kill_points=(moment,))
    assert code == -signal.SIGKILL, output
    for path in left(copied):
        with path.open("a") as file:
            file.write('{"part": "adversarial", "rows": [[0, {"predic')  # as a kill during a write leaves it
    capsys.readouterr()
    assert copied.call("eval", str(run.path), *SAMPLED) == 0
    assert f"resuming with {kept} rows" in capsys.readouterr().out
    assert predictions(evals(run)) == predictions(evals(uninterrupted.newest))
    ours, theirs = (w.artifacts / "metrics" for w in (copied, uninterrupted))
    assert predictions(ours) == predictions(theirs)
    assert left(copied) == []
    of_tuned = json.loads((run.path / "metrics.json").read_text())["generated"]["answers_kept"]
    assert of_tuned == (36 if kept == 72 else 0)


def test_a_killed_baseline_resumes(world: World, fork_server: ForkServer, capsys: Capture) -> None:
    words = ("eval-baseline", *world.settings("eval-baseline"), "splits=[test]", "eval_batch_size=8")
    code, output = fork_server(
        *words, kill_points=(KillPoint("src.eval.partial_results:Part.add", 2, after=True),)
    )
    assert code == -signal.SIGKILL, output
    assert len(left(world)) == 1
    assert world.call("eval-baseline", "splits=[test]", "eval_batch_size=8") == 0
    assert "resuming with 16 rows" in capsys.readouterr().out
    assert left(world) == []


def test_an_evaluation_of_a_bare_folder_resumes_in_its_run(
    world: World, tiny: Path, fork_server: ForkServer, capsys: Capture
) -> None:
    words = ("eval", *world.settings("eval"), str(tiny), "splits=[test]", "eval_batch_size=8")
    fork_server(*words, kill_points=(KillPoint("src.eval.partial_results:Part.add", 1, after=True),))
    run = world.newest
    assert run.status == runs.INTERRUPTED
    assert world.call("eval", str(tiny), "splits=[test]", "eval_batch_size=8") == 0
    assert "resuming with 8 rows" in capsys.readouterr().out
    assert world.runs == [run]
    assert run.status == runs.FINISHED


def test_overwrite_and_other_conditions_start_again(
    copied: World, fork_server: ForkServer, capsys: Capture
) -> None:
    words = ("eval", *copied.settings("eval"), "splits=[test]", "baseline=never")
    for more in (["overwrite_answers=true"], ["max_new_tokens=15"]):
        fork_server(*words, kill_points=(KillPoint("src.eval.partial_results:Part.add", 1, after=True),))
        assert len(left(copied)) == 1
        assert copied.call("eval", "splits=[test]", "baseline=never", *more) == 0
        assert "resuming" not in capsys.readouterr().out
        assert left(copied) == []


# --- the file --------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Iterator[PartialResults]:
    found = PartialResults(tmp_path / f"x{SUFFIX}", {"who": 1})
    yield found
    found.close()


def test_two_processes_do_not_write_one_file(file: PartialResults) -> None:
    file.part("test").add({0: {"prediction": "a"}})
    with pytest.raises(RunError, match="another process runs the same evaluation"):
        PartialResults(file.path, {"who": 1})
    assert len(read_jsonl(file.path)) == 2


def test_a_part_that_restarts_discards_the_rows_of_larger_batches(file: PartialResults) -> None:
    file.part("test").add({0: {"prediction": "a"}, 1: {"prediction": "b"}})
    file.part("dev").add({0: {"prediction": "c"}})
    file.part("test").restart(1)
    file.part("test").add({1: {"prediction": "d"}})
    file.close()
    again = PartialResults(file.path, {"who": 1})
    assert (again.part("test").rows, again.part("test").size) == ({1: {"prediction": "d"}}, 1)
    assert (again.part("dev").rows, again.part("dev").size) == ({0: {"prediction": "c"}}, None)
    again.close()


def test_no_secret_is_in_the_file_and_the_predictions_are_restored(
    file: PartialResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    file.part("test").add({0: {"prediction": "say hf_abcdefghij"}})
    file.close()
    assert "hf_abcdefghij" not in file.path.read_text()
    again = PartialResults(file.path, {"who": 1})
    assert again.part("test").rows[0] == {"prediction": "say hf_abcdefghij"}
    again.close()


def test_a_file_of_another_version_of_the_model_is_discarded(file: PartialResults) -> None:
    file.part("test").add({0: {"prediction": "a"}})
    file.close()
    other = PartialResults(file.path, {"who": 2})
    assert other.part("test").rows == {}
    other.close()
    assert not file.path.exists()


def test_files_of_other_conditions_are_removed_with_the_next_evaluation(world: World) -> None:
    folder = world.artifacts / "metrics"
    assert world.call("eval-baseline", "splits=[test]", "max_examples=1") == 0
    (kept,) = folder.iterdir()
    same_model = jsonl(folder / f"{kept.name[:-12]}{'0' * 12}{SUFFIX}", [{}])
    other_model = jsonl(folder / f"other-{'0' * 8}-{'0' * 12}{SUFFIX}", [{}])
    assert world.call("eval-baseline", "splits=[test]", "max_examples=2") == 0
    assert not same_model.exists()
    assert other_model.exists()
