"""Client side of jobs on the server: start exactly once, follow, find, stop. Server side: agent/jobs.py."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from datetime import datetime
from io import IncrementalNewlineDecoder
from pathlib import Path
from typing import Any

from .. import outcome
from ..errors import ConfigError, LostConnection, RemoteError, Stopped, did_you_mean
from ..utils.commands import command
from ..utils.logs import eprint
from .connection import Connection
from .messages import ID, MAX_ID

Job = dict[str, Any]  # as agent/jobs.py `get_job` returns it

PYTHON = ".venv/bin/python"
GRACE_S = 300.0  # for a training run to finish its step and write a checkpoint
EXIT_CODES = {
    0: "finished",
    2: "invalid input",
    3: "not promoted",
    4: "inconclusive",
    75: "stopped, with a checkpoint",
    130: "interrupted",
    143: "terminated",
}

# Variables of known services, which a job gets
FORWARDED = re.compile(
    r"HF_(TOKEN|ENDPOINT|REPO_ID|HUB_\w+)|HUGGING_FACE_HUB_TOKEN|LAKEFS_\w+|AWS_\w+|WANDB_\w+|MLFLOW_\w+|COMET_\w+"
)
# Variables with paths of this machine, or with names defined in a file of this machine
LOCAL_ONLY = re.compile(
    r"REMOTE_\w+|TMPDIR|PYTHON(PATH|HOME)|VIRTUAL_ENV|HF_HOME|TRANSFORMERS_CACHE|PATH|HOME|AWS_(DEFAULT_)?PROFILE"
    r"|\w+_(CACHE|DIR|FILE|PATH|BUNDLE)"
)
REFERENCE = re.compile(r"\$\{oc\.env:(\w+)(,)?")  # the comma precedes a default


# Starting


def new_id() -> str:
    """An id that the client chooses, so that a repeated request starts the job only once."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{secrets.token_hex(2)}"


def start(
    connection: Connection,
    stage: str,
    argv: Sequence[str],
    words: Sequence[str],
    environment: Mapping[str, str],
    code: Any,
    id: str | None = None,
) -> Job:
    """Start a command in REMOTE_DIR exactly once, in a process that outlives the connection.

    Args:
        words: the part of `argv` that the user typed.
        environment: additional variables; they are sent over the connection's input only.
        code: what the command runs from, see agent/snapshots.py `create`.
        id: that of an earlier start, which is not repeated.
    Raises: RemoteError, also if the id belongs to another command; LostConnection if it is unknown whether the
        command was started.
    """
    job = {"id": id or new_id(), "stage": stage, "words": list(words), "argv": list(argv)}
    if not ID.fullmatch(str(job["id"])) or job["id"] == "latest":
        raise RemoteError(
            f"RUN={id} is not a valid run id", hint=f"use at most {MAX_ID} letters, digits, '.', '_' and '-'"
        )
    unknown = f"run {job['id']} may or may not have been started"
    hint = f"check with make ssh-status, or repeat the command with RUN={job['id']}: a run is never started twice"
    folder = connection.target.dir
    try:
        started = connection.call("start:start", folder=folder, job=job, environment=dict(environment), code=code)
    except LostConnection as error:
        raise LostConnection(f"{error.problems[0]}, and {unknown}", hint=hint) from None
    except KeyboardInterrupt:
        eprint(f"{unknown}; {hint}")
        raise
    if (started["stage"], started["words"]) != (stage, list(words)):
        raise RemoteError(
            f"run {job['id']} already exists, with a different command: "
            + " ".join((started["stage"], *started["words"])),
            hint="choose another RUN, or omit RUN",
        )
    return dict(started)


