"""hydra/launcher=assay_slurm: Hydra's submitit launcher, with the output of the jobs shown while it waits.

A job runs `job.py`. submitit is imported only when jobs are submitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

from . import slurm


class Launcher(SlurmLauncher):  # type: ignore[misc]
    """Submits the jobs that the tracker has not recorded yet, and passes each result to the tracker."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        tracker: Any = getattr(self.task_function, "tracker")  # noqa: B009
        overrides = dict(enumerate(map(list, job_overrides), initial_job_idx))
        jobs: dict[int, Any] = {}
        new: list[int] = []
        for number, words in overrides.items():
            if tracker.register(number, words):
                earlier = tracker.submitted_earlier(number)
                jobs |= {number: slurm.reopen_job(*earlier)} if earlier else {}
                new += [] if earlier else [number]
        if new:
            state = Singleton.get_state()
            arguments = [(overrides[n], "hydra.sweep.dir", n, f"job_id_for_{n}", state) for n in new]
            submitted = slurm.submit(self, arguments, tracker.folder, tracker.args, tracker.name)
            jobs |= zip(new, submitted, strict=True)
            for number in new:
                tracker.record_submission(number, jobs[number])
            slurm.announce(submitted, tracker.args)
        objectives = {number: tracker.record_result(number, result) for number, result in slurm.wait_for(jobs)}
        return [self._job_return(words, objectives.get(n, tracker.objective(n))) for n, words in overrides.items()]

    def __call__(self, *args: Any) -> JobReturn:
        """Runs in the job. Its return value is written to a file: without the settings, which may hold secrets."""
        done = super().__call__(*args)
        return replace(done, overrides=None, cfg=None, hydra_cfg=None)

    @staticmethod
    def _job_return(words: list[str], objective: Any) -> JobReturn:
        done = JobReturn(overrides=words, status=JobStatus.COMPLETED)
        done.return_value = objective
        return done
