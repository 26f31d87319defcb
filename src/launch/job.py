"""What a job of the cluster does: one command in a process of its own, and the job queued again where need be.

submitit runs this in the job, and asks Slurm to queue the job again when its own signal comes. Here the command is
first given the time to save a checkpoint; the job that is queued again goes on with the run that it began.

    signal                        the command         the job
    SIGUSR2, the time is nearly   SIGTERM, and SIGKILL  is queued again, max_requeues times
    up                            if that takes long
    SIGTERM, it is preempted,     SIGTERM             ends; Slurm queues it again or does not
    requeued or cancelled
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

from src import config, runs
from src.errors import Stopped
from src.utils import slurm
from src.utils.process_info import launch_env

LIMIT = signal.SIGUSR2
QUEUED_AGAIN = {"PENDING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "PREEMPTED", "UNKNOWN"}
STOPPED = {Stopped.exit_code, 128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL}


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the exit code of its command, the run that it made, why, and what nobody has told yet."""

    code: int
    run: str | None = None
    error: str | None = None
    reason: str = ""


@dataclass
class Job:
    """The function that is pickled into each job of one command; `desk` stays in the launching process."""

    stage: str
    command: list[str]  # that a person typed, its secrets as references
    patience: float = 60  # seconds until a command that was asked to end is killed
    desk: Any = field(default=None, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"desk": None}

    def __call__(self, composed: DictConfig) -> Outcome:
        values = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(values, dict)
        cfg = config.load(self.stage, config.of_a_run(self.stage, {str(k): v for k, v in values.items()}))
        begun = self._run(cfg)
        if begun and begun.status == runs.FINISHED:
            return Outcome(0, str(begun.path.absolute()))
        if begun:
            cfg = replace(cfg, resume=str(begun.path))
        code, error = _Command(self, asdict(cfg)).end()
        made = self._run(cfg)
        return Outcome(code, str(made.path.absolute()) if made else None, error)

    def _run(self, cfg: Any) -> runs.Run | None:
        """The run that this job has made or gone on with, in whichever of its attempts."""
        job = slurm.current_job()
        for run in runs.trainings(cfg.output_dir) if job and self.stage == "train" else []:
            other = run.manifest["process"].get("slurm") or {}
            if job and all(other.get(key) == job[key] for key in ("job", "folder")):
                return run
        return None


class _Command:
    """The command of a job in a process of its own, and the signals that come while it works."""

    def __init__(self, job: Job, settings: Mapping[str, Any]) -> None:
        self.patience = max(1, int(job.patience))
        self.limit = self.told = False
        self.requeue = signal.getsignal(LIMIT)  # submitit's: saves the job, and has Slurm queue it again
        signal.signal(LIMIT, signal.SIG_IGN)  # it may come to every process of the job, and would end the child
        self.child = subprocess.Popen(
            [sys.executable, "-u", "-m", "src.main", job.stage],
            env=_environment() | launch_env(settings, job.command),
        )
        for number, act in ((LIMIT, self._limit), (signal.SIGTERM, self._told), (signal.SIGALRM, self._late)):
            signal.signal(number, act)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _limit(self, number: int, frame: FrameType | None) -> None:
        self.limit = True
        self.child.terminate()
        signal.alarm(self.patience)

    def _told(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        self.child.terminate()

    def _late(self, number: int, frame: FrameType | None) -> None:
        self.child.kill()

    def end(self) -> tuple[int, str | None]:
        """Wait for the command. Returns: its exit code, and what else there is to say.

        Raises: SystemExit if the job is queued again or was cancelled: then it leaves no result.
        """
        code = self.child.wait()
        signal.alarm(0)
        if code not in STOPPED:
            return code, None
        if self.told and not self.limit:
            job = slurm.job_details((slurm.current_job() or {}).get("job", ""))
            if job.get("JobState", "UNKNOWN") in QUEUED_AGAIN:
                sys.exit(1)
            # In the time between the two, a preempted job is queued again by nobody else once it has ended.
            self.limit = job["JobState"] == "RUNNING" and job.get("PreemptTime", "None") != "None"
        return self._again(code) if self.limit else (_positive(code), None)

    def _again(self, code: int) -> tuple[int, str]:
        """Have the job queued again. Returns: why it was not."""
        from submitit.core.utils import UncompletedJobError

        assert callable(self.requeue)
        on = "the same command goes on from its last checkpoint"
        try:
            self.requeue(LIMIT, None)
        except UncompletedJobError:
            return Stopped.exit_code, f"the time of the job was up, and max_requeues are used up; {on}"
        except subprocess.CalledProcessError as error:
            if error.returncode > 0:
                return Stopped.exit_code, f"the time of the job was up, and Slurm does not queue it again; {on}"
        sys.exit(0)  # on another than the first machine; or the end of the job came before that of scontrol


def _positive(code: int) -> int:
    return 128 - code if code < 0 else code


def _environment() -> dict[str, str]:
    """What the command finds: names meant for a single run are not for each job of an array."""
    found = dict(os.environ)
    if "SLURM_ARRAY_JOB_ID" in found:
        for name in ("ASSAY_RUN_ID", "ASSAY_RUN_FILE"):
            found.pop(name, None)
    return found
