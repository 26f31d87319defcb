"""Run the jobs of a command line: locally, as a sweep or on a cluster. All are checked before the first runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any

from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from . import compose, config, gpus, outcome, runs, schema, search_space
from .cli_args import Call
from .compose import OPTUNA, SLURM, first_line, is_sweep, plain_value
from .errors import ConfigError, UserError
from .search_space import quoted
from .stages import NO_EVAL_LOSS, STAGES, SWEEP_STAGE, import_function
from .utils.commands import command
from .utils.secrets import redact, redact_secrets, to_references
from .utils.usage_lock import using

OPTUNA_SWEEPER = "hydra/sweeper=optuna"
CHECKPOINT_SHARE = 0.75  # of signal_delay_s; the rest is for requeueing the job
MAX_CHECKED_JOBS = 256


def run_jobs(call: Call, task: Callable[[Any], int | None]) -> int:
    """Check every job of the command line, then run `task(config)` for each under Hydra.

    Returns: the largest exit code of the jobs.
    Raises: ConfigError with every problem that the check finds; UserError from `task`, unless it is a trial of a
    sweep.
    """
    overrides, problems = compose.prepare_overrides(call)
    compose.register_root(call)
    typed, (overrides, search, search_problems) = overrides, _add_search(call, overrides)
    if overrides != typed:
        compose.register_root(call, overrides)  # groups of the search space win as typed ones do
    slurm, slurm_problems = _slurm_settings(call, overrides)
    job_problems = _check_jobs(call, overrides, one_process=slurm is None)
    if problems := [*call.problems, *problems, *search_problems, *slurm_problems, *job_problems]:
        raise ConfigError(*dict.fromkeys(problems), hint=f"{command(call.stage, '--help')} lists every setting")
    if search and call.multirun and "--cfg" not in call.flags:
        return _run_sweep(call, overrides, search, task, slurm)
    if slurm and "--cfg" not in call.flags:
        return _run_on_slurm(call, overrides, slurm)
    codes: list[int] = []

    def job(composed: DictConfig) -> None:
        if call.multirun:
            current = HydraConfig.get().job
            outcome.show(f"job {current.num}: " + current.override_dirname.replace("++", ""))
        codes.append(task(_load_job(call, composed)) or 0)

    _run_locally(call, overrides, job)
    return max(codes, default=0)


def _slurm_settings(call: Call, overrides: list[str]) -> tuple[schema.SlurmArgs | None, list[str]]:
    """The requested resources of a cluster, None without launch=slurm; and the problems of these settings."""
    swept = [text.split("=", 1)[0].lstrip("+") for text in overrides if is_sweep(text)]
    try:
        composed = compose.compose_job(call, [text for text in overrides if not is_sweep(text)])
    except (HydraException, OmegaConfBaseException):
        return None, []  # _check_jobs reports it
    given = {key: plain_value(composed, key) for key in schema.SLURM_KEYS if key in composed}
    if composed.hydra.launcher._target_ != SLURM:
        return None, [f"{key}={value} is only supported with launch=slurm" for key, value in given.items()]
    problems = [f"{key} cannot differ between the jobs of a command" for key in swept if key in schema.SLURM_KEYS]
    try:
        return config.validate(schema.SlurmConfig, given), problems
    except ConfigError as error:
        return None, [*problems, *error.problems]


def _run_on_slurm(call: Call, overrides: list[str], args: schema.SlurmArgs, tracker: Any = None) -> int:
    """Submit the jobs to a cluster and wait for them. Returns: their largest exit code."""
    from .launch.job import Job
    from .launch.slurm import JobTracker

    values, _ = compose.compose_values(call, [text for text in overrides if not is_sweep(text)])
    output_dir = str(values.get("output_dir", schema.OutputArgs.output_dir))
    tracker = tracker or JobTracker(call.stage, args, output_dir, call.multirun)
    flags = [] if call.multirun else ["--multirun"]
    job = Job(call.stage, redact(runs.command()), CHECKPOINT_SHARE * args.signal_delay_s, tracker)
    with using(output_dir):
        _call_hydra(replace(call, flags=[*call.flags, *flags]), [*overrides, _sweep_dir(tracker.folder)], job)
    return max(tracker.codes, default=0)


def _run_sweep(
    call: Call, overrides: list[str], search: schema.SearchArgs, task: Callable[[Any], int | None],
    slurm: schema.SlurmArgs | None,
) -> int:  # fmt: skip
    """Run the jobs as trials of a sweep, which records and prints its results however it ends."""
    from .sweep import Sweep, plan_sweep

    shipped = not call.config_path and call.config_name == call.stage
    file = [] if shipped else ["--config-path", str(call.config_dir), "--config-name", call.config_name]
    fixed, dimensions = search_space.split(overrides)
    swept = {d.key for d in dimensions}
    values = config.run_settings(call.stage, compose.compose_values(call, fixed)[0])
    sweep = Sweep(plan_sweep(values, compose.compose_values(call, [])[0], overrides, search, file))

    def job(composed: DictConfig) -> float | None:
        current, loaded = HydraConfig.get(), _load_job(call, composed)
        words = [word for word in current.overrides.task if word.split("=", 1)[0] in swept]
        settings = dict(search_space.parse_override(word) for word in words)
        return sweep.run_trial(current.job.num, settings, loaded.output_dir, lambda: task(loaded))

    with sweep, using(values["output_dir"]):  # between its trials too
        if slurm:
            from .launch.slurm import SweepJobTracker

            _run_on_slurm(
                call, overrides, slurm, SweepJobTracker(call.stage, slurm, values["output_dir"], sweep, swept)
            )
        else:
            _run_locally(call, [*overrides, _sweep_dir(sweep.folder)], job)
    return sweep.exit_code


def _run_locally(call: Call, overrides: list[str], job: Callable[[DictConfig], Any]) -> None:
    """Run the jobs in this process. Raises: UserError of a job; ConfigError with Hydra's message."""
    errors: list[Exception] = []
    kinds = UserError if call.multirun else Exception  # an error that Hydra sees is printed with all overrides

    def guarded(composed: DictConfig) -> Any:
        try:
            return job(composed)
        except kinds as error:
            errors.append(error)
            raise SystemExit(getattr(error, "exit_code", 1)) from error

    try:
        _call_hydra(call, overrides, guarded)
    except SystemExit:
        if not errors:
            raise
    if errors:
        raise errors[0]  # outside of `except`: its own causes stay


