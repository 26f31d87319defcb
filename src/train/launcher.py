"""Start the worker processes of a training run with the agent of torch.distributed.run.

Each worker is `python -m src.main train` again, with the validated settings in its environment. When one worker
fails, the agent ends all of them. The main process prints on this terminal; the output of the others is captured,
and shown if one of them caused the failure.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any
from uuid import uuid4

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .. import MAIN, outcome, runs
from ..errors import ConfigError, PeerLost, Stopped, UserError
from ..utils.files import read_json
from ..utils.logs import log
from ..utils.process_info import launch_env
from ..utils.secrets import redact
from ..utils.workers import cores
from .launch_plan import LaunchPlan

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOPBACK = "127.0.0.1"
MAX_ERROR_CHARS = 4000  # of a worker's traceback


def launch(plan: LaunchPlan, settings: Mapping[str, Any], output_dir: str) -> int:
    """Train in `plan.processes` processes on this machine, together with those of the other machines.

    Args:
        settings: the validated configuration that every worker gets.
        output_dir: where the workers write the run; a failure is recorded in it.

    Returns: 0 if all workers succeeded.
    Raises: SystemExit with the exit code of the worker that failed, after its error was printed; ConfigError if
        the machines do not connect.
    """
    log.info("starting %s", _describe(plan))
    with (
        TemporaryDirectory(prefix="assay-") as folder,
        _worker_environment(settings, plan.processes, Path(folder) / "run"),
        _forward_signals() as received,
    ):
        try:
            elastic_launch(_elastic_config(plan, folder), sys.executable)("-m", MAIN, "train")
            _report_run(os.environ[runs.RUN_FILE])
            return 0
        except ChildFailedError as error:
            raise SystemExit(_report_failure(error.failures, Path(folder), output_dir, received)) from None
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None
        except (OSError, RuntimeError) as error:  # the rendezvous failed
            at = f"{plan.master_addr}:{plan.master_port}"
            raise ConfigError(
                f"the machines did not connect at {at}: {error}", hint="see docs/distributed.md"
            ) from error


def _report_run(run_file: str) -> None:
    """Report the run that the workers wrote, which only the first machine has in its file."""
    with suppress(OSError):
        run = runs.Run(Path(Path(run_file).read_text(encoding="utf-8").strip()))
        metrics = read_json(run.path / "metrics.json")["train"]
        outcome.report(run=run.path, document={"metrics": metrics, "model": str(run.model)})


def _describe(plan: LaunchPlan) -> str:
    processes = f"{plan.processes} process" + ("es" if plan.processes > 1 else "")
    if plan.nodes == 1:
        return processes
    address = f"{plan.master_addr}:{plan.master_port}"
    return f"{processes} on machine {plan.node_rank} of {plan.nodes}, which connect at {address}"


def _elastic_config(plan: LaunchPlan, folder: str) -> LaunchConfig:
    single = plan.nodes == 1
    captured = {i: Std.ALL for i in range(plan.processes) if i or plan.node_rank}
    return LaunchConfig(
        min_nodes=plan.nodes,
        max_nodes=plan.nodes,
        nproc_per_node=plan.processes,
        run_id=uuid4().hex if single else "assay",
        rdzv_backend="c10d" if single else "static",
        rdzv_endpoint=f"{LOOPBACK}:0" if single else f"{plan.master_addr}:{plan.master_port}",
        rdzv_configs={} if single else {"rank": plan.node_rank},
        local_addr=LOOPBACK if single else None,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=captured),
        signals_to_handle="SIGQUIT",  # the others are handled by _forward_signals
    )


@contextmanager
def _worker_environment(settings: Mapping[str, Any], processes: int, run_file: Path) -> Iterator[None]:
    """Set the environment variables that the workers inherit.

    run_file: where they write the path of their run, unless the caller of this process names a file.
    """
    # the id of the run is for the workers, and is used only once
    before = {name: value for name, value in os.environ.items() if name != runs.RUN_ID}
    os.environ.update(launch_env(settings, runs.command()))
    os.environ.setdefault(runs.RUN_FILE, str(run_file))
    os.environ[outcome.QUIET] = str(int(outcome.output.quiet))
    outcome.output.ends_elsewhere = not outcome.output.json  # the first worker prints the end of the stage
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # _report_failure prints one sentence instead
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _forward_signals() -> Iterator[list[int]]:
    """Forward SIGNALS to every worker, which handles them. Yields the list of received signals."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        children = psutil.Process().children()
        for child in children:
            child.send_signal(number)
        if not children:  # no worker has started yet
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGQUIT)}
    for number in SIGNALS:
        if number != signal.SIGHUP or before[number] != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, forward)
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _report_failure(
    failures: Mapping[int, ProcessFailure], folder: Path, output_dir: str, received: Sequence[int]
) -> int:
    """Print why the run failed, unless the main process has done so, and record it in the run.

    Returns: the exit code of the worker that caused the failure.
    """
    if any(f.exitcode == Stopped.exit_code for f in failures.values()):
        return Stopped.exit_code
    if received:
        return 128 + received[0]
    # The failures come in the order in which the agent saw them. A worker that the agent ended, or that lost its
    # connection to another, is not the cause.
    consequences = (PeerLost.exit_code, -signal.SIGTERM)
    causes = {r: f for r, f in failures.items() if f.exitcode not in consequences} or failures
    rank, cause = next(iter(causes.items()))
    if rank or cause.exitcode < 0:
        text = _failure_text(folder, cause)
        print(redact(f"process {rank}: {text}"), file=sys.stderr, flush=True)
        _mark_failed(output_dir, f"process {rank}: {text.splitlines()[-1]}")
    return 128 - cause.exitcode if cause.exitcode < 0 else cause.exitcode


def _failure_text(folder: Path, failure: ProcessFailure) -> str:
    """Why a worker ended, from its captured stderr or its signal."""
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    text = "".join(
        p.read_text(errors="replace") for p in folder.glob(f"*/*/{failure.local_rank}/stderr.log")
    ).strip()
    if failure.exitcode == UserError.exit_code:
        return text.splitlines()[-1] if text else "ended with exit code 2"
    start = text.rfind("Traceback (most recent call last)")
    return text[max(start, 0) :][-MAX_ERROR_CHARS:] or f"ended with exit code {failure.exitcode}"


def _mark_failed(output_dir: str, error: str) -> None:
    """Record the error in the run of these workers, if they have created it."""
    for run in runs.all_runs(output_dir):
        manifest = run.manifest
        if manifest["process"].get("launcher") == os.getpid() and manifest["status"] != runs.FINISHED:
            run.update(status=runs.FAILED, error=error, ended=runs.now())
            return
