"""Submit jobs to Slurm, show their output while they run, and record their results: exit codes, or trials.

outputs/slurm/2026-01-15_10-30-45/
  12_submission.sh            the script given to sbatch
  12_submitted.pkl            the settings, with references instead of secrets
  12_0_log.out, 12_0_log.err  stdout and stderr of the job; 12_3_0_log.out for job 3 of an array
  12_0_result.pkl             how the job ended
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import outcome, runs, search_space
from ..errors import Stopped, UserError
from ..schema import SlurmArgs
from ..sweep import Sweep
from ..utils import slurm
from ..utils.files import read_json, write_json
from ..utils.logs import silence_stdout
from ..utils.secrets import redact
from .job import JobResult

SUBMITIT_NAMES = {  # setting -> parameter of submitit
    "partition": "slurm_partition", "account": "slurm_account", "qos": "slurm_qos",
    "constraint": "slurm_constraint", "timeout_min": "timeout_min", "nodes": "nodes",
    "gpus_per_node": "gpus_per_node", "cpus_per_task": "cpus_per_task", "mem_gb": "mem_gb",
    "max_parallel": "slurm_array_parallelism", "signal_delay_s": "slurm_signal_delay_s",
}  # fmt: skip
POLL_FILES_S, POLL_FILES_PER_JOB_S = 0.5, 0.02  # seconds between reads of the jobs' files: minimum, and per job
POLL_QUEUE_S = 5  # seconds between calls of squeue
STOPPED_STATES = {"CANCELLED", "PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}  # not failures


def require_slurm() -> None:
    """Raises: UserError if a Slurm command is missing on this machine."""
    for program in ("sbatch", "srun", "squeue", "scontrol"):
        if not shutil.which(program):
            raise UserError(
                f"launch=slurm needs {program}, which is not installed on this machine",
                hint="run the command on a login node of the cluster, or without launch=slurm",
            )


def submit(
    function: Any, arguments: Sequence[tuple[Any, ...]], folder: Path, args: SlurmArgs, name: str
) -> list[Any]:
    """Submit a job, or an array of jobs, each of which calls `function` with one tuple of `arguments`.

    Returns: submitit's jobs, in the same order.
    Raises: UserError with sbatch's message.
    """
    import submitit

    executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=args.max_requeues)
    given = {name: value for key, name in SUBMITIT_NAMES.items() if (value := getattr(args, key)) is not None}
    executor.update_parameters(name=name, slurm_additional_parameters={"requeue": True} | args.sbatch, **given)
    quiet = {"SUBMITIT_LOG_LEVEL": "ERROR"}
    try:
        with submitit.helpers.environment_variables(**quiet), contextlib.redirect_stderr(io.StringIO()):
            return list(executor.map_array(function, *zip(*arguments, strict=True)))
    except submitit.core.utils.FailedJobError as error:
        shutil.rmtree(folder)
        raise UserError(f"sbatch failed: {_join_lines(str(error))}", hint="nothing was submitted") from None


def reopen_job(job_id: str, folder: Path) -> Any:
    """A job that an earlier process submitted."""
    import submitit

    return submitit.SlurmJob(folder, job_id)


def _join_lines(message: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in message.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def announce(jobs: Sequence[Any], args: SlurmArgs) -> None:
    """Print the ids of the jobs, and write them to slurm.json beside ASSAY_RUN_FILE for the caller."""
    ids = [job.job_id for job in jobs]
    where = f" (partition {args.partition})" if args.partition else ""
    log = os.path.relpath(jobs[0].paths.stdout if len(jobs) == 1 else jobs[0].paths.folder)
    named = f"job {ids[0]}" if len(ids) == 1 else f"jobs {ids[0]} to {ids[-1]}"
    print(f"slurm {named}{where}; {'log' if len(ids) == 1 else 'logs in'} {log}", flush=True)
    if run_file := os.environ.get("ASSAY_RUN_FILE"):
        path = Path(run_file).with_name("slurm.json")
        known = read_json(path)["ids"] if path.exists() else []
        write_json(path, {"ids": [*known, *(i for i in ids if i not in known)]})


def wait_for(jobs: Mapping[int, Any]) -> Iterator[tuple[int, JobResult]]:
    """Yield `(number, result)` of each job as it ends; print the output of the running ones meanwhile.

    Raises: KeyboardInterrupt if the user interrupts the waiting; the jobs continue, and a line says so.
    """
    waiting = {number: _WatchedJob(job, len(jobs) > 1) for number, job in jobs.items()}
    polled = 0.0
    try:
        while waiting:
            if time.monotonic() - polled > POLL_QUEUE_S:
                _poll_queue(waiting.values())
                polled = time.monotonic()
            for number, watched in list(waiting.items()):
                if result := watched.poll():
                    del waiting[number]
                    yield number, result
            if waiting:
                time.sleep(max(POLL_FILES_S, POLL_FILES_PER_JOB_S * len(waiting)))
    except KeyboardInterrupt:
        ids = ",".join(sorted({w.id.split("_")[0] for w in waiting.values()}))
        first = next(iter(waiting.values()))
        print(
            f"slurm job {ids} continues: squeue --jobs={ids} shows its state, tail -f {first.log} its output; "
            f"scancel {ids.replace(',', ' ')} ends it",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        raise


def _poll_queue(watched: Any) -> None:
    """Query the states of the jobs, and print those that have changed."""
    queued = slurm.queue(w.id for w in watched)
    if queued is not None:
        for each in watched:
            each.update_state(queued.get(each.id))


class _WatchedJob:
    """A submitted job, its state in the queue, and the part of its output that has been printed."""

    def __init__(self, job: Any, named: bool) -> None:
        self.job, self.id = job.task(0), job.job_id
        self.log = os.path.relpath(self.job.paths.stdout)
        self.missing = 0  # consecutive answers of squeue without this job
        self.state: slurm.QueuedJob | None = None
        prefix = f"{self.id}: " if named else ""
        self.streams = [_Stream(self.job.paths.stdout, 1, prefix), _Stream(self.job.paths.stderr, 2, prefix)]

    def update_state(self, queued: slurm.QueuedJob | None) -> None:
        self.missing = 0 if queued else self.missing + 1
        if queued and queued != self.state and queued.state != "COMPLETING":
            detail = f" ({queued.detail})" if queued.detail else ""
            print(f"slurm job {self.id}: {queued.state.lower()}{detail}", flush=True)
            self.state = queued

    def poll(self) -> JobResult | None:
        """Show new output of the job. Returns: its result, if it has ended."""
        ended = self.job.paths.result_pickle.exists()
        for stream in self.streams:
            stream.show(to_the_end=ended or self.missing > 1)
        if ended:
            return self._read_result()
        return self._result_from_state() if self.missing > 1 else None

    def _read_result(self) -> JobResult:
        failed = f"slurm job {self.id} failed; its log is {self.log}"
        try:
            (done,) = self.job.results()
            with contextlib.redirect_stderr(io.StringIO()):  # Hydra prints a preface to any exception
                result: JobResult = done.return_value
        except UserError as error:
            return _with_reason(JobResult(error.exit_code, error=str(error)))
        except Exception as error:
            return _with_reason(JobResult(1, error=f"{error}\n{failed}"))
        if result.code and not result.error:
            lines = [line for line in (self.job.stderr() or "").splitlines() if line.strip()]
            error_text = failed if result.code == 1 else None
            return replace(result, error=error_text, reason=lines[-1] if lines else f"exit code {result.code}")
        return _with_reason(result)

    def _result_from_state(self) -> JobResult:
        """The result of a job without a result file, from scontrol."""
        details = slurm.job_details(self.id)
        state, code = details.get("JobState", "UNKNOWN"), details.get("ExitCode", "unknown")
        fact = f"slurm job {self.id} ended without a result: {state.lower()}"
        if state in STOPPED_STATES or code.endswith(f":{signal.SIGTERM:d}"):
            return _with_reason(JobResult(Stopped.exit_code, error=f"{fact}; run the command again to resume"))
        return _with_reason(JobResult(1, error=f"{fact}, exit code {code}; its log is {self.log}"))


def _with_reason(result: JobResult) -> JobResult:
    return replace(result, reason=(result.error or "").replace("\n", "; "))


class _Stream:
    """A growing file that is copied to this process's stdout (1) or stderr (2)."""

    def __init__(self, path: Path, number: int, prefix: str) -> None:
        self.path, self.number, self.prefix = path, number, prefix
        self.shown = 0  # bytes
        self.rest = b""

    def show(self, to_the_end: bool = False) -> None:
        try:
            with self.path.open("rb") as file:
                file.seek(self.shown)
                new = file.read()
        except FileNotFoundError:
            return
        self.shown += len(new)
        lines, newline, self.rest = (self.rest + new).rpartition(b"\n")
        if to_the_end:
            lines, newline, self.rest = lines + newline + self.rest, b"", b""
        if text := (lines + newline).decode(errors="replace"):
            self._write("".join(self.prefix + line for line in text.splitlines(keepends=True)))

    def _write(self, text: str) -> None:
        stream = sys.stdout if self.number == 1 else sys.stderr
        try:
            stream.write(text)
            stream.flush()
        except BrokenPipeError:
            silence_stdout()


