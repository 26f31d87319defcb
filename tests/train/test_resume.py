"""A run that is stopped at any moment resumes to the result of an undisturbed run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src import runs
from src.errors import MAX_LISTED, Stopped
from src.runs import Run
from src.train import checkpoint
from src.train.checkpoint import COMPLETE
from src.train.signals import CHECKPOINT_NOW, StopRequest
from src.utils.files import sha256
from tests.fixtures import World, chat, curves, jsonl, start, tree
from tests.fork_server import KillPoint
from tests.train.resume_cases import ALL_STEPS, CHECKPOINT, FIT, TRAIN, VARIANTS, Stage, assert_resumes, end_of

pytest_plugins = ["tests.fixtures", "tests.fork_server", "tests.train.resume_cases"]

KILLS = {
    "before the first step": ("plain", KillPoint(f"{FIT}:AssayTrainer.compute_loss"), None),
    "between two batches of a step": ("plain", KillPoint(f"{FIT}:AssayTrainer.compute_loss", nth=16), 6),
    "in an evaluation": ("packed", KillPoint(f"{FIT}:AssayTrainer.evaluate", nth=2, after=True), 3),
    "before a checkpoint has its marker": ("plain", KillPoint(f"{CHECKPOINT}:_seal", nth=2), 3),
    "before a checkpoint has its name": ("plain", KillPoint(f"{CHECKPOINT}:_seal", nth=2, after=True), 3),
    "while old checkpoints are removed": ("best", KillPoint(f"{CHECKPOINT}:shutil.rmtree"), 5),
    "while the model is written": ("packed", KillPoint(f"{TRAIN}:write_json", nth=2, after=True), 6),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_resumes_to_the_same_bytes(stage: Stage, undisturbed: Any, when: str) -> None:
    variant, moment, step = KILLS[when]
    code, said = stage(*VARIANTS[variant], moment=moment)
    assert code == -signal.SIGKILL, said
    said = assert_resumes(stage, undisturbed[variant], *VARIANTS[variant])
    assert (f"resuming after step {step}" in said) if step else ("resuming after" not in said)


# --- damage ----------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    file = folder / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-10])


def flip(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def unmark(folder: Path) -> None:
    (folder / COMPLETE).unlink()


def leave_a_half(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name(".checkpoint-12.tmp"))
    flip(folder)


@pytest.mark.parametrize("damage", [truncate, flip, unmark, leave_a_half])
def test_a_damaged_checkpoint_is_passed_over(killed: Stage, damage: Callable[[Path], None]) -> None:
    """Then the older checkpoint is used; a test below shows that it gives the same bytes."""
    (run,) = killed.world.runs
    damage(run.checkpoints / "checkpoint-9")
    assert checkpoint.find_newest(run.checkpoints) == run.checkpoints / "checkpoint-6"
    flip(run.checkpoints / "checkpoint-6")
    assert checkpoint.find_newest(run.checkpoints) is None


def test_a_run_resumes_from_the_older_checkpoint(killed: Stage, undisturbed: Any) -> None:
    (run,) = killed.world.runs
    truncate(run.checkpoints / "checkpoint-9")
    said = assert_resumes(killed, undisturbed["plain"])
    assert f"{run.checkpoints / 'checkpoint-9'} is damaged and is skipped" in said
    assert "resuming after step 6" in said
    assert checkpoint.is_complete(run.checkpoints / "checkpoint-9")


def test_a_checkpoint_that_would_run_code_is_refused(killed: Stage) -> None:
    """Its hashes are right: it is somebody's, not a damaged one."""
    (run,) = killed.world.runs
    newest = run.checkpoints / "checkpoint-9"
    text, before = (newest / COMPLETE).read_text(), sha256(newest / "optimizer.pt")
    (newest / "optimizer.pt").write_bytes(pickle.dumps(print))
    (newest / COMPLETE).write_text(text.replace(before, sha256(newest / "optimizer.pt")))
    code, said = killed()
    assert (code, f"the state of the optimizer in {newest} cannot be read" in said) == (2, True), said


