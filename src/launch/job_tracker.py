"""Where a launching process keeps what becomes of its jobs: their exit codes, or the trials of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from src import runs, search_space
from src.launch import slurm
from src.launch.job import Outcome
from src.schema import SlurmArgs
from src.sweep import Sweep
from src.utils.secrets import redact


class Desk:
    """For commands that are no sweep: the exit code is the worst of the jobs'."""

    def __init__(self, stage: str, args: SlurmArgs, output_dir: str, several: bool = False) -> None:
        self.args, self.several, self.name = args, several, f"assay-{stage}"
        slurm.refuse_elsewhere()
        runs.check_writable(output_dir)
        self.folder = runs.new_folder(Path(output_dir) / "slurm")
        self.codes: list[int] = []

    def begin(self, number: int, words: Sequence[str]) -> bool:
        """Take up a job with the overrides `words`. Returns: whether it is to be waited for."""
        if self.several:
            print(f"job {number}:", *(redact(word).lstrip("+") for word in words), flush=True)
        return True

    def earlier(self, number: int) -> tuple[str, Path] | None:
        """The id and the folder of the job that was submitted for this by an earlier process."""
        return None

    def handed_over(self, number: int, job: Any) -> None:
        """It has been submitted as `job`."""

    def end(self, number: int, outcome: Outcome) -> float | None:
        self.codes.append(outcome.code)
        if outcome.error:
            print(redact(outcome.error), file=sys.stderr, flush=True)
        return None

    def figure(self, number: int) -> float | None:
        """That of a job which was not to be waited for."""
        return None


class SweepDesk(Desk):
    """For the trials of a sweep, swept over the overrides with these keys."""

    def __init__(self, stage: str, args: SlurmArgs, output_dir: str, sweep: Sweep, swept: Collection[str]) -> None:
        super().__init__(stage, args, output_dir)
        self.sweep, self.swept = sweep, swept

    def begin(self, number: int, words: Sequence[str]) -> bool:
        settings = dict(search_space.shown(word) for word in words if word.split("=", 1)[0] in self.swept)
        return self.sweep.begin(number, settings)

    def earlier(self, number: int) -> tuple[str, Path] | None:
        found = self.sweep.trial_of(number).get("slurm")
        return (found["job"], Path(found["folder"])) if found else None

    def handed_over(self, number: int, job: Any) -> None:
        self.sweep.note(number, slurm={"job": job.job_id, "folder": str(job.paths.folder)})

    def end(self, number: int, outcome: Outcome) -> float | None:
        super().end(number, outcome)
        return self.sweep.end(number, outcome.code, outcome.reason, Path(outcome.run) if outcome.run else None)

    def figure(self, number: int) -> float | None:
        objective: float | None = self.sweep.trial_of(number)["objective"]
        return objective
