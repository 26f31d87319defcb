"""Handing jobs to Slurm, and waiting for them: their output is shown, their ends are told.

outputs/slurm/2026-01-15_10-30-45/
  12_submission.sh            what sbatch was given
  12_submitted.pkl            the settings, with references in the place of secrets
  12_0_log.out, 12_0_log.err  what the job says; 12_3_0_log.out of job 3 of an array
  12_0_result.pkl             how it ended
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.errors import Stopped, UserError
from src.launch.job import Outcome
from src.schema import SlurmArgs
from src.utils import slurm
from src.utils.files import read_json, write_json
from src.utils.logs import silence_stdout

NAMES = {  # of a setting, as submitit has it
    "partition": "slurm_partition", "account": "slurm_account", "qos": "slurm_qos",
    "constraint": "slurm_constraint", "timeout_min": "timeout_min", "nodes": "nodes",
    "gpus_per_node": "gpus_per_node", "cpus_per_task": "cpus_per_task", "mem_gb": "mem_gb",
    "max_parallel": "slurm_array_parallelism", "signal_delay_s": "slurm_signal_delay_s",
}  # fmt: skip
LOOK, LOOK_EACH = 0.5, 0.02  # seconds between two looks at the files of the jobs, at least, and for each job
ASK = 5  # seconds between two questions to the scheduler
HINTS = {"PartitionTimeLimit": "; timeout_min is more than the partition allows: cancel it and ask for less"}
LOST = {"CANCELLED", "PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}  # and nothing is wrong with it


def refuse_elsewhere() -> None:
    """Raises: UserError on a machine that can hand no job to Slurm."""
    for program in ("sbatch", "srun", "squeue", "scontrol"):
        if not shutil.which(program):
            raise UserError(
                f"launch=slurm needs {program}, which is not here",
                hint="run the command on a machine of the cluster, or without launch=slurm",
            )


def submit(
    function: Any, arguments: Sequence[tuple[Any, ...]], folder: Path, args: SlurmArgs, name: str
) -> list[Any]:
    """Hand `function(*each)` for each of `arguments` to Slurm: one job, or one array of jobs.

    Returns: submitit's jobs, in the same order.
    Raises: UserError in sbatch's words.
    """
    import submitit

    executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=args.max_requeues)
    asked = {theirs: value for ours, theirs in NAMES.items() if (value := getattr(args, ours)) is not None}
    executor.update_parameters(name=name, slurm_additional_parameters={"requeue": True} | args.sbatch, **asked)
    quiet = {"SUBMITIT_LOG_LEVEL": "ERROR"}
    try:
        with submitit.helpers.environment_variables(**quiet), contextlib.redirect_stderr(io.StringIO()):
            return list(executor.map_array(function, *zip(*arguments, strict=True)))
    except submitit.core.utils.FailedJobError as error:
        shutil.rmtree(folder)
        raise UserError(f"sbatch refused: {_in_a_line(str(error))}", hint="nothing was submitted") from None


def found(job_id: str, folder: Path) -> Any:
    """The job that an earlier process submitted."""
    import submitit

    return submitit.SlurmJob(folder, job_id)


def _in_a_line(said: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in said.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def tell(jobs: Sequence[Any], args: SlurmArgs) -> None:
    """Say which jobs these are, and note their ids where someone else looks for them."""
    ids = [job.job_id for job in jobs]
    where = f" (partition {args.partition})" if args.partition else ""
    log = os.path.relpath(jobs[0].paths.stdout if len(jobs) == 1 else jobs[0].paths.folder)
    named = f"job {ids[0]}" if len(ids) == 1 else f"jobs {ids[0]} to {ids[-1]}"
    print(f"slurm {named}{where}; {'log' if len(ids) == 1 else 'logs in'} {log}", flush=True)
    if place := os.environ.get("ASSAY_RUN_FILE"):
        path = Path(place).with_name("slurm.json")
        known = read_json(path)["ids"] if path.exists() else []
        write_json(path, {"ids": [*known, *(i for i in ids if i not in known)]})


def ends(jobs: Mapping[int, Any]) -> Iterator[tuple[int, Outcome]]:
    """`(number, outcome)` of each job as it ends. What the jobs say is shown meanwhile.

    Raises: KeyboardInterrupt if the user waits no more; the jobs go on, which is said.
    """
    waiting = {number: _Watched(job, len(jobs) > 1) for number, job in jobs.items()}
    asked = 0.0
    try:
        while waiting:
            if time.monotonic() - asked > ASK:
                _ask(waiting.values())
                asked = time.monotonic()
            for number, watched in list(waiting.items()):
                if outcome := watched.look():
                    del waiting[number]
                    yield number, outcome
            if waiting:
                time.sleep(max(LOOK, LOOK_EACH * len(waiting)))
    except KeyboardInterrupt:
        ids = ",".join(sorted({w.id.split("_")[0] for w in waiting.values()}))
        first = next(iter(waiting.values()))
        print(
            f"slurm job {ids} goes on: squeue --jobs={ids} shows it, tail -f {first.log} what it says, "
            f"scancel {ids.replace(',', ' ')} ends it",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        raise


def _ask(watched: Any) -> None:
    """Ask the scheduler about jobs that run, and say what has changed."""
    seen = slurm.queue(w.id for w in watched)
    if seen is not None:
        for each in watched:
            each.saw(seen.get(each.id))


class _Watched:
    """A job that is waited for."""

    def __init__(self, job: Any, named: bool) -> None:
        self.job, self.id = job.task(0), job.job_id
        self.log = os.path.relpath(self.job.paths.stdout)
        self.missed = 0  # answers of the scheduler in which it was not
        self.seen: slurm.QueuedJob | None = None
        prefix = f"{self.id}: " if named else ""
        self.streams = [_Stream(self.job.paths.stdout, 1, prefix), _Stream(self.job.paths.stderr, 2, prefix)]

    def saw(self, seen: slurm.QueuedJob | None) -> None:
        self.missed = 0 if seen else self.missed + 1
        if seen and seen != self.seen and seen.state != "COMPLETING":
            print(
                f"slurm job {self.id}: {seen.state.lower()}" + (f" ({seen.why})" if seen.why else ""), flush=True
            )
            self.seen = seen

    def look(self) -> Outcome | None:
        """Show what the job has said since. Returns: how it ended, if it has."""
        ended = self.job.paths.result_pickle.exists()
        for stream in self.streams:
            stream.show(to_the_end=ended or self.missed > 1)
        if ended:
            return self._result()
        return self._gone() if self.missed > 1 else None

    def _result(self) -> Outcome:
        failed = f"slurm job {self.id} failed; its log is {self.log}"
        try:
            (done,) = self.job.results()
            with contextlib.redirect_stderr(io.StringIO()):  # Hydra's preface to any exception
                outcome: Outcome = done.return_value
        except UserError as error:
            return _told(Outcome(error.exit_code, error=str(error)))
        except Exception as error:
            return _told(Outcome(1, error=f"{error}\n{failed}"))
        if outcome.code and not outcome.error:
            said = [line for line in (self.job.stderr() or "").splitlines() if line.strip()]
            untold = failed if outcome.code == 1 else None
            return replace(outcome, error=untold, reason=said[-1] if said else f"exit code {outcome.code}")
        return _told(outcome)

    def _gone(self) -> Outcome:
        """How a job ended that left no result."""
        facts = slurm.job_details(self.id)
        state = facts.get("JobState", "UNKNOWN")
        said = f"slurm job {self.id} ended without a result: {state.lower()}"
        if state in LOST or facts.get("ExitCode", "").endswith(f":{signal.SIGTERM:d}"):
            return _told(
                Outcome(Stopped.exit_code, error=f"{said}; the same command goes on with what it has done")
            )
        code = facts.get("ExitCode", "unknown")
        return _told(Outcome(1, error=f"{said}, exit code {code}; its log is {self.log}"))


def _told(outcome: Outcome) -> Outcome:
    return replace(outcome, reason=(outcome.error or "").replace("\n", "; "))


class _Stream:
    """A file that grows, shown on this process's stdout (1) or stderr (2)."""

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
        whole, newline, self.rest = (self.rest + new).rpartition(b"\n")
        if to_the_end:
            whole, newline, self.rest = whole + newline + self.rest, b"", b""
        if text := (whole + newline).decode(errors="replace"):
            self._write("".join(self.prefix + line for line in text.splitlines(keepends=True)))

    def _write(self, text: str) -> None:
        stream = sys.stdout if self.number == 1 else sys.stderr
        try:
            stream.write(text)
            stream.flush()
        except BrokenPipeError:
            silence_stdout()
