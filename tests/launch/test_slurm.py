"""launch=slurm on a real Slurm: jobs, arrays, requeues, refusals. A job trains the tiny model for some seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import runs
from src.runs import Run
from tests.fixtures import ON_CPU, ROOT, World, start, tree
from tests.slurm import Cluster, needs_slurm, wait_for
from tests.test_no_secret import CANARIES, TYPED, spellings
from tests.train.resume_cases import STEPS

pytest_plugins = ["tests.fixtures", "tests.slurm"]
pytestmark = needs_slurm

SLURM = ("launch=slurm", "partition=debug", "timeout_min=9", "cpus_per_task=1")
SHORT = ("max_steps=1", "on_bad_row=skip")
HELD = "sbatch={hold: true}"

# A sitecustomize module for jobs: each attempt runs its order before a call of compute_loss, and waits for the
# resulting signal.
SITE = """
import os, sys
from importlib.machinery import PathFinder

ORDERS = os.environ.get("ORDERS", "").split("|")
attempt = int(os.environ.get("SLURM_RESTART_COUNT") or 0)


class Hook:
    def find_spec(self, name, path=None, target=None):
        if name != "src.train.fit":
            return None
        spec = PathFinder.find_spec(name, path)
        plain = spec.loader.exec_module

        def exec_module(module):
            plain(module)
            compute, calls = module.AssayTrainer.compute_loss, []

            def compute_loss(*args, **named):
                calls.append(1)
                if len(calls) == 3:
                    import signal, subprocess
                    subprocess.run(ORDERS[attempt], shell=True, check=False)
                    signal.pause()
                return compute(*args, **named)

            module.AssayTrainer.compute_loss = compute_loss

        spec.loader.exec_module = exec_module
        return spec


if "SLURM_JOB_ID" in os.environ and attempt < len(ORDERS) and ORDERS[attempt]:
    sys.meta_path.insert(0, Hook())
"""


@pytest.fixture
def site(tmp_path: Path) -> str:
    """PYTHONPATH of jobs that run orders."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE)
    return os.pathsep.join([str(folder), str(ROOT)])


