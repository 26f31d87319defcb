"""hydra/sweeper=optuna: a Hydra sweeper whose trials Optuna's TPE sampler draws, one after the other."""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from . import search_space
from .config import validate
from .schema import SweepConfig


class OptunaSweeper(Sweeper):
    """Minimises or maximises the return value of the job; None marks a failed trial.

    The sampler is seeded with the setting `seed`: the same objectives lead to the same trials.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        assert self.config is not None
        node = OmegaConf.select(self.config, "search")
        search = validate(SweepConfig, {"search": OmegaConf.to_container(node) if node else {}}).search
        fixed, dimensions = search_space.split(arguments)
        sampler = optuna.samplers.TPESampler(seed=self.config.seed)
        study = optuna.create_study(direction=search.direction, sampler=sampler)
        for number in range(search.trials):
            trial = study.ask()
            batch = [[*fixed, *(d.draw(trial) for d in dimensions)]]
            assert self.launcher is not None
            (done,) = self.launcher.launch(batch, initial_job_idx=number)
            objective: Any = done.return_value
            study.tell(trial, objective, None if objective is not None else optuna.trial.TrialState.FAIL)
