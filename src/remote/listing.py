"""The listing of a run directory on the server. What it may hold is decided here, before anything is written."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..runs import FETCHED, LOCK
from ..utils.terminal import unfiltered
from ..utils.units import count, format_size
from .connection import Connection
from .transfer import printable

MANIFEST = "manifest.json"
LOCAL_FILES = {FETCHED, LOCK}  # each machine has its own
MAX_ENTRIES = 50_000
MAX_NAME, MAX_PATH, MAX_DEPTH = 255, 1024, 32  # bytes, characters, names


@dataclass
class RunListing:
    """A run directory of the server: `files` by path as `{"size", "mtime", "sha256"}`, `links` by path.

    Paths are relative, and lead through folders only: no path continues below a file or a link. The target of a
    link is a file or a folder of the listing, and is reached through folders only.
    """

    run: str
    manifest: dict[str, Any]
    host: str
    rsync: bool
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)  # folders
    outside: dict[str, str] = field(default_factory=dict)  # what is not fetched, and why

    @property
    def bytes(self) -> int:
        return sum(file["size"] for file in self.files.values())

    @property
    def folders(self) -> set[str]:
        """Every folder of the run, but the run itself."""
        return {
            *self.empty,
            *(parent for path in (*self.files, *self.links, *self.empty) for parent in parents(path)),
        }

    @property
    def entries(self) -> int:
        return len(self.files) + len(self.links) + len(self.empty) + len(self.outside)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an entry of agent/list_run.py. Raises: ValueError."""
        path = entry["path"]
        if not is_relative(path):
            raise ValueError(f"a path that no run directory has: {printable(path)}")
        if self.entries >= MAX_ENTRIES:
            raise ValueError(f"a run of more than {MAX_ENTRIES:,} files")
        if path.split("/")[0] in LOCAL_FILES:
            return
        if "sha256" in entry:
            self.files[path] = {key: entry[key] for key in ("size", "mtime", "sha256")}
        elif "link" in entry:
            self.links[path] = entry["link"]
        elif "folder" in entry:
            self.empty.append(path)
        else:
            self.outside[path] = f"its target is outside of the run directory ({printable(entry['outside'])})"

    def check(self) -> None:
        """Check the complete listing, and set aside the links that do not lead to a file or folder of it.

        Raises: ValueError if it has no manifest, or a path is not one of a run directory.
        """
        if MANIFEST not in self.files:
            raise ValueError(f"a run without {MANIFEST}")
        found = [*self.files, *self.links, *self.empty, *self.outside]
        leaves = {*self.files, *self.links, *self.outside}
        for path in found:
            if not leaves.isdisjoint(parents(path)):
                raise ValueError(f"a path below a file or a link: {printable(path)}")
        if len(found) != len(set(found)):
            raise ValueError("a path twice")
        folders = self.folders
        for path, target in list(self.links.items()):
            to = os.path.normpath(os.path.join(os.path.dirname(path), target))
            if to in self.files or (to in folders and to not in parents(path)):
                self.links[path] = os.path.relpath(to, os.path.dirname(path) or ".")
            else:
                self.outside[path] = f"it links to {printable(target)}, which is no file or folder of the run"
                del self.links[path]


def is_relative(path: str) -> bool:
    """Whether a path leads down from a folder, by names that every file system takes."""
    try:
        names = path.encode("utf-8", "surrogateescape").split(b"/")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return False
    good = all(name not in {b"", b".", b".."} and b"\0" not in name and len(name) <= MAX_NAME for name in names)
    return good and len(names) <= MAX_DEPTH and len(path) <= MAX_PATH


def parents(path: str) -> set[str]:
    """The folders that contain a path."""
    parts = path.split("/")
    return {"/".join(parts[:i]) for i in range(1, len(parts))}


def list_run(connection: Connection, run: str) -> RunListing:
    """Everything in a run directory of the server; an interrupted listing resumes after the last entry.

    Raises: RemoteError, also if the server sends what no run directory has.
    """
    found: list[RunListing] = []
    last, size = "", 0

    def attempt() -> None:
        nonlocal last, size
        for frame in connection.stream("list_run:list_run", folder=connection.target.dir, run=run, after=last):
            if "manifest" in frame:
                found[:] = found or [RunListing(run, **frame)]
                continue
            if not found:
                raise ValueError("an entry before its run")
            found[0].add(frame)
            last = frame["path"]
            size += frame.get("size", 0)
            show_progress(f"hashed {count(len(found[0].files), 'file')} on the server, {format_size(size)}")

    try:
        connection.retry(attempt)
        show_progress("")
        if not found:
            raise ValueError("no run")
        found[0].check()
    except ValueError as error:
        raise connection.invalid_answer(f"list_run: {error}") from None
    return found[0]


def show_progress(text: str) -> None:
    """On a terminal, print a line that replaces the previous one."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=unfiltered(sys.stderr), flush=True)
