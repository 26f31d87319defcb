"""From a command to its jobs: each is checked before one of them runs, here, in a sweep or on a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from src import compose, config, runs, schema, search_space
from src.cli_args import CONFIGS, Call
from src.compose import first_line, is_sweep, plain_value
from src.errors import ConfigError, UserError
from src.search_space import quoted
from src.stages import STAGES, SWEEP_STAGE
from src.utils.secrets import redact

SEARCHER = "hydra/sweeper=optuna"
LAUNCHER = "hydra_plugins.assay_slurm.Launcher"
FOR_A_CHECKPOINT = 0.75  # of signal_delay_s: the rest is for queueing the job again
MAX_CHECKED_JOBS = 256


def run_jobs(call: Call, task: Callable[[Any], int | None]) -> int:
    """Check every job of the call, then run `task(config)` under Hydra, which also does sweeps and launchers.

    Raises: UserError from the check, or from the task itself where it is no trial of a sweep.
    """
    overrides, problems = compose.prepare_overrides(call)
    compose.register_root(call)
    overrides, search, told = _with_search(call, overrides)
    slurm, misplaced = _slurm(call, overrides)
    told += misplaced + _check_jobs(call, overrides, apart=slurm is not None)
    if problems := [*call.problems, *problems, *told]:
        raise ConfigError(*dict.fromkeys(problems), hint=f"{call.stage} --help lists every setting")
    if search and call.multirun and "--cfg" not in call.flags:
        return _sweep(call, overrides, search, task, slurm)
    if slurm and "--cfg" not in call.flags:
        return _submit(call, overrides, slurm)
    codes: list[int] = []

    def job(composed: DictConfig) -> None:
        if call.multirun:
            current = HydraConfig.get().job
            print(f"job {current.num}:", current.override_dirname.replace("++", ""), flush=True)
        codes.append(task(_loaded(call, composed)) or 0)

    _launch(call, overrides, job)
    return max(codes, default=0)


def _slurm(call: Call, overrides: list[str]) -> tuple[schema.SlurmArgs | None, list[str]]:
    """What a cluster is asked for, None where the runs are made by this process; and what is wrong with that."""
    swept = [text.split("=", 1)[0].lstrip("+") for text in overrides if is_sweep(text)]
    try:
        composed = compose.compose_job(call, [text for text in overrides if not is_sweep(text)])
    except (HydraException, OmegaConfBaseException):
        return None, []  # told by the check of the jobs
    given = {key: plain_value(composed, key) for key in schema.SLURM_KEYS if key in composed}
    if composed.hydra.launcher._target_ != LAUNCHER:
        return None, [f"{key}={value} has no meaning without launch=slurm" for key, value in given.items()]
    problems = [f"{key} cannot differ between the jobs of a command" for key in swept if key in schema.SLURM_KEYS]
    try:
        return config.validate(schema.SlurmConfig, given), problems
    except ConfigError as error:
        return None, [*problems, *error.problems]


def _submit(call: Call, overrides: list[str], args: schema.SlurmArgs, tracker: Any = None) -> int:
    """Run the jobs on a cluster, and wait for them. Returns: the worst of their exit codes."""
    from src.launch.job import Job
    from src.launch.job_tracker import JobTracker

    values, _ = compose.compose_values(call, [text for text in overrides if not is_sweep(text)])
    output_dir = str(values.get("output_dir", schema.OutputArgs.output_dir))
    tracker = tracker or JobTracker(call.stage, args, output_dir, call.multirun)
    flags = [] if call.multirun else ["--multirun"]
    where = f"hydra.sweep.dir={quoted(redact(str(tracker.folder)))}"
    job = Job(call.stage, redact(runs.command()), FOR_A_CHECKPOINT * args.signal_delay_s, tracker)
    _hydra(replace(call, flags=[*call.flags, *flags]), [*overrides, where], job)
    return max(tracker.codes, default=0)


def _sweep(
    call: Call, overrides: list[str], search: schema.SearchArgs, task: Callable[[Any], int | None],
    slurm: schema.SlurmArgs | None,
) -> int:  # fmt: skip
    """Run the jobs as the trials of a sweep, which is told and kept however it ends."""
    from src.sweep import Sweep, plan_sweep

    shipped = call.config_dir == CONFIGS and call.config_name == call.stage
    place = ["--config-path", str(call.config_dir), "--config-name", call.config_name]
    again = ["make", call.stage] if shipped else ["python", "-m", "src.main", call.stage, *place]
    fixed, dimensions = search_space.split(overrides)
    swept = {d.key for d in dimensions}
    values = config.run_settings(call.stage, compose.compose_values(call, fixed)[0])
    sweep = Sweep(plan_sweep(values, compose.compose_values(call, [])[0], overrides, search, again))

    def job(composed: DictConfig) -> float | None:
        current, loaded = HydraConfig.get(), _loaded(call, composed)
        words = [word for word in current.overrides.task if word.split("=", 1)[0] in swept]
        settings = dict(search_space.parse_override(word) for word in words)
        return sweep.run_trial(current.job.num, settings, loaded.output_dir, lambda: task(loaded))

    with sweep:
        if slurm:
            from src.launch.job_tracker import SweepJobTracker

            _submit(call, overrides, slurm, SweepJobTracker(call.stage, slurm, values["output_dir"], sweep, swept))
        else:
            _launch(call, [*overrides, f"hydra.sweep.dir={quoted(redact(str(sweep.folder)))}"], job)
    return sweep.exit_code


def _launch(call: Call, overrides: list[str], job: Callable[[DictConfig], Any]) -> None:
    """Let Hydra run the jobs here. Raises: the UserError of a job, or a ConfigError in Hydra's words."""
    refused: list[UserError] = []

    def guarded(composed: DictConfig) -> Any:
        try:
            return job(composed)
        except UserError as error:
            refused.append(error)
            raise SystemExit(error.exit_code) from error  # Hydra prints a preface to any other exception

    try:
        _hydra(call, overrides, guarded)
    except SystemExit:
        if refused:
            raise refused[0] from None
        raise


