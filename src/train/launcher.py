"""Starting the processes of a training: the agent of torch.distributed.run, around the door.

Each process is `python -m src.main train` again, with the settings handed to it through the environment. The
agent ends all of them when one fails. The first process speaks on this terminal; what the others say is kept,
and shown if one of them is why the training failed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from uuid import uuid4

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from src import runs
from src.errors import ConfigError, PeerLost, Stopped, UserError
from src.schema import TrainConfig
from src.train.launch_plan import LaunchPlan
from src.utils.logs import log
from src.utils.process_info import launch_env
from src.utils.secrets import redact
from src.utils.workers import cores

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOPBACK = "127.0.0.1"
MAX_ERROR_CHARS = 4000  # characters of a failed process that are shown


def launch(cfg: TrainConfig, plan: LaunchPlan) -> int:
    """Train in `plan.processes` processes on this machine, together with those of the other machines.

    Returns: 0 if all went well.
    Raises: SystemExit with the exit code of the process that failed, whose error has been told.
    """
    log.info("starting %s", _describe(plan))
    with (
        TemporaryDirectory(prefix="assay-") as folder,
        _worker_environment(cfg, plan),
        _forward_signals() as asked,
    ):
        try:
            elastic_launch(_elastic_config(plan, folder), sys.executable)("-m", "src.main", "train")
            return 0
        except ChildFailedError as error:
            raise SystemExit(_report_failure(error.failures, Path(folder), cfg, asked)) from None
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None
        except (OSError, RuntimeError) as error:  # the agents did not meet
            at = f"{plan.master_addr}:{plan.master_port}"
            raise ConfigError(
                f"the machines did not meet at {at}: {error}", hint="see docs/distributed.md"
            ) from error


def _describe(plan: LaunchPlan) -> str:
    here = f"{plan.processes} process" + ("es" if plan.processes > 1 else "")
    if plan.nodes == 1:
        return here
    return (
        f"{here} on machine {plan.node_rank} of {plan.nodes}, which meet at {plan.master_addr}:{plan.master_port}"
    )


def _elastic_config(plan: LaunchPlan, folder: str) -> LaunchConfig:
    alone = plan.nodes == 1
    quiet = {i: Std.ALL for i in range(plan.processes) if i or plan.node_rank}
    return LaunchConfig(
        min_nodes=plan.nodes,
        max_nodes=plan.nodes,
        nproc_per_node=plan.processes,
        run_id=uuid4().hex if alone else "assay",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint=f"{LOOPBACK}:0" if alone else f"{plan.master_addr}:{plan.master_port}",
        rdzv_configs={} if alone else {"rank": plan.node_rank},
        local_addr=LOOPBACK if alone else None,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=quiet),
        signals_to_handle="SIGHUP,SIGQUIT",  # SIGTERM and SIGINT are ours
    )


@contextmanager
def _worker_environment(cfg: TrainConfig, plan: LaunchPlan) -> Iterator[None]:
    """What the processes find in their environment."""
    before = {name: value for name, value in os.environ.items() if name != runs.RUN_ID}  # theirs, and used once
    os.environ.update(launch_env(asdict(cfg), runs.command()))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // plan.processes)))
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are told here, in a sentence
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _forward_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT go to every process, which knows what to do. Yields those that came."""
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        children = psutil.Process().children()
        for child in children:
            child.send_signal(number)
        if not children:  # they have not been started yet
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGHUP, signal.SIGQUIT)}
    for number in SIGNALS:
        signal.signal(number, forward)
    try:
        yield came
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _report_failure(
    failures: Mapping[int, ProcessFailure], folder: Path, cfg: TrainConfig, asked: Sequence[int]
) -> int:
    """Tell what made the training end, if the first process has not, and note it in the run.

    Returns: its exit code.
    """
    if any(f.exitcode == Stopped.exit_code for f in failures.values()):
        return Stopped.exit_code
    if asked:
        return 128 + asked[0]
    # in the order in which they were seen; what the agent itself ended, or another's end broke, is no cause
    others = (PeerLost.exit_code, -signal.SIGTERM)
    causes = {r: f for r, f in failures.items() if f.exitcode not in others} or failures
    rank, cause = next(iter(causes.items()))
    if rank or cause.exitcode < 0:
        said = _failure_text(folder, cause)
        print(redact(f"process {rank}: {said}"), file=sys.stderr, flush=True)
        _mark_failed(f"process {rank}: {said.splitlines()[-1]}", cfg)
    return 128 - cause.exitcode if cause.exitcode < 0 else cause.exitcode


def _failure_text(folder: Path, failure: ProcessFailure) -> str:
    """Why a process ended, in its own words."""
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    text = "".join(
        p.read_text(errors="replace") for p in folder.glob(f"*/*/{failure.local_rank}/stderr.log")
    ).strip()
    if failure.exitcode == UserError.exit_code:
        return text.splitlines()[-1] if text else "ended with exit code 2"
    start = text.rfind("Traceback (most recent call last)")
    return text[max(start, 0) :][-MAX_ERROR_CHARS:] or f"ended with exit code {failure.exitcode}"


def _mark_failed(error: str, cfg: TrainConfig) -> None:
    """Write the error to the run that the processes made, if they came so far."""
    for run in runs.all_runs(cfg.output_dir):
        manifest = run.manifest
        if manifest["process"].get("launcher") == os.getpid() and manifest["status"] != runs.FINISHED:
            run.update(status=runs.FAILED, error=error, ended=runs.now())
            return
