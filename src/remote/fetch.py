"""A run of the server, here: received beside its place, proven file by file, and only then put there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from src import runs
from src.errors import LostConnection, RemoteError, RunError
from src.remote import jobs, transfer
from src.remote.link import Link
from src.remote.push import megabytes, shown
from src.utils.files import disk_errors, disk_left, point, read_json, sha256, swap, write_json
from src.utils.screen import tell

RUNS, FETCHING, REPLACED = Path("outputs/runs"), Path("outputs/fetching"), Path("outputs/replaced")
PROOF = "fetched.json"
OURS = {PROOF, runs.LOCK}
TRIES = 3  # to have a file arrive as it is there


@dataclass
class Listing:
    """What is there: `files` as `{path: {"size", "mtime", "sha256"}}`, `links` as `{path: target}`."""

    run: str
    manifest: dict[str, Any]
    host: str
    rsync: bool
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    outside: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(file["size"] for file in self.files.values())

    def add(self, entry: Mapping[str, Any]) -> None:
        path = str(entry["path"])
        if os.path.isabs(path) or ".." in path.split("/"):
            raise RemoteError(f"the server names {path}, which is no path inside a run")
        if "sha256" in entry:
            self.files[path] = {key: entry[key] for key in ("size", "mtime", "sha256")}
        elif "link" in entry:
            self.links[path] = entry["link"]
        elif "folder" in entry:
            self.folders.append(path)
        else:
            self.outside[path] = entry["outside"]


def named(link: Link, word: str | None) -> jobs.Job:
    """The run that `word` means: as jobs.named, or the id of a run directory that no job of ours made."""
    job, error = None, None
    try:
        job = jobs.named(link, word)
        if word in {None, "latest", job["id"], jobs.run_of(job)}:
            return job
    except LostConnection:
        raise
    except RemoteError as nothing:
        error = nothing
    if re.fullmatch(r"\w[\w.-]*", str(word)) and (
        place := link.call("fetched:place", folder=link.target.dir, id=word)
    ):
        return {"id": word, "run": place, "status": "ended"}
    if job is None:
        assert error
        raise error
    return job


def fetch(link: Link, job: jobs.Job) -> Path:
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
    place, target = FETCHING / id, RUNS / id
    with _alone(id), _held(target), disk_errors(place):
        there = _listing(link, str(job["run"]))
        _check_same(target, there)
        _receive(link, there, place, target)
        before = read_json(target / PROOF) if (target / PROOF).is_file() else {}
        aside, kept = _keep(there, place, target, before)
        altered = _end_its_status(there, place)
        proof = {
            "from": str(link.target),
            "folder": there.run,
            "fetched": runs.now(),
            "files": len(there.files),
            "bytes": there.bytes,
            "sha256": {path: file["sha256"] for path, file in there.files.items()},
            "altered": altered,
        }
        write_json(place / PROOF, proof)
        target.parent.mkdir(parents=True, exist_ok=True)
        swap(place, target)
        point(RUNS / "latest", target)
    for path, why in there.outside.items():
        tell(f"{shown(path)} was not fetched: it leads out of the run, to {why}")
    if kept:
        tell(f"kept, though the server does not have it: {_names(kept)}")
    if aside:
        listed = _names([path for _, path in aside])
        tell(f"another here than on the server, and put aside in {aside[0][0]}: {listed}")
    if altered:
        tell(f"run {id} says that it is running, and its process is gone: here it is interrupted")
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
    if not run.hold():
        raise RunError(f"run {run.id} is in use here", hint="wait for its end")
    try:
        yield
    finally:
        run.release()


def _listing(link: Link, run: str) -> Listing:
    """Ask the server for everything in a run directory; one that broke off goes on after the last file."""
    found: list[Listing] = []
    last = ""

    def attempt() -> None:
        nonlocal last
        stream = link.stream("fetched:listing", folder=link.target.dir, run=run, after=last)
        head = next(stream)
        if not found:
            found.append(Listing(run, **head))
        for entry in stream:
            found[0].add(entry)
            last = entry["path"]
            _show(f"the server has looked at {len(found[0].files)} files, {megabytes(found[0].bytes)}")

    link.again(attempt)
    _show("")
    return found[0]


def _check_same(target: Path, there: Listing) -> None:
    """Two runs may have one name: that of the second in which they began."""
    if not (target / "manifest.json").is_file():
        return
    ours, theirs = read_json(target / "manifest.json").get("started"), there.manifest.get("started")
    if ours != theirs:
        raise RunError(
            f"{target} is another run than the server's: it began at {ours}, and that one at {theirs}",
            hint=f"rename {target}",
        )


def _receive(link: Link, there: Listing, place: Path, target: Path) -> None:
    """Have every file of the listing in `place`, as it is there."""
    place.mkdir(parents=True, exist_ok=True)
    for left in [path for path in _inside(place) if path not in there.files]:
        (place / left).unlink()
    lacking = {path: file for path, file in there.files.items() if not _is_whole(place / path, file)}
    for path, file in list(lacking.items()):
        if _is_whole(target / path, file, damaged="kept"):
            (place / path).unlink(missing_ok=True)
            _link(target / path, place / path)
            del lacking[path]
    for _ in range(TRIES):
        if not lacking:
            break
        size = sum(file["size"] - _size(place / path) for path, file in lacking.items())
        if size > disk_left(place):
            raise RunError(f"{megabytes(size)} are to be fetched, and {megabytes(disk_left(place))} are free here")
        transfer.receive(link, list(lacking), there.run, place, there.rsync, size)
        lacking = {path: file for path, file in lacking.items() if not _is_whole(place / path, file)}
    if lacking:
        raise RemoteError(
            f"{_names(list(lacking))}: what arrives is not what the server has, {TRIES} times",
            hint="fetch again; what has arrived is kept",
        )
    for path, file in there.files.items():
        os.utime(place / path, (file["mtime"], file["mtime"]))
    for path in there.folders:
        (place / path).mkdir(parents=True, exist_ok=True)
    for path, to in there.links.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).unlink(missing_ok=True)
        (place / path).symlink_to(to)


def _is_whole(path: Path, file: Mapping[str, Any], damaged: str = "removed") -> bool:
    """Whether a file is what the server has, on the disk. One that cannot become it is `removed`, or kept."""
    if path.is_symlink() or not path.is_file():
        return False
    if path.stat().st_size == file["size"] and sha256(path) == file["sha256"]:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        return True
    if damaged == "removed" and (path.stat().st_size >= file["size"] or path.stat().st_nlink > 1):
        path.unlink()  # what has another name too is not written to
    return False


def _keep(
    there: Listing, place: Path, target: Path, before: Mapping[str, Any]
) -> tuple[list[tuple[Path, str]], list[str]]:
    """Let nothing be lost of the run that is here: what the server does not have, and what is another here.

    Returns: what was put aside, with the folder where it is, and what was kept.
    """
    aside, kept = [], []
    folder = REPLACED / f"{target.name}-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    brought = {**before.get("sha256", {})}
    for path in _inside(target) if target.is_dir() else []:
        ours, new = target / path, place / path
        if path in OURS or path.endswith(".tmp"):
            continue
        if not os.path.lexists(new):
            try:
                _link(ours, new)
                kept.append(path)
                continue
            except (FileExistsError, NotADirectoryError):  # a folder's name is a file's there
                pass
        elif _same(ours, new, there.files.get(path)):
            continue
        elif not ours.is_symlink() and sha256(ours) in {brought.get(path), before.get("altered", {}).get(path)}:
            continue  # it is as an earlier fetch left it
        _link(ours, folder / path)
        aside.append((folder, path))
    return aside, kept


def _same(ours: Path, new: Path, file: Mapping[str, Any] | None) -> bool:
    if ours.is_symlink() or new.is_symlink():
        return ours.is_symlink() and new.is_symlink() and os.readlink(ours) == os.readlink(new)
    return new.is_file() and file is not None and sha256(ours) == file["sha256"]


def _end_its_status(there: Listing, place: Path) -> dict[str, str]:
    """Have a run that died while it was running say so here, where nobody can see its process.

    Returns: the sha256 of what was altered, by its path.
    """
    manifest = dict(there.manifest)
    ended = {"status": runs.INTERRUPTED, "error": "its process was gone when it was fetched"}
    changes: dict[str, Any] = ended if manifest.get("status") == runs.RUNNING else {}
    if manifest.get("evaluation", {}).get("status") == runs.RUNNING:
        changes = changes | {"evaluation": manifest["evaluation"] | ended}
    if not changes:
        return {}
    write_json(place / "manifest.json", manifest | changes)
    return {"manifest.json": sha256(place / "manifest.json")}


def _inside(folder: Path) -> list[str]:
    """Every file and link below a folder, by its path in there."""
    found = []
    for at, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        found += [os.path.relpath(os.path.join(at, name), folder) for name in (*names, *links)]
    return sorted(found)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where that cannot be."""
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


def _names(paths: list[str], most: int = 5) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(shown, paths[:most])) + more


def _show(text: str) -> None:
    """A line that the next one replaces, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