class Launched:
    """A launching command, which is read while it works."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines = process, list[str]()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_for(self, text: str) -> None:
        wait_for(lambda: text in self.said or self.process.poll() is not None)
        assert text in self.said, self.said

    def end(self) -> tuple[int, str]:
        code = self.process.wait(280)
        self.reader.join(10)
        self.process.stdout and self.process.stdout.close()
        return code, self.said

    @property
    def said(self) -> str:
        return "".join(self.lines)


@pytest.fixture
def launch(world: World, cluster: Cluster) -> Iterator[Any]:
    """Starts a command with launch=slurm. Nothing of it outlives the test."""
    begun: list[Launched] = []

    def begin(stage: str, *words: str, cwd: Path = ROOT, **variables: str) -> Launched:
        settings = world.settings("train" if stage == "check-data" else stage)
        process = start(stage, *settings, *SLURM, *words, cwd=cwd, **cluster.environment, **variables)
        begun.append(Launched(process))
        return begun[-1]

    yield begin
    for each in begun:
        each.process.kill()
        each.end()
    cluster.run("scancel", "--user=root", check=False)


def id_of(said: str) -> str:
    """The first job that is named."""
    return said.split("slurm job", 1)[1].lstrip("s ").split()[0].rstrip(":;")


def test_a_job_evaluates_a_run_as_it_was_trained(copied: World, cluster: Cluster, tmp_path: Path) -> None:
    """The command says which run; its questions, gate and decoding are those of the run."""
    run, places = copied.newest, (f"output_dir={copied.output}", f"artifacts_dir={copied.artifacts}")
    before = json.loads((run.path / "metrics.json").read_text())["conditions"]
    launched = Launched(start("eval", run.id, *places, ON_CPU[0], "bf16=false", *SLURM, **cluster.environment))
    code, said = launched.end()
    assert code == 0, said
    assert f"{copied.splits}/test.jsonl (24 rows)" in said and "max_new_tokens=16" in said
    assert json.loads((run.path / "metrics.json").read_text())["conditions"] == before


# --- one job ---------------------------------------------------------------------------------------------


def test_a_job_trains_what_the_command_itself_trains_and_no_secret_is_written(
    world: World, launch: Any, tmp_path: Path
) -> None:
    """Secrets of the environment, of the command line, and in a file of settings and a preset."""
    for name in ("settings.yaml", "preset.yaml"):
        (tmp_path / name).write_text(f"# @package _global_\nrun_name: {TYPED}\n")
    place = tmp_path / "remote" / "run"
    words = ("--config-name", str(tmp_path / "settings.yaml"), f"experiment={tmp_path / 'preset.yaml'}", *SHORT)
    code, said = launch(
        "train", *words, f"+checkpoint_mirror_endpoint={TYPED}", ASSAY_RUN_FILE=str(place), **CANARIES
    ).end()
    assert code == 0, said
    job = id_of(said)
    (run,) = world.runs
    log = next(world.output.glob(f"slurm/*/{job}_0_log.out"))
    assert f"slurm job {job} (partition debug); log {os.path.relpath(log, ROOT)}\n" in said
    assert "trained in" in log.read_text()
    assert set(log.read_text().splitlines()) <= set(said.splitlines())
    assert json.loads((place.parent / "slurm.json").read_text()) == {"ids": [job]}
    used = yaml.safe_load((run.path / "config_used.yaml").read_text())
    assert not {"partition", "timeout_min", "cpus_per_task"} & used.keys()
    assert used["run_name"] == "${oc.env:HF_TOKEN}"
    assert run.manifest["process"]["slurm"]["job"] == job
    assert "launch=slurm" in run.manifest["command"]

    files = [p for p in world.output.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} >= {".pkl", ".sh", ".out", ".err"}
    assert [
        (name, path) for path in files for name, value in CANARIES.items()
        if any(s in path.read_bytes() for s in spellings(value))
    ] == []  # fmt: skip
    assert [name for name, value in CANARIES.items() if value in said] == []

    again = world.train(*words[:2], *SHORT, "resume=never")
    assert tree(again.model) == tree(run.model)


def test_a_refusal_of_a_job_is_that_of_the_command(world: World, launch: Any, tmp_path: Path) -> None:
    code, said = launch("check-data", f"dataset_path={tmp_path / 'nowhere'}").end()
    assert code == 2, said
    assert (
        f"{tmp_path / 'nowhere'} is not a folder or a file; set dataset_path to your data" in said
        and "Traceback" not in said
    )
    assert "submitit" not in said and "srun" not in said


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("partition=nowhere", "sbatch failed: invalid partition specified: nowhere"),
        (
            "constraint=a100|h100",
            "sbatch failed: Batch job submission failed: Invalid feature specification",
        ),
        ("sbatch={no-such: 1}", "sbatch failed: unrecognized option"),
    ],
)
def test_a_refusal_of_sbatch_is_quoted_and_leaves_no_files(
    world: World, launch: Any, cluster: Cluster, word: str, sentence: str
) -> None:
    code, said = launch("train", word).end()
    assert code == 2 and sentence in said and "nothing was submitted" in said, said
    assert len(said.splitlines()) == 1, said
    assert cluster.run("squeue", "--noheader") == ""
    assert list((world.output / "slurm").iterdir()) == []


def test_ctrl_c_leaves_the_job_and_a_cancelled_job_is_reported(
    world: World, launch: Any, cluster: Cluster, tmp_path: Path
) -> None:
    first = launch("check-data", HELD)
    first.wait_for("slurm job")
    job = id_of(first.said)
    first.process.send_signal(signal.SIGINT)
    code, said = first.end()
    assert code == 130, said
    assert (
        f"slurm job {job} continues: squeue --jobs={job} shows its state" in said
        and f"scancel {job} ends it" in said
    )
    assert "Traceback" not in said
    assert cluster.state(job) == "PENDING"

    second = launch("check-data", HELD)
    second.wait_for("slurm job")
    cluster.run("scancel", id_of(second.said))
    code, said = second.end()
    assert code == 75, said
    assert f"slurm job {id_of(said)} ended without a result: cancelled; run the command again to resume" in said


# --- queued again ----------------------------------------------------------------------------------------


def test_a_job_that_is_preempted_requeued_or_out_of_time_ends_in_the_same_bytes(
    world: World, launch: Any, cluster: Cluster, site: str, tmp_path: Path
) -> None:
    """Four attempts of one job, and the end outside the cluster, all resume the same run.

    Of a job with so short a limit submitit counts the preemption, too, as time that was up.
    """
    orders = [
        "sbatch --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap='sleep 1'",
        "scontrol requeue $SLURM_JOB_ID",
        "scancel --signal=USR2 $SLURM_JOB_ID",  # as at the limit
        "scancel --signal=USR2 $SLURM_JOB_ID",
    ]
    words = (*STEPS, "num_proc=1")
    launched = launch("train", *words, "max_requeues=2", PYTHONPATH=site, ORDERS="|".join(orders))
    code, said = launched.end()
    assert code == 75, said
    assert id_of(said)
    (run,) = world.runs
    assert "the job reached its time limit, and max_requeues is used up; run the command again" in said
    assert "Traceback" not in said
    assert cluster.run("squeue", "--noheader") == ""
    attempts = run.manifest["attempts"]
    assert [a["error"].split(" after")[0] for a in attempts] == ["stopped by SIGTERM"] * 3
    assert run.manifest["process"]["slurm"]["restart"] == 3
    assert world.train(*words).path == run.path

    whole = world.elsewhere(tmp_path / "whole").train(*words)
    assert tree(run.model) == tree(whole.model)


# --- several jobs ----------------------------------------------------------------------------------------


def test_a_sweep_is_one_array_that_the_same_command_waits_for_again(
    world: World, launch: Any, cluster: Cluster
) -> None:
    words = ("--multirun", "lr=0.01,0.02", *SHORT)
    first = launch("train", *words, HELD)
    first.wait_for("slurm jobs")
    job = id_of(first.said).split("_")[0]
    wait_for(lambda: "pending" in first.said)
    first.process.send_signal(signal.SIGINT)
    assert first.end()[0] == 130
    assert "unfinished: run the command again to resume it" in first.said
    cluster.run("scontrol", "release", job)
    code, said = launch("train", *words).end()
    assert code == 0, said
    assert "slurm jobs" not in said and f"{job}_1: step 1/1" in said
    (folder,) = (world.output / "sweeps").iterdir()
    found = json.loads((folder / "trials.json").read_text())
    assert (found["status"], found["wanted"]) == ("finished", 2)
    for number, trial in enumerate(found["trials"]):
        run = Run(folder / trial["run"])
        assert (trial["number"], trial["status"], trial["slurm"]["job"]) == (number, "finished", f"{job}_{number}")
        assert json.loads((run.path / "metrics.json").read_text())["train"]["eval_loss"] == trial["objective"]
        assert str(yaml.safe_load((run.path / "config_used.yaml").read_text())["lr"]) == trial["settings"]["lr"]
    assert len(world.runs) == 2 and (folder / "best.yaml").exists()


def test_a_search_has_each_trial_in_a_job(world: World, launch: Any) -> None:
    code, said = launch("train", "search.space.lr='interval(0.01,0.02)'", "search.trials=1", *SHORT).end()
    assert code == 0, said
    (folder,) = (world.output / "sweeps").iterdir()
    (trial,) = json.loads((folder / "trials.json").read_text())["trials"]
    assert trial["status"] == runs.FINISHED and trial["objective"] and trial["slurm"]
