"""Fetches a run: download to a temporary folder, verify every file, then move it into place."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import runs
from ..errors import RemoteError, RunError
from ..utils.files import disk_errors, disk_free, read_json, replace_dir, sha256, switch_link, write_json
from ..utils.logs import eprint
from ..utils.terminal import unfiltered
from ..utils.units import count, format_size
from . import jobs, transfer
from .connection import Connection
from .transfer import join_names, printable

RUNS, FETCHING, REPLACED = Path("outputs/runs"), Path("outputs/fetching"), Path("outputs/replaced")
LAST_FETCH = "fetched.json"
LOCAL_FILES = {LAST_FETCH, runs.LOCK}
ATTEMPTS = 3  # to receive a file correctly


def fetch(connection: Connection, job: jobs.Job) -> Path:
    """Fetch the run directory of a job that has ended to outputs/runs, and make `latest` point to it.

    Identical files are not sent, local-only files stay, and files that differ are backed up. An interrupted fetch
    resumes.
    Returns: the run directory. Raises: RemoteError, RunError.
    """
    if not job["run"]:
        raise RemoteError(
            f"run {job['id']} has no run directory (status: {jobs.format_status(job)})",
            hint=f"read its output with make ssh-logs RUN={job['id']}",
        )
    id = jobs.run_id(job)
    if not jobs.RUN_ID.fullmatch(id):
        raise RemoteError(f"the server sent an invalid name of a run directory: {printable(id)}")
    place, target = FETCHING / id, RUNS / id
    with _fetch_lock(id), _run_lock(target), disk_errors(place):
        remote = list_run(connection, str(job["run"]))
        _check_same_run(target, remote.manifest)
        _receive(connection, remote, place, target)
        last_fetch = read_json(target / LAST_FETCH) if (target / LAST_FETCH).is_file() else {}
        backups, kept = _keep_local_files(remote, place, target, last_fetch)
        altered = _mark_interrupted(remote.manifest, place)
        record = {
            "from": str(connection.target),
            "folder": remote.run,
            "fetched": runs.now(),
            "files": len(remote.files),
            "bytes": remote.bytes,
            "sha256": {path: file["sha256"] for path, file in remote.files.items()},
            "altered": altered,
        }
        write_json(place / LAST_FETCH, record)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_dir(place, target)
        switch_link(RUNS / "latest", target)
    _print_result(id, remote, kept, backups, altered=bool(altered))
    return target


def _print_result(
    id: str, remote: RunListing, kept: list[str], backups: list[tuple[Path, str]], altered: bool
) -> None:
    for path, why in remote.outside.items():
        eprint(f"{printable(path)} was not fetched: its target is outside of the run directory ({why})")
    if kept:
        eprint(f"local-only files kept: {join_names(kept)}")
    if backups:
        listed = join_names([path for _, path in backups])
        eprint(f"files differ from the server's; local copies saved in {backups[0][0]}: {listed}")
    if altered:
        eprint(f"run {id} is marked as interrupted locally: its process ended while its status was running")
    print(
        f"fetched run {id}: {count(len(remote.files), 'file')}, {format_size(remote.bytes)}, every one verified "
        f"by sha256; {RUNS / 'latest'} points to it",
        flush=True,
    )


@contextlib.contextmanager
def _fetch_lock(id: str) -> Iterator[None]:
    """Raises: RunError if another process is fetching the same run."""
    with disk_errors(FETCHING):
        FETCHING.mkdir(parents=True, exist_ok=True)
        file = (FETCHING / f".{id}.lock").open("a")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"run {id} is already being fetched", hint="wait until the other fetch ends") from None
        yield
        os.unlink(file.name)


@contextlib.contextmanager
def _run_lock(target: Path) -> Iterator[None]:
    """Raises: RunError if another process uses the local run directory."""
    if not target.is_dir():
        yield
        return
    run = runs.Run(target)
    if not run.lock():
        raise RunError(f"run {run.id} is in use locally", hint="wait until the other process ends")
    try:
        yield
    finally:
        run.unlock()


def _check_same_run(target: Path, manifest: Mapping[str, Any]) -> None:
    """Raises: RunError if the local run with this id, which is a time to the second, is a different one."""
    if not (target / "manifest.json").is_file():
        return
    ours, theirs = read_json(target / "manifest.json").get("started"), manifest.get("started")
    if ours != theirs:
        raise RunError(
            f"{target} is a different run with the same id: started at {ours}, the server's run at {theirs}",
            hint=f"rename {target}",
        )


# What the server has


@dataclass
class RunListing:
    """A run directory of the server: `files` by path as `{"size", "mtime", "sha256"}`, `links` by path."""

    run: str
    manifest: dict[str, Any]
    host: str
    rsync: bool
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)  # empty ones
    outside: dict[str, str] = field(default_factory=dict)  # links that lead out of the run

    @property
    def bytes(self) -> int:
        return sum(file["size"] for file in self.files.values())

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an entry of agent/list_run.py. Raises: RemoteError if its path or target is outside of the run."""
        path = str(entry["path"])
        to = os.path.normpath(os.path.join(os.path.dirname(path), str(entry.get("link", ""))))
        if os.path.isabs(path) or ".." in path.split("/") or os.path.isabs(to) or to.split("/")[0] == "..":
            raise RemoteError(f"the server sent a path outside of the run directory: {printable(path)}")
        if "sha256" in entry:
            self.files[path] = {key: entry[key] for key in ("size", "mtime", "sha256")}
        elif "link" in entry:
            self.links[path] = entry["link"]
        elif "folder" in entry:
            self.folders.append(path)
        else:
            self.outside[path] = entry["outside"]