def forwarded_env(
    words: Sequence[str], environment: Mapping[str, str], dotenv: Path = Path(".env")
) -> dict[str, str]:
    """The variables that a job gets: those named in `.env`, of known services, in REMOTE_ENV and in `words`.

    REMOTE_* and paths of this machine are left out, unless REMOTE_ENV or `words` name them.
    Raises: ConfigError if a variable that these name is not set.
    """
    references = [found for word in words for found in REFERENCE.findall(word)]
    requested = [name for name, default in references if not default or name in environment]
    requested += environment.get("REMOTE_ENV", "").replace(",", " ").split()
    if missing := [name for name in dict.fromkeys(requested) if name not in environment]:
        raise ConfigError(*(f"{name} is not set in the environment" for name in missing))
    names = [
        name for name in (*_dotenv_names(dotenv), *filter(FORWARDED.fullmatch, environment)) if name in environment
    ]
    return {name: environment[name] for name in (*(n for n in names if not LOCAL_ONLY.fullmatch(n)), *requested)}


def _dotenv_names(dotenv: Path) -> list[str]:
    if not dotenv.is_file():
        return []
    from dotenv import dotenv_values

    return list(dotenv_values(dotenv))


def terminal_width() -> dict[str, str]:
    """COLUMNS for the tables that a job prints, if the output is a terminal."""
    return {"COLUMNS": str(shutil.get_terminal_size((100, 24)).columns)} if os.isatty(1) else {}


# Following and stopping


def follow(connection: Connection, id: str, offset: int = 0, wait: bool = True) -> Job:
    """Write the log of a job to the standard output until the job has ended. Bytes that are no text are escaped.

    A lost connection is re-established however long that takes; the log continues where it stopped.
    Returns: the job at its end, or now if `wait` is False.
    """
    decoder = IncrementalNewlineDecoder(getincrementaldecoder("utf-8")("backslashreplace"), translate=False)
    while True:
        try:
            args = {"folder": connection.target.dir, "id": id, "offset": offset, "wait": wait}
            for frame in connection.stream("jobs:follow", **args):
                if frame.get("at", offset) != offset:
                    raise connection.invalid_answer(f"the log at byte {frame['at']} instead of {offset}")
                data = frame.get("data", b"")
                print(decoder.decode(data, final="end" in frame), end="", flush=True)
                if "end" in frame:
                    return dict(frame["end"])
                offset += len(data)
            raise LostConnection(f"the connection to {connection.target} was lost")
        except LostConnection as error:
            if not connection.was_connected:
                raise
            eprint(f"{error.problems[0]}; run {id} continues on the server; reconnecting")
            connection.reconnect()
            eprint(f"reconnected to {connection.target}")


def follow_to_end(connection: Connection, id: str, offset: int = 0) -> int:
    """Follow a job to its end and print how it ended; Ctrl-C stops following, not the job.

    Returns: the exit code of the job. Raises: Stopped if the job was interrupted.
    """
    outcome.report(job=id, running=True)
    try:
        job = follow(connection, id, offset)
    except (KeyboardInterrupt, RemoteError) as error:
        newline = "\n" if isinstance(error, KeyboardInterrupt) else ""
        eprint(
            f"{newline}stopped following run {id}, which continues on the server; "
            f"{command('ssh-attach', id)} follows it again"
        )
        raise
    eprint(format_job(job))
    warn_if_full(connection, job)
    report_end(job)
    if job["code"] is None and job["status"] == "interrupted" and not is_finished(job):
        raise Stopped(f"run {id} was interrupted: its process no longer exists", hint=f"run {resume_command(job)}")
    code = job["code"] or 0
    return 128 - code if code < 0 else code


def warn_if_full(connection: Connection, job: Job) -> None:
    """Say that the files of an ended job, its log too, may lack their end."""
    if job.get("disk_full"):
        where = f"the disk of {connection.target.dir} on {connection.target}"
        eprint(
            f"{where} was full when run {job['id']} ended: its log and files may be incomplete; free some space"
        )


def report_end(job: Job) -> None:
    """Report what the choice of the next command depends on."""
    facts = {"job": job["id"], "stage": job["stage"], "remote_run": run_id(job)}
    outcome.report(**facts, running=False, document=facts | {"status": format_status(job)})