class JobTracker:
    """Tracks the jobs of a command that is not a sweep; the command's exit code is the highest of theirs."""

    def __init__(self, stage: str, args: SlurmArgs, output_dir: str, several: bool = False) -> None:
        self.args, self.several, self.stage, self.name = args, several, stage, f"assay-{stage}"
        require_slurm()
        runs.check_writable(output_dir)
        self.folder = runs.new_folder(Path(output_dir) / "slurm")
        self.codes: list[int] = []

    def register(self, number: int, overrides: Sequence[str]) -> bool:
        """Register a job. Returns: False if the trial is already finished."""
        if self.several:
            print(f"job {number}:", *(redact(word).lstrip("+") for word in overrides), flush=True)
        return True

    def submitted_earlier(self, number: int) -> tuple[str, Path] | None:
        """The Slurm id and the folder of this job, if an earlier process submitted it."""
        return None

    def record_submission(self, number: int, job: Any) -> None:
        """Record the Slurm job of a submitted job or trial."""

    def record_result(self, number: int, result: JobResult) -> float | None:
        """Record how a job ended. Returns: its objective, if it is a trial that has one."""
        self.codes.append(result.code)
        if outcome.output.json:  # the job's own log holds the end of its stage
            outcome.begin(self.stage)
            outcome.report(run=Path(result.run) if result.run else None, document={"code": result.code})
        if result.error:
            print(redact(result.error), file=sys.stderr, flush=True)
        return None

    def objective(self, number: int) -> float | None:
        """The objective of a trial that finished in an earlier sweep process (nothing was submitted)."""
        return None


class SweepJobTracker(JobTracker):
    """Tracks the trials of a sweep over the overrides with the keys `swept`."""

    def __init__(self, stage: str, args: SlurmArgs, output_dir: str, sweep: Sweep, swept: Collection[str]) -> None:
        super().__init__(stage, args, output_dir)
        self.sweep, self.swept = sweep, swept

    def register(self, number: int, overrides: Sequence[str]) -> bool:
        swept = [word for word in overrides if word.split("=", 1)[0] in self.swept]
        return self.sweep.start_trial(number, dict(map(search_space.parse_override, swept)))

    def submitted_earlier(self, number: int) -> tuple[str, Path] | None:
        found = self.sweep.trial(number).get("slurm")
        return (found["job"], Path(found["folder"])) if found else None

    def record_submission(self, number: int, job: Any) -> None:
        self.sweep.annotate(number, slurm={"job": job.job_id, "folder": str(job.paths.folder)})

    def record_result(self, number: int, result: JobResult) -> float | None:
        super().record_result(number, result)
        return self.sweep.finish_trial(
            number, result.code, result.reason, Path(result.run) if result.run else None
        )

    def objective(self, number: int) -> float | None:
        found: float | None = self.sweep.trial(number)["objective"]
        return found