def test_a_run_without_complete_checkpoint_starts_over_in_its_directory(killed: Stage, undisturbed: Any) -> None:
    (run,) = killed.world.runs
    for damage, step in ((unmark, 6), (flip, 9)):
        damage(run.checkpoints / f"checkpoint-{step}")
    assert "resuming after" not in assert_resumes(killed, undisturbed["plain"])


def test_damaged_checkpoints_do_not_replace_complete_ones(killed: Stage) -> None:
    """With save_total_limit=1, a complete checkpoint is not removed in favour of a newer damaged one."""
    (run,) = killed.world.runs
    flip(run.checkpoints / "checkpoint-9")
    code, _ = killed(
        "save_total_limit=1", "save_steps=1", moment=KillPoint(f"{FIT}:AssayTrainer.compute_loss", nth=5)
    )
    assert code == -signal.SIGKILL
    assert checkpoint.find_newest(run.checkpoints) == run.checkpoints / "checkpoint-8"


def test_a_checkpoint_whose_best_one_is_damaged_is_passed_over(tmp_path: Path) -> None:
    for step, best in ((2, 2), (4, 2), (6, 4)):
        folder = tmp_path / f"checkpoint-{step}"
        with checkpoint.atomic_checkpoint(folder) as temporary:
            (temporary / checkpoint.STATE).write_text(json.dumps({"best_global_step": best}))
    (tmp_path / "checkpoint-4" / checkpoint.STATE).write_text("{}")
    assert checkpoint.find_newest(tmp_path) == tmp_path / "checkpoint-6"
    assert checkpoint.find_newest(tmp_path, with_best=True) == tmp_path / "checkpoint-2"


# --- signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_training_after_its_step_with_a_checkpoint(
    stage: Stage, undisturbed: Any, sent: signal.Signals
) -> None:
    code, said = stage(moment=KillPoint(f"{FIT}:AssayTrainer.compute_loss", nth=9, send=sent))
    assert code == Stopped.exit_code == 75, said
    assert f"{sent.name}: finishing the step and saving a checkpoint; a second signal" in said
    assert (
        f"stopped by {sent.name} after step 5 of {ALL_STEPS}, with a checkpoint; the same command resumes" in said
    )
    assert "Traceback" not in said
    (run,) = stage.world.runs
    assert (run.manifest["status"], run.manifest["error"]) == (
        runs.INTERRUPTED,
        f"stopped by {sent.name} after step 5 of {ALL_STEPS}, with a checkpoint",
    )
    assert checkpoint.find_newest(run.checkpoints) == run.checkpoints / "checkpoint-5"
    assert "resuming after step 5" in assert_resumes(stage, undisturbed["plain"])


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once_and_it_can_be_resumed(
    stage: Stage, undisturbed: Any, sent: signal.Signals, expected: int
) -> None:
    code, said = stage(moment=KillPoint(f"{FIT}:AssayTrainer.compute_loss", nth=0, send=sent))
    assert code == expected, said
    assert "Traceback" not in said
    (run,) = stage.world.runs
    assert (run.manifest["status"], checkpoint.list_checkpoints(run.checkpoints)) == (runs.INTERRUPTED, [])
    if sent == signal.SIGTERM:
        assert_resumes(stage, undisturbed["plain"])


