"""Fetches a run: download to a temporary folder, verify every file, then move it into place."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import runs
from ..errors import MAX_LISTED, RemoteError, RunError
from ..utils.files import disk_errors, disk_free, read_object, replace_dir, sha256, switch_link, write_json
from ..utils.logs import eprint
from ..utils.units import count, format_size
from . import jobs, transfer
from .connection import Connection
from .listing import LOCAL_FILES, MANIFEST, RunListing, list_run, parents
from .messages import ID
from .transfer import join_names, printable

RUNS, FETCHING, REPLACED = Path("outputs/runs"), Path("outputs/fetching"), Path("outputs/replaced")
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
    if not ID.fullmatch(id) or id == "latest":
        raise connection.invalid_answer(f"a run directory named {printable(id)}")
    place, target = FETCHING / id, RUNS / id
    with _fetch_lock(id), _run_lock(target), disk_errors(place):
        remote = list_run(connection, str(job["run"]))
        _check_same_run(target, remote.manifest)
        _receive(connection, remote, place, target)
        manifest = read_object(place / MANIFEST, groups=("evaluation",))
        _check_same_run(target, manifest)
        backups, kept = _keep_local_files(remote, place, target)
        altered = _mark_interrupted(manifest, place)
        record = {
            "from": str(connection.target),
            "folder": remote.run,
            "fetched": runs.now(),
            "files": len(remote.files),
            "bytes": remote.bytes,
            "sha256": {path: file["sha256"] for path, file in remote.files.items()},
            "altered": altered,
        }
        write_json(place / runs.FETCHED, record)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_dir(place, target)
        switch_link(RUNS / "latest", target)
    _print_result(id, remote, kept, backups, altered=bool(altered))
    return target


def _print_result(
    id: str, remote: RunListing, kept: list[str], backups: list[tuple[Path, str]], altered: bool
) -> None:
    for path, why in list(remote.outside.items())[:MAX_LISTED]:
        eprint(f"{printable(path)} was not fetched: {why}")
    if len(remote.outside) > MAX_LISTED:
        eprint(f"and {len(remote.outside) - MAX_LISTED:,} more links")
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
    if not (target / MANIFEST).is_file():
        return
    ours, theirs = read_object(target / MANIFEST).get("started"), manifest.get("started")
    if ours != theirs:
        raise RunError(
            f"{target} is a different run with the same id: started at {ours}, the server's run at {theirs}",
            hint=f"rename {target}",
        )


# Receiving


def _receive(connection: Connection, remote: RunListing, place: Path, target: Path) -> None:
    """Fill the folder `place` with every entry of the listing; files that `target` has too are linked.

    Nothing is written outside of `place`, whatever the server sends: the listing has only paths that lead down
    from it, it has no link while files are received, and a link that is made then leads to what was received.
    """
    _clear(place, remote)
    ours = {path for path in (_walk(target) if target.is_dir() else []) if path in remote.files}
    reused = {path for path in ours if _is_complete(target / path, remote.files[path])}
    lacking = _lacking(remote, place, remote.files.keys() - reused)
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
        sizes = {path: file["size"] for path, file in lacking.items()}
        transfer.receive(connection, sizes, remote.run, place, remote.rsync, size)
        _clear(place, remote)
        lacking = _lacking(remote, place, lacking)
    if lacking:
        raise RemoteError(
            f"{join_names(list(lacking))}: checksum mismatch after {ATTEMPTS} attempts",
            hint="fetch again; the transfer resumes",
        )
    for path in reused:
        _remove(place / path)  # an earlier attempt may have received it
        _link(target / path, place / path)
    for path, file in remote.files.items():
        os.utime(place / path, (file["mtime"], file["mtime"]), follow_symlinks=False)
    for path in remote.folders:
        (place / path).mkdir(parents=True, exist_ok=True)
    for path, to in remote.links.items():
        (place / path).symlink_to(to)  # fails, as all of this, if something is there


def _clear(place: Path, remote: RunListing) -> None:
    """Leave in `place` only folders and regular files of the listing: no link, and nothing that was not listed."""
    if place.is_symlink() or not place.is_dir():
        _remove(place)
        place.mkdir(parents=True)
    known = remote.folders
    for at, folders, names in os.walk(place):
        for name in (*folders, *names):
            path = Path(at, name)
            found, relative = path.lstat(), str(path.relative_to(place))
            if stat.S_ISDIR(found.st_mode) and relative in known:
                continue
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or relative not in remote.files:
                _remove(path)  # also a file with a second link, which must not be written to
        folders[:] = [name for name in folders if os.path.lexists(os.path.join(at, name))]


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lacking(remote: RunListing, place: Path, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Which of `paths` are not complete in `place`. A file that cannot be completed is removed."""
    found = {path: remote.files[path] for path in paths if not _is_complete(place / path, remote.files[path])}
    for path, file in found.items():
        if _size(place / path) >= file["size"]:
            (place / path).unlink(missing_ok=True)
    return found


def _is_complete(path: Path, file: Mapping[str, Any]) -> bool:
    """Whether a local file equals the server's; it is flushed to the disk then."""
    if (
        path.is_symlink()
        or not path.is_file()
        or path.stat().st_size != file["size"]
        or sha256(path) != file["sha256"]
    ):
        return False
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return True


def _keep_local_files(remote: RunListing, place: Path, target: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """Keep what the local run has and the server does not, and back up what differs.

    A file that is unchanged since the previous fetch needs no backup.
    Returns: the backups as (folder, path), and the paths that are kept.
    """
    record = target / runs.FETCHED
    last_fetch = read_object(record, groups=("sha256", "altered")) if record.is_file() else {}
    backups, kept = [], []
    folder = REPLACED / f"{target.name}-{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"  # two fetches in a second
    fetched, altered = last_fetch.get("sha256", {}), last_fetch.get("altered", {})
    for path in _walk(target) if target.is_dir() else []:
        ours, new = target / path, place / path
        if path in LOCAL_FILES or path.endswith(".tmp"):
            continue
        if not os.path.lexists(new) and parents(path).isdisjoint(remote.links):
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
    write_json(place / MANIFEST, {**manifest, **changes})
    return {MANIFEST: sha256(place / MANIFEST)}


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
