"""Training in several processes: the same steps as in one, stopped and resumed, and failures reported."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from src import runs
from src.runs import Run
from src.train import checkpoint, launcher
from src.utils.files import sha256
from tests.fixtures import World, curves
from tests.train.several import TIMEOUT_S, TWO, Start, ended, samples, until

pytest_plugins = ["tests.fixtures", "tests.fork_server", "tests.train.several"]

LONG = (*TWO, "epochs=8", "batch_size=3", "lora_dropout=0.1", "logging_steps=1", "save_steps=2", "resume=auto")


def adapter(run: Run) -> Path:
    return run.model / "adapter_model.safetensors"


# --- the same steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra", [(), ("method=full", "gradient_checkpointing=true", "gradient_accumulation_steps=2")]
)
def test_two_processes_take_the_steps_of_one_that_accumulates(
    world: World, start: Start, fork: Start, extra: tuple[str, ...]
) -> None:
    """16 rows in batches of 6: in every epoch one process has a batch less."""
    common = ("epochs=3", "batch_size=6", "lora_dropout=0", "lr=0.003", "logging_steps=1", *extra)
    accumulated = 2 * (2 if "gradient_accumulation_steps=2" in extra else 1)
    code, said = ended((fork if extra else start)(*common, *TWO, ASSAY_RUN_ID="two"))
    assert code == 0, said
    two = world.newest
    assert two.id == "two"
    one = world.train(*common, f"gradient_accumulation_steps={accumulated}")
    assert samples(two) == samples(one)
    for tag, values in curves(one).items():
        if tag != "train/tokens_per_second":
            assert [v for _, v in curves(two)[tag]] == pytest.approx([v for _, v in values], rel=1e-4), tag
    weights = {p.name: load_file(p) for p in one.model.glob("*.safetensors")}
    for name, tensors in weights.items():
        for key, tensor in load_file(two.model / name).items():
            assert torch.allclose(tensor, tensors[key], atol=1e-5), key
    assert two.manifest["processes"] == 2
    if not extra:
        assert two.manifest["command"][:4] == ["python", "-m", "src.main", "train"]
        assert "num_processes=2" in two.manifest["command"]
    assert said.count("trained in") == 1
    assert [run.id for run in world.runs] == [one.id, two.id]


def test_a_run_of_two_processes_resumes_after_a_signal_and_after_a_kill(world: World, fork: Start) -> None:
    code, said = ended(fork(*LONG))
    assert code == 0, said
    whole = world.newest

    elsewhere = ("seed=42", f"output_dir={world.output.parent / 'stopped'}")
    there = World(world.model, world.data, world.splits, world.output.parent / "stopped", world.artifacts)
    stopped = fork(*LONG, *elsewhere)
    run = until(stopped, there, "step 5/")
    stopped.send_signal(signal.SIGTERM)
    code, said = ended(stopped)
    assert code == 75, said
    assert "finishing the step and saving a checkpoint" in said
    assert said.count("the same command resumes from there") == 1
    assert run.status == runs.INTERRUPTED
    newest = checkpoint.find_newest(run.checkpoints)
    assert newest is not None and checkpoint.step_number(newest) == samples(run)[-1]["step"]

    killed = fork(*LONG, *elsewhere)
    until(killed, there, f"step {checkpoint.step_number(newest) + 4}/")
    processes = psutil.Process(killed.pid).children()
    assert len(processes) == 2
    killed.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_S)
    assert not alive

    code, said = ended(fork(*LONG, *elsewhere))
    assert code == 0, said
    assert "resuming after step" in said
    assert [r.id for r in there.runs] == [run.id]
    assert samples(run) == samples(whole)
    assert sha256(adapter(run)) == sha256(adapter(whole))


def test_two_machines_find_each_other_under_srun(world: World, start: Start) -> None:
    slurm = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODELIST": "localhost"}
    slurm |= {"SLURM_JOB_ID": str(os.getpid())}  # the port is made of it
    words = ("max_steps=2", "batch_size=6", "num_proc=1")
    second = start(*words, **slurm, SLURM_NODEID="1")
    code, said = ended(start(*words, **slurm, SLURM_NODEID="0"))
    assert code == 0, said
    assert "starting 1 process on machine 0 of 2" in said
    code, said = ended(second)
    assert code == 0, said
    assert said.splitlines()[1:] == []  # only the first machine logs
    (run,) = world.runs
    assert [len(step["rows"]) for step in samples(run)] == [12, 4]
    assert run.manifest["processes"] == 2


# --- failures --------------------------------------------------------------------------------------------


def test_an_error_of_another_process_is_printed_and_the_run_marked_failed(world: World, fork: Start) -> None:
    code, said = ended(fork(*TWO, calls=("tests.train.forked:fail_in_second_process",)))
    assert code == 1, said
    assert "process 1: Traceback (most recent call last)" in said
    assert "ValueError: a bolt is loose" in said
    assert said.count("Traceback") == 1
    assert world.newest.status == runs.FAILED
    assert world.newest.manifest["error"] == "process 1: ValueError: a bolt is loose"


def test_a_killed_process_ends_the_others_and_is_reported(world: World, fork: Start) -> None:
    child = fork(*LONG, "epochs=10000")
    until(child, world, "step 2/")
    first = world.newest.manifest["process"]["pid"]
    (other,) = [p for p in psutil.Process(child.pid).children() if p.pid != first]
    other.kill()
    code, said = ended(child)
    assert code == 128 + signal.SIGKILL, said
    assert "process 1: was killed by SIGKILL" in said
    assert world.newest.status == runs.FAILED
    assert "process 1: was killed by SIGKILL" in world.newest.manifest["error"]


def test_an_error_of_every_process_is_printed_once(world: World, fork: Start) -> None:
    code, said = ended(fork(*TWO, "method=full", "lr=1e30", "max_steps=8", "logging_steps=1"))
    assert code == 2, said
    assert said.count("training diverged") == 1
    assert "Traceback" not in said
    assert world.newest.status == runs.FAILED


def test_the_name_of_a_run_is_for_the_processes_of_the_first_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(runs.RUN_ID, "one")
    with launcher._worker_environment({}, processes=2, run_file=tmp_path / "run"):
        assert os.environ[runs.RUN_ID] == "one"
    assert runs.RUN_ID not in os.environ