def test_a_terminal_that_closes_ends_the_training_after_its_step(stage: Stage, undisturbed: Any) -> None:
    """The shell and the kernel both send SIGHUP, and nothing can be printed any more."""
    moment = KillPoint(f"{FIT}:AssayTrainer.compute_loss", nth=0, send=signal.SIGHUP)
    stage.start(moment=moment, calls=("tests.fork_server:on_a_lost_terminal",))
    code, _ = stage.fork_server.end()
    assert code == 75
    (run,) = stage.world.runs
    assert run.manifest["error"] == f"stopped by SIGHUP after step 1 of {ALL_STEPS}, with a checkpoint"
    assert_resumes(stage, undisturbed["plain"])


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest(tmp_path) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.stop_requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("moment", "expected", "begun"),
    [
        (KillPoint("src.train.prepare:_tokenize_rows", send=signal.SIGHUP), 129, False),
        (KillPoint("src.model.load:load_base", after=True, send=signal.SIGINT), 130, False),
        (KillPoint("src.runs:create", after=True, send=signal.SIGTERM), 143, True),
        (KillPoint("src.train.callbacks:RunRecorder.prepare", send=signal.SIGTERM), 75, True),
    ],
)
def test_a_signal_before_the_first_step_ends_it_cleanly(
    stage: Stage, moment: KillPoint, expected: int, begun: bool
) -> None:
    code, said = stage(moment=moment)
    assert code == expected, said
    assert "Traceback" not in said
    assert [run.status for run in stage.world.runs] == [runs.INTERRUPTED] * begun
    assert expected != 75 or "stopped by SIGTERM before its first step; the same command resumes" in said


def test_a_checkpoint_requested_by_a_file_is_saved_and_changes_nothing_else(
    stage: Stage, undisturbed: Any, tmp_path: Path
) -> None:
    """The file exists before the first step: an earlier attempt ended before it could remove it."""
    assert stage(moment=KillPoint(f"{FIT}:AssayTrainer.compute_loss"))[0] == -signal.SIGKILL
    (run,) = stage.world.runs
    (run.path / CHECKPOINT_NOW).touch()
    assert stage(moment=KillPoint(f"{FIT}:AssayTrainer.compute_loss", nth=3))[0] == -signal.SIGKILL
    assert checkpoint.find_newest(run.checkpoints) == run.checkpoints / "checkpoint-1"
    assert not (run.path / CHECKPOINT_NOW).exists()
    (run.path / CHECKPOINT_NOW).touch()
    assert_resumes(stage, undisturbed["plain"])


# --- which run -------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_resumed_and_other_settings_start_a_new_run(killed: Stage) -> None:
    (old,) = killed.world.runs
    code, said = killed("lr=0.02", "max_steps=1")
    assert code == 0
    differences = "lr=0.003, max_steps="
    assert f"not resuming run {old.id}: it had other settings: {differences}" in said
    assert len(killed.world.runs) == 2
    code, said = killed("lr=0.02", "max_steps=1")  # the same as one that is finished
    assert (code, len(killed.world.runs)) == (0, 3)
    done = min(r.id for r in killed.world.runs if r.id != old.id)
    assert f"run {done} did this already, with the same settings and data; training again" in said
    code, said = killed("resume=never", "max_steps=1")
    assert (code, len(killed.world.runs), "not resuming" in said) == (0, 4, False)
    assert old.status == runs.INTERRUPTED


def test_other_data_makes_a_new_run_or_is_refused(killed: Stage, tmp_path: Path) -> None:
    (old,) = killed.world.runs
    rows = [chat(f"Top of {name}?", "TOP(b)") for name in ("a", "b", "c", "d")]
    before = shutil.copytree(killed.world.data, tmp_path / "data")
    moved = Stage(replace(killed.world, data=before), killed.fork_server)
    text = (old.path / "config_used.yaml").read_text().replace(str(killed.world.data), str(before))
    (old.path / "config_used.yaml").write_text(text)
    old.update(data=json.loads(json.dumps(old.manifest["data"]).replace(str(killed.world.data), str(before))))
    jsonl(before / "lessons.jsonl", rows)
    code, said = moved("resume=latest")
    assert code == 2
    assert f"resume=latest: run {old.id} was started with another data; resume=never starts a new run" in said
    code, said = moved("max_steps=1", moment=None)
    assert code == 0
    code, said = moved(moment=KillPoint(f"{FIT}:fit"))
    assert f"not resuming run {old.id}: it was started with another data" in said
    assert len(moved.world.runs) == 3


