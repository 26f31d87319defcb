"""hydra/launcher=assay_slurm: Hydra's submitit launcher, whose jobs are waited for with their output shown.

What happens in a job is Hydra's, submitit's and `src.launch.job`'s. Hydra imports this at each start: submitit
itself is imported only when jobs are submitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

from src.launch import slurm

ConfigStore.instance().store(
    group="hydra/launcher",
    name="assay_slurm",
    node={"_target_": "hydra_plugins.assay_slurm.Launcher"},
    provider="assay",
)


class Launcher(SlurmLauncher):  # type: ignore[misc]
    """Submits the jobs that the desk of its task function does not know, and brings it how each of them ended."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        desk: Any = getattr(self.task_function, "desk")  # noqa: B009
        known = dict(enumerate(map(list, job_overrides), initial_job_idx))
        jobs: dict[int, Any] = {}
        new: list[int] = []
        for number, words in known.items():
            if desk.begin(number, words):
                earlier = desk.earlier(number)
                jobs |= {number: slurm.found(*earlier)} if earlier else {}
                new += [] if earlier else [number]
        if new:
            arguments = [(known[n], "hydra.sweep.dir", n, f"job_id_for_{n}", Singleton.get_state()) for n in new]
            submitted = slurm.submit(self, arguments, desk.folder, desk.args, desk.name)
            jobs |= zip(new, submitted, strict=True)
            for number in new:
                desk.handed_over(number, jobs[number])
            slurm.tell(submitted, desk.args)
        figures = {number: desk.end(number, outcome) for number, outcome in slurm.ends(jobs)}
        return [self._done(words, figures.get(n, desk.figure(n))) for n, words in known.items()]

    def __call__(self, *args: Any) -> JobReturn:
        """In the job. What is returned is written to a file: it is how the job ended, and not its settings."""
        done = super().__call__(*args)
        return replace(done, overrides=None, cfg=None, hydra_cfg=None)

    @staticmethod
    def _done(words: list[str], figure: Any) -> JobReturn:
        done = JobReturn(overrides=words, status=JobStatus.COMPLETED)
        done.return_value = figure
        return done