def _call_hydra(call: Call, overrides: list[str], function: Callable[[DictConfig], Any]) -> None:
    """Run Hydra's main function. Raises: ConfigError with its message."""
    _register_plugins(call, overrides)
    argv, sys.argv = sys.argv, [f"assay-{call.stage}", *call.flags, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach src.main unchanged
    try:
        hydra_main(version_base="1.3", config_path=str(call.config_dir), config_name=compose.ROOT)(function)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from error
    finally:
        sys.argv = argv


def _register_plugins(call: Call, overrides: list[str]) -> None:
    """Give Hydra the classes of the sweeper and the launcher, if this call uses them."""
    kept = [text for text in overrides if not text.startswith("hydra.sweep.dir=") and not is_sweep(text)]
    used = compose.compose_job(call, kept).hydra
    known = Plugins.instance().class_name_to_class
    if used.sweeper._target_ == OPTUNA:
        known[OPTUNA] = import_function(".optuna_sweeper:OptunaSweeper")
    if used.launcher._target_ == SLURM:
        known[SLURM] = import_function(".launch.hydra_launcher:Launcher")


def _load_job(call: Call, composed: DictConfig) -> Any:
    """The validated configuration of one job."""
    if call.multirun and STAGES[call.stage].inherits:  # Hydra composed all jobs with the run of one of them
        composed = compose.compose_job(call, list(HydraConfig.get().overrides.task))
    return _load(call, {str(k): plain_value(composed, str(k)) for k in composed if k != "hydra"})


def _load(call: Call, values: dict[str, Any]) -> Any:
    return config.load(call.stage, config.run_settings(call.stage, values), STAGES[call.stage].problems)


def _add_search(call: Call, overrides: list[str]) -> tuple[list[str], schema.SearchArgs | None, list[str]]:
    """The overrides including those of the search space, the settings of the sweep, and their problems.

    A search is a command with a `search.space`, which implies --multirun; or a multirun with the Optuna sweeper or
    an interval. Settings on the command line are not searched.
    """
    if call.stage != SWEEP_STAGE:
        return overrides, None, []
    values, _ = compose.compose_values(call, [text for text in overrides if not is_sweep(text)])
    try:
        search = config.validate(schema.SweepConfig, {"search": values.get("search") or {}}).search
        given = {text.split("=", 1)[0].lstrip("+") for text in overrides}
        space = to_references(
            [search_space.space_override(k, v) for k, v in search.space.items() if k not in given]
        )
        added, problems = compose.prepare_overrides(replace(call, overrides=space, multirun=True))
        added = [text for text in added if text.split("=", 1)[0].lstrip("+") not in given]
        _, dimensions = search_space.split([*overrides, *added])
    except ConfigError as error:
        return overrides, None, list(error.problems)
    drawn = OPTUNA_SWEEPER in overrides or any(not d.options for d in dimensions)
    if "--cfg" in call.flags or not (search.space or (call.multirun and drawn)):
        return overrides, search, problems
    if search.metric == "eval_loss" and (reason := _no_eval_loss(call, values)):
        problems.append(f"search.metric=eval_loss needs an evaluation loss, and {reason}")
    if not call.multirun:
        call.multirun = True
        call.flags.append("--multirun")
    return [*(text for text in overrides if text != OPTUNA_SWEEPER), *added, OPTUNA_SWEEPER], search, problems


def _no_eval_loss(call: Call, values: dict[str, Any]) -> str:
    """Why a run with these settings has no evaluation loss; empty if it has one, or if a setting is wrong."""
    try:
        return str(import_function(NO_EVAL_LOSS)(_load(call, values)))
    except ConfigError:  # reported with those of all jobs
        return ""


def _sweep_dir(folder: Path) -> str:
    return f"hydra.sweep.dir={quoted(redact_secrets(str(folder)))}"


def _check_jobs(call: Call, overrides: list[str], one_process: bool) -> list[str]:
    """The problems of all jobs, without running one. `one_process`: this process runs all of them."""
    problems: list[str] = []
    devices: set[str] = set()
    warnings: dict[str, None] = {}
    for each in _expand_jobs(call, overrides):
        values, unresolved = compose.compose_values(call, each)
        problems += unresolved
        devices.add(str(values.get("cuda_visible_devices")))
        if call.multirun and values.get("init_from") == "latest":
            problems.append("init_from=latest is another run for each job; name the run")
        if one_process:
            absent, notes = gpus.check(call, each, values)
            problems += absent
            warnings |= dict.fromkeys(notes)
        try:
            _load(call, values)
        except UserError as error:
            problems += error.problems
    if not one_process and any(a != b for a, b in pairwise(call.inherited.values())):
        problems.append("launch=slurm: the jobs of one command must be about one run; start a command per run")
    if not problems and "--cfg" not in call.flags:
        for warning in warnings:
            outcome.warn(warning)
    if len(devices) > 1 and one_process and not any(text.startswith("hydra/launcher=") for text in overrides):
        problems.append("cuda_visible_devices differs between jobs of one process; start one sweep per value")
    return problems


def _expand_jobs(call: Call, overrides: list[str]) -> Iterator[list[str]]:
    """The overrides of each job, of the first MAX_CHECKED_JOBS at most.

    The jobs of a search are drawn while it runs. Before it starts, the bounds of the search space are checked.
    """
    if not call.multirun:
        yield overrides
        return
    fixed, dimensions = search_space.split(overrides)
    if OPTUNA_SWEEPER in overrides:
        jobs: Iterator[list[str]] = search_space.corners(fixed, dimensions)
    else:
        jobs = ([*fixed, *job] for job in product(*(d.edges() for d in dimensions)))
    yield from islice(jobs, MAX_CHECKED_JOBS)