def test_latest_takes_the_settings_of_the_run(killed: Stage, undisturbed: Any) -> None:
    """`make train resume=latest` passes the name of the stage's own configuration."""
    (old,) = killed.world.runs
    words = ["train", "--config-name", "train", f"output_dir={killed.world.output}"]
    for wanted in ("latest", str(old.path), str(old.path.parent / "latest"), old.id, old.id[:-1]):
        code, said = killed.fork_server(*words, f"resume={wanted}", "lr=1e-4", "method=dora")
        assert code == 2
        assert f"resume={wanted}: lr is 0.0001, but the run was started with 0.003" in said
        assert f"resume={wanted}: method is dora, but the run was started with lora" in said
    code, said = killed.fork_server(*words, "resume=latest")
    assert code == 0, said
    assert end_of(old) == undisturbed["plain"]
    assert len(killed.world.runs) == 1
    code, said = killed.fork_server(*words, "resume=latest")
    assert (code, f"resume=latest: run {old.id} is finished; resume=never starts a new run" in said) == (2, True)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("latest", "resume=latest: there is no training run in"),
        ("nowhere", "resume=nowhere: there is no run nowhere in"),
    ],
)
def test_a_missing_run_cannot_be_resumed(stage: Stage, wanted: str, said: str) -> None:
    code, found = stage(f"resume={wanted}")
    assert (code, said in found, stage.world.runs) == (2, True, [])


def test_the_configuration_of_a_finished_run_makes_a_new_one(killed: Stage) -> None:
    (unfinished,) = killed.world.runs
    code, _ = killed("max_steps=1")
    done = killed.world.newest
    words = ["--config-path", str(done.path), "--config-name", "config_used"]
    code, said = killed.fork_server("train", *words)
    assert code == 0, said
    assert killed.world.newest.path not in (unfinished.path, done.path)
    assert unfinished.status == runs.INTERRUPTED


