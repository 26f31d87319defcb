"""The function that runs in a Slurm job: it runs one command in a child process and requeues the job if needed.

submitit calls it in the job, and requeues the job when it receives its signal. This module first gives the command
time to save a checkpoint; the requeued job resumes its run.

    signal to the job                        signal to the command        the job
    SIGUSR2: its time limit is near          SIGTERM; SIGKILL if it does  is requeued, max_requeues times
                                             not exit in time
    SIGTERM: preempted, requeued, cancelled  SIGTERM                      ends; Slurm may requeue it
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .. import MAIN, config, runs, secret_references
from ..errors import Stopped
from ..utils import slurm
from ..utils.process_info import launch_env

TIME_LIMIT_SIGNAL = signal.SIGUSR2
REQUEUED_STATES = {"PENDING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "PREEMPTED", "UNKNOWN"}
STOPPED_CODES = {Stopped.exit_code, 128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL}


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    code: exit code of its command.
    run: path of the run that the command created or resumed.
    error: message that is not in the job's log, for the user.
    reason: one line for the table of a sweep.
    """

    code: int
    run: str | None = None
    error: str | None = None
    reason: str = ""


Outcome = JobResult  # the name in result files that the previous version wrote


@dataclass
class Job:
    """The function that is pickled into each job of one command; `tracker` stays in the launching process."""

    stage: str
    command: list[str]  # as the user typed it, with secrets as references
    patience: float = 60  # seconds between SIGTERM and SIGKILL
    tracker: Any = field(default=None, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tracker": None}

    def __call__(self, composed: DictConfig) -> JobResult:
        secret_references.register()
        values = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(values, dict)
        cfg = config.load(self.stage, config.run_settings(self.stage, {str(k): v for k, v in values.items()}))
        earlier = self._run(cfg)
        if earlier and earlier.status == runs.FINISHED:
            return JobResult(0, str(earlier.path.absolute()))
        if earlier:
            cfg = replace(cfg, resume=str(earlier.path))
        code, error = _Command(self, asdict(cfg)).wait()
        run = self._run(cfg)
        return JobResult(code, str(run.path.absolute()) if run else None, error)

    def _run(self, cfg: Any) -> runs.Run | None:
        """The run that this job, in any of its attempts, has created or resumed."""
        job = slurm.current_job()
        for run in runs.training_runs(cfg.output_dir) if job and self.stage == "train" else []:
            other = run.manifest["process"].get("slurm") or {}
            if job and all(other.get(key) == job[key] for key in ("job", "folder")):
                return run
        return None


class _Command:
    """The command of a job as a child process, and the handlers of the signals that the job receives."""

    def __init__(self, job: Job, settings: Mapping[str, Any]) -> None:
        self.patience = max(1, int(job.patience))
        self.time_is_up = self.terminated = False
        self.requeue = signal.getsignal(TIME_LIMIT_SIGNAL)  # submitit's handler: saves the job and requeues it
        signal.signal(TIME_LIMIT_SIGNAL, signal.SIG_IGN)  # inherited: Slurm may send it to the child, too
        self.child = subprocess.Popen(
            [sys.executable, "-u", "-m", MAIN, job.stage],
            env=_environment() | launch_env(settings, job.command),
        )
        signal.signal(TIME_LIMIT_SIGNAL, self._on_time_limit)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGALRM, self._on_alarm)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _on_time_limit(self, number: int, frame: FrameType | None) -> None:
        self.time_is_up = True
        self.child.terminate()
        signal.alarm(self.patience)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.terminated = True
        self.child.terminate()

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        self.child.kill()

    def wait(self) -> tuple[int, str | None]:
        """Wait for the command to exit. Returns: its exit code, and a message for the user.

        Raises: SystemExit if the job is requeued or was cancelled: then it has no result.
        """
        code = self.child.wait()
        signal.alarm(0)
        if code not in STOPPED_CODES:
            return code, None
        if self.terminated and not self.time_is_up:
            job = slurm.job_details((slurm.current_job() or {}).get("job", ""))
            if job.get("JobState", "UNKNOWN") in REQUEUED_STATES:
                sys.exit(1)
            # A preempted job that exits within its grace time is not requeued by Slurm.
            self.time_is_up = job["JobState"] == "RUNNING" and job.get("PreemptTime", "None") != "None"
        return self._requeue() if self.time_is_up else (_positive(code), None)

    def _requeue(self) -> tuple[int, str]:
        """Requeue the job and exit. Returns: exit code and message if the job was not requeued."""
        from submitit.core.utils import UncompletedJobError

        assert callable(self.requeue)
        fact, remedy = "the job reached its time limit", "run the command again to resume from the last checkpoint"
        try:
            self.requeue(TIME_LIMIT_SIGNAL, None)
        except UncompletedJobError:
            return Stopped.exit_code, f"{fact}, and max_requeues is used up; {remedy}"
        except subprocess.CalledProcessError as error:
            if error.returncode > 0:
                return Stopped.exit_code, f"{fact}, and Slurm did not requeue it; {remedy}"
        sys.exit(0)  # this is not the first node of the job, or the requeue ended the job before scontrol returned


def _positive(code: int) -> int:
    return 128 - code if code < 0 else code


def _environment() -> dict[str, str]:
    """The environment of the command, without the id and file of a single run in a job of an array."""
    found = dict(os.environ)
    if "SLURM_ARRAY_JOB_ID" in found:
        for name in ("ASSAY_RUN_ID", "ASSAY_RUN_FILE"):
            found.pop(name, None)
    return found
