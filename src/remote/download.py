"""The files of a run as they arrive beside its place: each proven, and nothing lost of what is here already."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from src import runs
from src.errors import RemoteError, RunError
from src.remote import transfer
from src.remote.connection import Connection
from src.remote.listing import RunListing
from src.remote.push import megabytes, shown
from src.utils.files import disk_free, sha256, write_json

REPLACED = Path("outputs/replaced")
PROOF = "fetched.json"
OURS = {PROOF, runs.LOCK}
TRIES = 3  # to have a file arrive as it is there


def receive(connection: Connection, there: RunListing, place: Path, target: Path) -> None:
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
        if size > disk_free(place):
            raise RunError(f"{megabytes(size)} are to be fetched, and {megabytes(disk_free(place))} are free here")
        transfer.receive(connection, list(lacking), there.run, place, there.rsync, size)
        lacking = {path: file for path, file in lacking.items() if not _is_whole(place / path, file)}
    if lacking:
        raise RemoteError(
            f"{names(list(lacking))}: what arrives is not what the server has, {TRIES} times",
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


def keep(
    there: RunListing, place: Path, target: Path, before: Mapping[str, Any]
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


def end_its_status(there: RunListing, place: Path) -> dict[str, str]:
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


def names(paths: list[str], most: int = 5) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(shown, paths[:most])) + more