def list_run(connection: Connection, run: str) -> RunListing:
    """Everything in a run directory of the server; an interrupted listing resumes after the last file."""
    found: list[RunListing] = []
    last = ""

    def attempt() -> None:
        nonlocal last
        stream = connection.stream("list_run:list_run", folder=connection.target.dir, run=run, after=last)
        head = next(stream)
        if not found:
            found.append(RunListing(run, **head))
        for entry in stream:
            found[0].add(entry)
            last = entry["path"]
            _show_progress(
                f"hashed {count(len(found[0].files), 'file')} on the server, {format_size(found[0].bytes)}"
            )

    connection.retry(attempt)
    _show_progress("")
    return found[0]


def _show_progress(text: str) -> None:
    """On a terminal, print a line that replaces the previous one."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=unfiltered(sys.stderr), flush=True)


# Receiving


def _receive(connection: Connection, remote: RunListing, place: Path, target: Path) -> None:
    """Fill the folder `place` with every file of the listing; those that `target` has are linked."""
    place.mkdir(parents=True, exist_ok=True)
    for path in _walk(place):
        if path not in remote.files:  # left by an earlier fetch
            (place / path).unlink()
    lacking = {path: file for path, file in remote.files.items() if not _is_complete(place / path, file)}
    for path, file in list(lacking.items()):
        if _is_complete(target / path, file, remove=False):
            (place / path).unlink(missing_ok=True)
            _link(target / path, place / path)
            del lacking[path]
    for _ in range(ATTEMPTS):
        if not lacking:
            break
        size = sum(file["size"] - _size(place / path) for path, file in lacking.items())
        if size > disk_free(place):
            raise RunError(
                f"the fetch needs {format_size(size)}, but {format_size(disk_free(place))} are free "
                "on this machine",
                hint="free some space",
            )
        transfer.receive(connection, list(lacking), remote.run, place, remote.rsync, size)
        lacking = {path: file for path, file in lacking.items() if not _is_complete(place / path, file)}
    if lacking:
        raise RemoteError(
            f"{join_names(list(lacking))}: checksum mismatch after {ATTEMPTS} attempts",
            hint="fetch again; the transfer resumes",
        )
    for path, file in remote.files.items():
        os.utime(place / path, (file["mtime"], file["mtime"]))
    for path in remote.folders:
        (place / path).mkdir(parents=True, exist_ok=True)
    for path, to in remote.links.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).unlink(missing_ok=True)
        (place / path).symlink_to(to)


def _is_complete(path: Path, file: Mapping[str, Any], remove: bool = True) -> bool:
    """Whether a local file equals the server's. With `remove`, one that cannot be completed is removed."""
    if path.is_symlink() or not path.is_file():
        return False
    if path.stat().st_size == file["size"] and sha256(path) == file["sha256"]:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        return True
    if remove and (path.stat().st_size >= file["size"] or path.stat().st_nlink > 1):
        path.unlink()  # a file with a second link must not be written to
    return False


def _keep_local_files(
    remote: RunListing, place: Path, target: Path, last_fetch: Mapping[str, Any]
) -> tuple[list[tuple[Path, str]], list[str]]:
    """Keep what the local run has and the server does not, and back up what differs.

    `last_fetch` holds the hashes of the previous fetch: a file that is unchanged since then needs no backup.
    Returns: the backups as (folder, path), and the paths that are kept.
    """
    backups, kept = [], []
    folder = REPLACED / f"{target.name}-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    fetched, altered = last_fetch.get("sha256", {}), last_fetch.get("altered", {})
    for path in _walk(target) if target.is_dir() else []:
        ours, new = target / path, place / path
        if path in LOCAL_FILES or path.endswith(".tmp"):
            continue
        if not os.path.lexists(new):
            try:
                _link(ours, new)
                kept.append(path)
                continue
            except (FileExistsError, NotADirectoryError):  # a local folder is a file on the server, or vice versa
                pass
        elif _is_same(ours, new, remote.files.get(path)) or (
            not ours.is_symlink() and sha256(ours) in {fetched.get(path), altered.get(path)}
        ):
            continue
        _link(ours, folder / path)
        backups.append((folder, path))
    return backups, kept


def _is_same(ours: Path, new: Path, file: Mapping[str, Any] | None) -> bool:
    if ours.is_symlink() or new.is_symlink():
        return ours.is_symlink() and new.is_symlink() and os.readlink(ours) == os.readlink(new)
    return new.is_file() and file is not None and sha256(ours) == file["sha256"]


def _mark_interrupted(manifest: Mapping[str, Any], place: Path) -> dict[str, str]:
    """Write the status `interrupted` for a run that died while running: this machine cannot check its process.

    Returns: the sha256 of each file that was altered, by path.
    """
    ended = {"status": runs.INTERRUPTED, "error": "the process had ended when the run was fetched"}
    changes: dict[str, Any] = ended if manifest.get("status") == runs.RUNNING else {}
    if manifest.get("evaluation", {}).get("status") == runs.RUNNING:
        changes = changes | {"evaluation": manifest["evaluation"] | ended}
    if not changes:
        return {}
    write_json(place / "manifest.json", {**manifest, **changes})
    return {"manifest.json": sha256(place / "manifest.json")}


# Local files


def _walk(folder: Path) -> list[str]:
    """The relative path of every file and link below a folder."""
    found = []
    for at, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        found += [os.path.relpath(os.path.join(at, name), folder) for name in (*names, *links)]
    return sorted(found)


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy if the file system has no links. Raises: FileExistsError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
