"""What the launching process records about its jobs: their exit codes, or the trials of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from src import runs, search_space
from src.launch import slurm
from src.launch.job import JobResult
from src.schema import SlurmArgs
from src.sweep import Sweep
from src.utils.secrets import redact


class JobTracker:
    """Tracks the jobs of a command that is not a sweep; the command's exit code is the highest of theirs."""

    def __init__(self, stage: str, args: SlurmArgs, output_dir: str, several: bool = False) -> None:
        self.args, self.several, self.name = args, several, f"assay-{stage}"
        slurm.require_slurm()
        runs.check_writable(output_dir)
        self.folder = runs.new_folder(Path(output_dir) / "slurm")
        self.codes: list[int] = []

    def start(self, number: int, overrides: Sequence[str]) -> bool:
        """Register a job. Returns: whether to submit it, or to wait for it."""
        if self.several:
            print(f"job {number}:", *(redact(word).lstrip("+") for word in overrides), flush=True)
        return True

    def submitted_earlier(self, number: int) -> tuple[str, Path] | None:
        """The Slurm id and the folder of this job, if an earlier process submitted it."""
        return None

    def record_submission(self, number: int, job: Any) -> None:
        """Record that it was submitted as `job`."""

    def finish(self, number: int, result: JobResult) -> float | None:
        """Record how a job ended. Returns: its objective, if it is a trial that has one."""
        self.codes.append(result.code)
        if result.error:
            print(redact(result.error), file=sys.stderr, flush=True)
        return None

    def objective(self, number: int) -> float | None:
        """The objective of a job that was not submitted, as its trial has ended before."""
        return None


class SweepJobTracker(JobTracker):
    """Tracks the trials of a sweep over the overrides with the keys `swept`."""

    def __init__(self, stage: str, args: SlurmArgs, output_dir: str, sweep: Sweep, swept: Collection[str]) -> None:
        super().__init__(stage, args, output_dir)
        self.sweep, self.swept = sweep, swept

    def start(self, number: int, overrides: Sequence[str]) -> bool:
        swept = [word for word in overrides if word.split("=", 1)[0] in self.swept]
        return self.sweep.start_trial(number, dict(map(search_space.parse_override, swept)))

    def submitted_earlier(self, number: int) -> tuple[str, Path] | None:
        found = self.sweep.trial(number).get("slurm")
        return (found["job"], Path(found["folder"])) if found else None

    def record_submission(self, number: int, job: Any) -> None:
        self.sweep.annotate(number, slurm={"job": job.job_id, "folder": str(job.paths.folder)})

    def finish(self, number: int, result: JobResult) -> float | None:
        super().finish(number, result)
        return self.sweep.finish_trial(
            number, result.code, result.reason, Path(result.run) if result.run else None
        )

    def objective(self, number: int) -> float | None:
        found: float | None = self.sweep.trial(number)["objective"]
        return found
