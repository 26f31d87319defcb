"""Runs on the server: started once, watched from anywhere, stopped. there/ has what does that."""

from __future__ import annotations

import base64
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from src.errors import LostConnection, RemoteError, Stopped, did_you_mean
from src.remote.connection import Connection
from src.utils.logs import eprint

Job = dict[str, Any]  # as there/jobs.py `look` gives it

PYTHON = ".venv/bin/python"
LONGEST = 100  # characters
NAME = rf"\w[\w.-]{{0,{LONGEST - 1}}}"  # of a run
GRACE = 300.0  # seconds in which a training may finish its step and write its checkpoint
MEANINGS = {
    0: "finished",
    2: "refused",
    3: "not promoted",
    4: "cannot tell",
    75: "stopped, with a checkpoint",
    130: "interrupted",
    143: "terminated",
}


def new_id() -> str:
    """A name for a run: chosen here, so that a start that is tried again is known to be the same one."""
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
    """Start a command in REMOTE_DIR, apart from this connection, exactly once however often it is cut.

    `words` are those of `argv` that a person typed; `environment` is what the command gets besides, and travels on
    the connection's input only; `code` is what it runs from: see there/snapshots.py. With the `id` of an
    earlier start nothing is started that was.
    Raises: RemoteError, also where that was another command; LostConnection, when it cannot be known whether the
    command was started.
    """
    job = {"id": id or new_id(), "stage": stage, "words": list(words), "argv": list(argv)}
    if not re.fullmatch(NAME, str(job["id"])) or job["id"] == "latest":
        raise RemoteError(
            f"RUN={id} can be no name of a run", hint=f"at most {LONGEST} letters, digits, '.', '_' and '-' can"
        )
    unsure = f"it is not known whether run {job['id']} was started"
    hint = f"make ssh-status tells, and the same command with RUN={job['id']} starts it if it was not"
    try:
        made = dict(
            connection.call(
                "start:start", folder=connection.target.dir, job=job, environment=dict(environment), code=code
            )
        )
    except LostConnection as error:
        raise LostConnection(f"{error.problems[0]}, and {unsure}", hint=hint) from None
    except KeyboardInterrupt:
        eprint(f"{unsure}; {hint}")
        raise
    if (made["stage"], made["words"]) != (stage, list(words)):
        raise RemoteError(
            f"run {job['id']} is there already, and is another: {' '.join((made['stage'], *made['words']))}",
            hint="RUN names what is started: choose another name, or leave it out",
        )
    return made


def follow(connection: Connection, id: str, offset: int = 0, wait: bool = True) -> Job:
    """Write the log of a run to the standard output, byte for byte, as it comes, until the run has ended.

    A connection that is lost is made again, for as long as it takes; the log goes on where it broke off.
    Returns: the run's record at its end, or now where `wait` is False.
    """
    while True:
        try:
            for frame in connection.stream(
                "logs:follow", folder=connection.target.dir, id=id, offset=offset, wait=wait
            ):
                if "end" in frame:
                    return dict(frame["end"])
                data = base64.b64decode(frame["data"])
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
                offset += len(data)
            raise LostConnection(f"the connection to {connection.target} was lost")
        except LostConnection as error:
            if not connection.reached:
                raise
            eprint(f"{error.problems[0]}; run {id} goes on, and so does this when it is back")
            connection.close()
            connection.again(lambda: connection.ssh, patience=float("inf"))
            eprint("the connection is back")


def followed(connection: Connection, id: str, offset: int = 0) -> int:
    """Follow a run to its end; Ctrl-C ends the following only.

    Returns: the exit code of what ran. Raises: Stopped where it was interrupted.
    """
    try:
        job = follow(connection, id, offset)
    except KeyboardInterrupt:
        eprint(f"\nno longer followed: run {id} goes on; make ssh-attach RUN={id}")
        raise
    except RemoteError:
        eprint(f"no longer followed: run {id} goes on; make ssh-attach RUN={id}")
        raise
    eprint(told(job))
    if job["code"] is None and job["status"] == "interrupted" and not finished(job):
        raise Stopped(f"run {id} was interrupted: its process is gone", hint=again(job))
    code = job["code"] or 0
    return 128 - code if code < 0 else code


def again(job: Job) -> str:
    """The command that goes on with a run."""
    return f"make ssh-{job['stage']}" + (f" resume={run_of(job)}" if job["stage"] == "train" else "")


def known(connection: Connection) -> list[Job]:
    """Every run of the server's folder, the newest first."""
    return list(connection.call("jobs:known", folder=connection.target.dir))


def named(connection: Connection, word: str | None, running: bool = False) -> Job:
    """The run that `word` means: the id of a job or of the run directory it works in, or the beginning of one.

    None and `latest` mean the newest; with `running` the newest that runs, if one does.
    Raises: RemoteError if there is none, or several.
    """
    jobs = known(connection)
    if not jobs:
        raise RemoteError(
            f"nothing has been run in {connection.target.dir} on {connection.target}", hint="make ssh-train does"
        )
    if word in {None, "latest"}:
        alive = [job for job in jobs if running and job["status"] == "running"]
        return (alive or jobs)[0]
    exact = [job for job in jobs if word in {job["id"], run_of(job)}]
    if exact:
        return next((job for job in exact if job["status"] == "running"), exact[0])
    fitting = [job for job in jobs if job["id"].startswith(str(word))]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RemoteError(
            f"{word} is the beginning of {len(fitting)} runs: {', '.join(j['id'] for j in fitting[:5])}"
        )
    guess = did_you_mean(str(word), [job["id"] for job in jobs]) or "; make ssh-status lists them"
    raise RemoteError(f"there is no run {word} in {connection.target.dir} on {connection.target}{guess}")


def run_of(job: Job) -> str:
    """The id of the run directory that a job works in, or its own where it has none."""
    return str(job["run"]).rstrip("/").rpartition("/")[2] if job.get("run") else str(job["id"])


def finished(job: Job) -> bool:
    """Whether a job whose exit code nobody saw has done its work: its run says so."""
    return job["code"] is None and job["stage"] == "train" and job.get("run_status") == "finished"


def meaning(job: Job) -> str:
    """The status of a job in words."""
    if job["status"] == "elsewhere":
        return f"on {job['host']}, not seen from here"
    if job["status"] != "ended":
        return "finished" if job["status"] == "interrupted" and finished(job) else str(job["status"])
    code = int(job["code"])
    return MEANINGS.get(code) or (f"killed (signal {-code})" if code < 0 else f"failed (exit code {code})")


def told(job: Job) -> str:
    where = f", in {job['run']}" if job.get("run") else ""
    return f"run {job['id']}: {meaning(job)}{where}"


def stop(connection: Connection, job: Job, grace: float = GRACE) -> Job:
    """Ask a run to end, with a checkpoint, and follow it until it has; it is killed after `grace` seconds.

    The server sees to that, whatever becomes of this connection.
    """
    if job["status"] != "running":
        raise RemoteError(f"run {job['id']} does not run: it is {meaning(job)}")
    asked = dict(connection.call("stop:stop", folder=connection.target.dir, id=job["id"], grace=grace))
    return follow(connection, job["id"], offset=asked["size"])