def stop(connection: Connection, job: Job, grace: float = GRACE_S) -> Job:
    """Stop a job after a checkpoint and follow it to its end; the server kills it after `grace` seconds."""
    if job["status"] != "running":
        raise RemoteError(
            f"run {job['id']} is not running (status: {format_status(job)})",
            hint=f"{command('ssh-status')} lists the runs",
        )
    args = {"folder": connection.target.dir, "id": job["id"], "grace": grace}
    stopping = dict(connection.call("jobs:stop", **args))
    return follow(connection, job["id"], offset=stopping["log_size"])


# Finding


def list_jobs(connection: Connection) -> list[Job]:
    """Every job of the server's folder, the newest first."""
    return list(connection.call("jobs:list_jobs", folder=connection.target.dir))


def find_job(connection: Connection, word: str | None, running: bool = False) -> Job:
    """The job that `word` names: the id of a job or of its run directory, or the beginning of a job's id.

    None and `latest` name the newest; with `running` the newest that is running, if there is one.
    Raises: RemoteError if there is none, or there are several.
    """
    return _choose(list_jobs(connection), connection, word, running)


def _choose(jobs: list[Job], connection: Connection, word: str | None, running: bool = False) -> Job:
    where = f"in {connection.target.dir} on {connection.target}"
    if not jobs:
        raise RemoteError(f"no runs {where}", hint=f"start one with {command('ssh-train')}")
    if word in {None, "latest"}:
        alive = [job for job in jobs if running and job["status"] == "running"]
        return (alive or jobs)[0]
    exact = [job for job in jobs if word in {job["id"], run_id(job)}]
    if exact:
        return next((job for job in exact if job["status"] == "running"), exact[0])
    matching = [job for job in jobs if job["id"].startswith(str(word))]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise RemoteError(
            f"RUN={word} matches {len(matching)} runs: {', '.join(job['id'] for job in matching[:5])}",
            hint="give more characters of the id",
        )
    guess = did_you_mean(str(word), [job["id"] for job in jobs]) or f"; {command('ssh-status')} lists the runs"
    raise RemoteError(f"no run {word} {where}{guess}")


def find_run(connection: Connection, word: str | None) -> Job:
    """Like `find_job`; also finds run directories that no job created.

    None and `latest` name the newest job with a run directory.
    """
    job, error = None, None
    jobs = list_jobs(connection)
    if word in {None, "latest"} and (job := next((each for each in jobs if each["run"]), None)):
        return job
    try:
        job = _choose(jobs, connection, word)
        if word in {None, "latest", job["id"], run_id(job)}:
            return job
    except RemoteError as not_found:
        error = not_found
    if ID.fullmatch(str(word)) and (
        run := connection.call("list_run:find_run", folder=connection.target.dir, id=word)
    ):
        return {"id": word, "run": run, "status": "ended"}
    if job is None:
        assert error
        raise error
    return job


def run_id(job: Job) -> str:
    """The id of a job's run directory, or of the job if it has none."""
    return str(job["run"]).rstrip("/").rpartition("/")[2] if job.get("run") else str(job["id"])


# How a job is shown


def is_finished(job: Job) -> bool:
    """Whether a job without a recorded exit code has finished, according to its run's manifest."""
    return job["code"] is None and job["stage"] == "train" and job.get("run_status") == "finished"


def format_status(job: Job) -> str:
    if job["status"] == "running" and job.get("disk_full"):
        return "running, disk full"
    if job["status"] == "elsewhere":
        return f"on {job['host']}, cannot be checked from this host"
    if job["status"] != "ended":
        return "finished" if job["status"] == "interrupted" and is_finished(job) else str(job["status"])
    code = int(job["code"])
    return EXIT_CODES.get(code) or (f"killed (signal {-code})" if code < 0 else f"failed (exit code {code})")


def format_job(job: Job) -> str:
    where = f", in {job['run']}" if job.get("run") else ""
    return f"run {job['id']}: {format_status(job)}{where}"


def resume_command(job: Job) -> str:
    return command(f"ssh-{job['stage']}", *([f"resume={run_id(job)}"] if job["stage"] == "train" else []))
