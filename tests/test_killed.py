"""A run that is stopped by a kill, Ctrl-C or a full disk is marked so afterwards; earlier results are intact."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from src import runs
from src.main import main
from src.runs import Run
from tests.fixtures import World, evals, tree
from tests.fork_server import ForkServer, KillPoint

pytest_plugins = ["tests.fixtures", "tests.fork_server"]

Said = pytest.CaptureFixture[str]
PATIENCE = 300  # seconds until a child that does not come to the point is given up


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`started(child, until)` waits for the moment; none of the children outlives the test."""
    children: list[subprocess.Popen[str]] = []

    def wait(child: subprocess.Popen[str], until: Callable[[], bool]) -> subprocess.Popen[str]:
        children.append(child)
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() < deadline, "the moment to stop it never came"
            time.sleep(0.02)
        return child

    yield wait
    for child in children:
        child.kill()
        child.wait()


def end(child: subprocess.Popen[str], how: signal.Signals) -> tuple[int, str]:
    child.send_signal(how)
    try:
        said = child.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGABRT)  # faulthandler says where it hangs
        pytest.fail(f"{how.name} did not end it:\n{child.communicate()[0][-5000:]}")
    return child.returncode, said


def newest_of(world: World, older: Run) -> Run | None:
    return next((run for run in world.runs if run.id != older.id), None)


def has_trained_a_step(world: World, older: Run) -> Callable[[], bool]:
    def look() -> bool:
        run = newest_of(world, older)
        log = run.logs / "run.log" if run else Path()
        return log.is_file() and "step 2/" in log.read_text()

    return look


def assert_interrupted_and_all_else_works(world: World, older: Run, capsys: Said) -> None:
    """The newest run says that it was interrupted; the older one is evaluated; a new one trains."""
    run = newest_of(world, older)
    assert run is not None
    assert json.loads((run.path / "manifest.json").read_text())["run"] == run.id
    assert run.status == runs.INTERRUPTED
    assert not run.model.exists()
    assert world.newest.id == run.id

    capsys.readouterr()
    assert main(["runs", str(world.output)]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith(f"{run.id} ")]
    assert " interrupted" in line

    assert world.call("eval", "splits=[test]", "max_examples=1") == 0
    assert f"evaluating run {older.id} " in capsys.readouterr().out
    assert world.call("eval", str(run.path)) == 2
    assert f"the model of run {run.id} does not exist: the run is interrupted" in capsys.readouterr().err
    assert world.train("max_steps=1").status == runs.FINISHED


def test_a_run_killed_in_training_is_marked_interrupted(
    copied: World, fork_server: ForkServer, capsys: Said
) -> None:
    older = copied.newest
    moment = KillPoint("src.train.fit:AssayTrainer.compute_loss", nth=9)
    code, said = fork_server("train", *copied.settings("train"), kill_points=(moment,))
    assert code == -signal.SIGKILL, said
    assert_interrupted_and_all_else_works(copied, older, capsys)


def test_a_run_killed_while_it_saves_leaves_no_half_model(
    copied: World, fork_server: ForkServer, capsys: Said
) -> None:
    older = copied.newest
    moment = KillPoint("src.train.pipeline:write_json", nth=2)  # weights and tokenizer are written by then
    code, said = fork_server("train", *copied.settings("train"), "epochs=1", kill_points=(moment,))
    assert code == -signal.SIGKILL, said
    broken = newest_of(copied, older)
    assert broken is not None
    written = [p for p in broken.path.rglob("adapter_model.safetensors") if broken.checkpoints not in p.parents]
    assert written  # the weights were written before the kill
    assert_interrupted_and_all_else_works(copied, older, capsys)


def test_a_run_stopped_by_the_user_is_marked_interrupted(
    copied: World, started: Callable[..., object], capsys: Said
) -> None:
    older = copied.newest
    child = copied.start("train", "epochs=100000")
    started(child, has_trained_a_step(copied, older))
    code, said = end(child, signal.SIGINT)
    assert code == 75
    assert "the same command resumes from there" in said
    assert "Traceback" not in said
    run = newest_of(copied, older)
    assert run is not None
    assert run.manifest["status"] == "interrupted"
    assert run.manifest["error"].startswith("stopped by SIGINT after step ")
    assert_interrupted_and_all_else_works(copied, older, capsys)


def test_a_killed_evaluation_leaves_the_run_and_its_numbers(
    copied: World, fork_server: ForkServer, capsys: Said
) -> None:
    run = copied.newest
    files = (run.path / "metrics.json", run.path / "comparison.json", evals(run) / "test.predictions.jsonl")
    before = [file.read_bytes() for file in files]
    endless = ("eval_batch_size=1", "max_new_tokens=900", "generation.min_new_tokens=900")
    pid = fork_server.start("eval", *copied.settings("eval"), *endless)
    while run.manifest["evaluation"]["process"]["pid"] != pid:
        assert not fork_server.has_ended(), fork_server.end()
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    fork_server.end()

    assert (run.status, run.status_text) == ("finished", "finished, evaluation interrupted")
    assert [file.read_bytes() for file in files] == before
    capsys.readouterr()
    assert main(["runs", str(copied.output)]) == 0
    assert f"{run.id} " in (said := capsys.readouterr().out)
    assert "finished, evaluation interrupted" in said
    assert copied.call("publish") == 0
    assert copied.call("eval") == 0
    assert run.status_text == "finished"
    assert files[2].read_bytes() == before[2]
    comparisons = [json.loads(content) for content in (before[1], files[1].read_bytes())]
    for each in comparisons:
        del each["baseline"]  # the folder, which is another copy's
    assert comparisons[0] == comparisons[1]
    figures = [json.loads(text) for text in (before[0], (run.path / "metrics.json").read_bytes())]
    assert figures[0].pop("generated").keys() == figures[1].pop("generated").keys()  # seconds and the like
    assert figures[0] == figures[1]


# --- a full disk -----------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        problem = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError:
        problem = "there is no mount command"
    if problem:
        pytest.skip(f"NOT CHECKED: what a full disk does; a small file system needs root ({problem})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def disk_usage(folder: Path) -> int:
    """Bytes that the files under `folder` take, in pages."""
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("what", ["checkpoints", "model"])
def test_a_disk_that_fills_up_while_saving_is_one_error_message(
    finished: World, disk: Path, what: str, fork_server: ForkServer
) -> None:
    world = finished.copy(disk)
    assert world.call("publish") == 0
    sample = world.train("epochs=1").path  # a sample, to measure the size of a run
    left = disk_usage(sample) - disk_usage(sample / "model") // 2
    if what == "checkpoints":
        left -= (disk_usage(sample / "model") + disk_usage(sample / "checkpoints")) // 2
    shutil.rmtree(sample)
    older = world.runs[0]
    before = tree(older.path), tree(world.artifacts)
    (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - left))

    # force, because the plan refuses the run
    code, said = fork_server("train", *world.settings("train"), "epochs=1", "force=true")
    assert code == 2, said
    assert "could not be written: no space left on the device; the previous version is intact;" in said
    assert "Traceback" not in said
    run = newest_of(world, older)
    assert run is not None
    assert run.status in {runs.FAILED, runs.INTERRUPTED}
    assert not run.model.exists()
    assert (tree(older.path), tree(world.artifacts)) == before

    (disk / "filler").unlink()
    assert world.call("eval", "splits=[test]") == 0
    assert world.train("epochs=1").status == runs.FINISHED
