"""A run of the server, here: received beside its place, proven file by file, and only then put there."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src import runs
from src.errors import LostConnection, RemoteError, RunError
from src.remote import download, jobs
from src.remote.connection import Connection
from src.remote.listing import RunListing, listing
from src.remote.push import megabytes, shown
from src.utils.files import disk_errors, read_json, replace_dir, switch_link, write_json
from src.utils.logs import eprint

RUNS, FETCHING = Path("outputs/runs"), Path("outputs/fetching")


def named(connection: Connection, word: str | None) -> jobs.Job:
    """The run that `word` means: as jobs.named, or the id of a run directory that no job of ours made.

    The newest is the newest that has a run directory.
    """
    job, error = None, None
    if word in {None, "latest"}:
        job = next((each for each in jobs.known(connection) if each["run"]), None)
        if job:
            return job
    try:
        job = jobs.named(connection, word)
        if word in {None, "latest", job["id"], jobs.run_of(job)}:
            return job
    except LostConnection:
        raise
    except RemoteError as nothing:
        error = nothing
    if re.fullmatch(r"\w[\w.-]*", str(word)) and (
        place := connection.call("list_run:place", folder=connection.target.dir, id=word)
    ):
        return {"id": word, "run": place, "status": "ended"}
    if job is None:
        assert error
        raise error
    return job


def fetch(connection: Connection, job: jobs.Job) -> Path:
    """Fetch the run directory of a job that has ended to outputs/runs, and have `latest` point to it.

    What is equal here already is not sent; what is only here stays, and what is another here is put aside. One
    that was interrupted goes on where it was.
    Returns: the run directory. Raises: RemoteError, RunError.
    """
    if not job["run"]:
        raise RemoteError(
            f"run {job['id']} has no run directory: it is {jobs.meaning(job)}",
            hint=f"make ssh-logs RUN={job['id']} shows what it said",
        )
    id = jobs.run_of(job)
    if not re.fullmatch(r"\w[\w.-]*", id):
        raise RemoteError(f"the server names its run {shown(id)}, which is no name of a folder of runs")
    place, target = FETCHING / id, RUNS / id
    with _alone(id), _held(target), disk_errors(place):
        there = listing(connection, str(job["run"]))
        _check_same(target, there)
        download.receive(connection, there, place, target)
        before = read_json(target / download.PROOF) if (target / download.PROOF).is_file() else {}
        aside, kept = download.keep(there, place, target, before)
        altered = download.end_its_status(there, place)
        proof = {
            "from": str(connection.target),
            "folder": there.run,
            "fetched": runs.now(),
            "files": len(there.files),
            "bytes": there.bytes,
            "sha256": {path: file["sha256"] for path, file in there.files.items()},
            "altered": altered,
        }
        write_json(place / download.PROOF, proof)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_dir(place, target)
        switch_link(RUNS / "latest", target)
    for path, why in there.outside.items():
        eprint(f"{shown(path)} was not fetched: it leads out of the run, to {why}")
    if kept:
        eprint(f"kept, though the server does not have it: {download.names(kept)}")
    if aside:
        listed = download.names([path for _, path in aside])
        eprint(f"another here than on the server, and put aside in {aside[0][0]}: {listed}")
    if altered:
        eprint(f"run {id} says that it is running, and its process is gone: here it is interrupted")
    print(
        f"fetched run {id}: {len(there.files)} files, {megabytes(there.bytes)}, every one verified by sha256; "
        f"{RUNS / 'latest'} points to it",
        flush=True,
    )
    return target


@contextmanager
def _alone(id: str) -> Iterator[None]:
    """Keep others from fetching the same run."""
    with disk_errors(FETCHING):
        FETCHING.mkdir(parents=True, exist_ok=True)
        file = (FETCHING / f".{id}.lock").open("a")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"run {id} is being fetched already", hint="wait for that") from None
        yield
        os.unlink(file.name)


@contextmanager
def _held(target: Path) -> Iterator[None]:
    """Keep others from working in the run that is here."""
    if not target.is_dir():
        yield
        return
    run = runs.Run(target)
    if not run.lock():
        raise RunError(f"run {run.id} is in use here", hint="wait for its end")
    try:
        yield
    finally:
        run.unlock()


def _check_same(target: Path, there: RunListing) -> None:
    """Two runs may have one name: that of the second in which they began."""
    if not (target / "manifest.json").is_file():
        return
    ours, theirs = read_json(target / "manifest.json").get("started"), there.manifest.get("started")
    if ours != theirs:
        raise RunError(
            f"{target} is another run than the server's: it began at {ours}, and that one at {theirs}",
            hint=f"rename {target}",
        )