HOLDER = """
import sys, time
from pathlib import Path
from src.runs import Run
assert Run(Path(sys.argv[1])).lock()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(killed: Stage) -> Iterator[subprocess.Popen[str]]:
    """A process that has locked the run and has not yet updated its manifest."""
    child = start(str(killed.world.runs[0].path), script=HOLDER)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.communicate()


def test_two_commands_do_not_train_the_same_run(
    killed: Stage, holder: subprocess.Popen[str], undisturbed: Any
) -> None:
    (run,) = killed.world.runs
    before = tree(run.path)
    code, said = killed("resume=latest")
    assert code == 2
    assert f"run {run.id} is being trained by another process" in said
    code, said = killed(moment=KillPoint(f"{FIT}:fit"))
    assert f"not resuming run {run.id}: it is being trained by another process" in said
    assert len(killed.world.runs) == 2
    assert tree(run.path) == before
    holder.kill()
    holder.wait()
    shutil.rmtree(killed.world.newest.path)
    assert_resumes(killed, undisturbed["plain"])


def test_a_training_holds_its_run_while_it_lasts(stage: Stage) -> None:
    pid = stage.start(moment=KillPoint(f"{FIT}:AssayTrainer.compute_loss", send=signal.SIGSTOP))
    try:
        while not stage.world.runs:
            time.sleep(0.05)
        assert not stage.world.runs[0].lock()
    finally:
        os.kill(pid, signal.SIGKILL)
        stage.fork_server.end()
    assert stage.world.runs[0].lock()
    stage.world.runs[0].unlock()


# --- the best weights, an early end ----------------------------------------------------------------------


def eval_losses(run: Run) -> dict[int, float]:
    return {step: value for step, value in curves(run)["eval/loss"]}


def test_the_weights_at_the_end_are_those_of_the_lowest_evaluation_loss(stage: Stage, undisturbed: Any) -> None:
    best = VARIANTS["best"]
    code, _ = stage(*best, moment=KillPoint(f"{FIT}:AssayTrainer.get_batch_samples", nth=5))
    assert code == -signal.SIGKILL
    assert_resumes(stage, undisturbed["best"], *best)
    run = stage.world.newest
    losses = eval_losses(run)
    step = min(losses, key=lambda s: losses[s])
    assert step == 2  # the last one would show nothing
    assert {p.name for p in checkpoint.list_checkpoints(run.checkpoints)} == {"checkpoint-2", "checkpoint-5"}
    weights = "adapter_model.safetensors"
    assert (run.model / weights).read_bytes() == (run.checkpoints / f"checkpoint-{step}" / weights).read_bytes()
    assert (run.model / weights).read_bytes() != (run.checkpoints / "checkpoint-5" / weights).read_bytes()
    assert json.loads((run.path / "metrics.json").read_text())["train"]["eval_loss"] == pytest.approx(losses[step])


EARLY = ("early_stopping_patience=2", "early_stopping_threshold=100", "eval_steps=2", "save_steps=5", "epochs=2.5")


def test_early_stopping_comes_at_the_same_step_after_a_resume(stage: Stage, world: World, tmp_path: Path) -> None:
    """With such a threshold only the first evaluation is better than what was before it."""
    expected = end_of(stage.train(*EARLY))
    assert expected["figures"]["steps"] == 6
    other = Stage(world.elsewhere(tmp_path / "other"), stage.fork_server)
    assert other(*EARLY, moment=KillPoint(f"{FIT}:AssayTrainer.compute_loss", nth=12))[0] == -signal.SIGKILL
    assert other(*EARLY, moment=KillPoint(f"{TRAIN}:save_model"))[0] == -signal.SIGKILL  # at the end
    assert_resumes(other, expected, *EARLY)


@pytest.mark.parametrize("key", ["load_best_model_at_end=true", "early_stopping_patience=1"])
def test_what_needs_an_evaluation_loss_is_refused_without_one(stage: Stage, key: str) -> None:
    code, said = stage(key, "eval_path=none")
    name = key.partition("=")[0]
    assert (code, f"{name} needs an evaluation loss, and there is no evaluation data; eval_split" in said) == (
        2,
        True,
    )
    assert stage.world.runs == []


# --- no number any more ----------------------------------------------------------------------------------


def test_a_diverged_run_names_the_step_and_is_not_resumed(stage: Stage) -> None:
    words = ("method=full", "lr=1e30", "save_steps=1", "max_grad_norm=1e30")
    code, said = stage(*words)
    assert code == 2
    assert "Traceback" not in said
    told = re.search(
        r"training diverged: the (.+) is (nan|-?inf) at step (\d+), in the batch of (.+); the last", said
    )
    assert told is not None, said
    (run,) = stage.world.runs
    step = int(told[3])
    taken = [json.loads(line) for line in (run.logs / "samples.jsonl").read_text().splitlines()]
    assert taken[-1]["step"] == step
    data = stage.world.data / "lessons.jsonl"
    assert told[4].split(", ") == [f"{data}:{row + 1}" for row in taken[-1]["rows"][:MAX_LISTED]]
    good = checkpoint.find_newest(run.checkpoints, until=step - 2)
    assert f"the last good checkpoint is {good or 'none'};" in said
    assert (run.status, run.manifest["resumable"]) == (runs.FAILED, False)
    code, again = stage(*words, "resume=latest")
    assert (code, f"run {run.id} would fail in the same way: DivergedError: training diverged" in again) == (
        2,
        True,
    )
    code, again = stage(*words, moment=KillPoint(f"{FIT}:fit"))
    assert f"not resuming run {run.id}: it would fail in the same way" in again
    assert len(stage.world.runs) == 2


@pytest.mark.parametrize(("dev", "what"), [(True, "evaluation loss"), (False, "weight")])
def test_weights_ruined_by_the_last_step_are_no_result(stage: Stage, tmp_path: Path, dev: bool, what: str) -> None:
    words = [
        "method=full",
        "lr=1e38",
        "weight_decay=1e6",
        "max_steps=1",
        "optim=sgd",
        "max_grad_norm=1e30",
        "warmup_ratio=0",
    ]
    code, said = stage(*words, *([] if dev else ["eval_path=none"]))
    assert code == 2, said
    assert f"training diverged: the {what} is " in said
    assert "the last good checkpoint is none" in said
    (run,) = stage.world.runs
    assert not run.model.exists()
    assert checkpoint.list_checkpoints(run.checkpoints) == []