def _hydra(call: Call, overrides: list[str], function: Callable[[DictConfig], Any]) -> None:
    """Hand the jobs to Hydra. Raises: ConfigError in its words."""
    argv, sys.argv = sys.argv, [f"assay-{call.stage}", *call.flags, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach the door, which knows how they should sound
    try:
        hydra_main(version_base="1.3", config_path=str(call.config_dir), config_name=compose.ROOT)(function)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from error
    finally:
        sys.argv = argv


def _loaded(call: Call, composed: DictConfig) -> Any:
    """The configuration of one job, without what is the sweep's or the launcher's."""
    return _judged(call, {str(k): plain_value(composed, str(k)) for k in composed})


def _judged(call: Call, values: dict[str, Any]) -> Any:
    return config.load(call.stage, config.run_settings(call.stage, values), STAGES[call.stage].problems)


def _with_search(call: Call, overrides: list[str]) -> tuple[list[str], schema.SearchArgs | None, list[str]]:
    """The overrides with those that a search adds, the sweep's own settings, and what is wrong with these.

    A search has a `search.space`, and is a multirun without the flag; or it is a multirun that names the
    sweeper, or an interval. A setting that the command line names is not searched for.
    """
    if call.stage != SWEEP_STAGE:
        return overrides, None, []
    values, _ = compose.compose_values(call, [text for text in overrides if not is_sweep(text)])
    try:
        search = config.validate(schema.SweepConfig, {"search": values.get("search") or {}}).search
        given = {text.split("=", 1)[0].lstrip("+") for text in overrides}
        words = [search_space.space_override(k, v) for k, v in search.space.items() if k not in given]
        added, problems = compose.prepare_overrides(replace(call, overrides=words, multirun=True))
        _, dimensions = search_space.split([*overrides, *added])
    except ConfigError as error:
        return overrides, None, list(error.problems)
    drawn = SEARCHER in overrides or any(not d.options for d in dimensions)
    if "--cfg" in call.flags or not (search.space or (call.multirun and drawn)):
        return overrides, search, problems
    dev = Path(str(values.get("eval_path"))) / "dev.jsonl"
    if search.metric == "eval_loss" and not dev.is_file():
        problems.append(f"search.metric=eval_loss needs {dev}, which does not exist")
    if not call.multirun:
        call.multirun = True
        call.flags.append("--multirun")
    return [*(text for text in overrides if text != SEARCHER), *added, SEARCHER], search, problems


def _check_jobs(call: Call, overrides: list[str], apart: bool) -> list[str]:
    """What is wrong with any of the jobs, found without running one; `apart` if each is a process of its own."""
    problems: list[str] = []
    gpus: set[str] = set()
    for each in _jobs(call, overrides):
        values, told = compose.compose_values(call, each)
        problems += told
        gpus.add(str(values.get("cuda_visible_devices")))
        try:
            _judged(call, values)
        except UserError as error:
            problems += error.problems
    if len(gpus) > 1 and not apart and not any(text.startswith("hydra/launcher=") for text in overrides):
        problems.append("cuda_visible_devices differs between jobs of one process; start a sweep for each")
    return problems


def _jobs(call: Call, overrides: list[str]) -> Iterator[list[str]]:
    """Each job's overrides: a sweep is checked whole before its first job runs for hours.

    Of a search, whose jobs are drawn as it goes, these are jobs that show each edge of its space.
    """
    if not call.multirun:
        yield overrides
        return
    fixed, dimensions = search_space.split(overrides)
    if SEARCHER in overrides:
        jobs: Iterator[list[str]] = search_space.corners(fixed, dimensions)
    else:
        jobs = ([*fixed, *job] for job in product(*(d.edges() for d in dimensions)))
    yield from islice(jobs, MAX_CHECKED_JOBS)
