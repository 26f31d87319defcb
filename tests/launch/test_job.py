"""The function of a job, without a cluster: it finds its run, and is pickled without the tracker."""

from __future__ import annotations

import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from src import config, runs, schema
from src.launch.job import Job, JobResult
from src.utils.process_info import LAUNCH_CONFIG, inherited_settings

Told = Callable[[], list[str]]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    """A training run in the second attempt of its job."""
    settings = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SUBMITIT_FOLDER": "/slurm/now"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return Job("train", ["python", "-m", "src.main", "train"], tracker=object())


def composed(output: Path) -> DictConfig:
    return OmegaConf.create(config.defaults("train") | {"output_dir": str(output), "partition": "gpu"})


@pytest.fixture
def resumed_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """The values of `resume` that the commands of jobs received. A script replaces Python, and exits with 75."""
    told, python = tmp_path / "told", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$ASSAY_LAUNCH_CONFIG" >> {told}\nexit 75\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR2, signal.SIGTERM, signal.SIGALRM, signal.SIGCONT)}

    def read() -> list[str]:
        found = []
        for packed in told.read_text().split() if told.exists() else []:
            monkeypatch.setenv(LAUNCH_CONFIG, packed)
            found.append(str((inherited_settings() or {})["resume"]))
            monkeypatch.delenv(LAUNCH_CONFIG)
        return found

    yield read
    for number, handler in before.items():
        signal.signal(number, handler)


def run_of_job(output: Path, finished: bool) -> runs.Run:
    """A run that the job has created."""
    run = runs.create(output, "train", config.to_yaml(schema.TrainConfig()), {})
    run.update(status=runs.FINISHED if finished else runs.INTERRUPTED)
    run.unlock()
    return run


def test_a_job_whose_run_is_finished_does_nothing_more(job: Job, resumed_runs: Told, tmp_path: Path) -> None:
    run = run_of_job(tmp_path, finished=True)
    assert job(composed(tmp_path)) == JobResult(0, str(run.path))
    assert resumed_runs() == []


def test_a_job_resumes_its_own_run_and_no_other(
    job: Job, resumed_runs: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of_job(tmp_path, finished=False)
    other = run_of_job(tmp_path, finished=False)
    other.update(process=other.manifest["process"] | {"slurm": {"job": "8", "restart": 0, "folder": "/slurm/now"}})
    assert job(composed(tmp_path)) == JobResult(75, str(run.path))
    assert resumed_runs() == [str(run.path)]
    # a number that the cluster has given before
    monkeypatch.setenv("SUBMITIT_FOLDER", "/slurm/later")
    assert job(composed(tmp_path)).run is None
    assert resumed_runs()[1] == "auto"


def test_the_tracker_of_the_launching_process_is_not_pickled(job: Job) -> None:
    assert pickle.loads(pickle.dumps(job)).tracker is None
