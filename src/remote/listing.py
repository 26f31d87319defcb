"""What is in a run directory of the server, file by file, as agent/list_run.py tells it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from src.errors import RemoteError
from src.remote.connection import Connection
from src.remote.push import megabytes, shown


@dataclass
class RunListing:
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
        to = os.path.normpath(os.path.join(os.path.dirname(path), str(entry.get("link", ""))))
        if os.path.isabs(path) or ".." in path.split("/") or os.path.isabs(to) or to.split("/")[0] == "..":
            raise RemoteError(f"the server names {shown(path)}, which is no path inside a run")
        if "sha256" in entry:
            self.files[path] = {key: entry[key] for key in ("size", "mtime", "sha256")}
        elif "link" in entry:
            self.links[path] = entry["link"]
        elif "folder" in entry:
            self.folders.append(path)
        else:
            self.outside[path] = entry["outside"]


def listing(connection: Connection, run: str) -> RunListing:
    """Ask the server for everything in a run directory; one that broke off goes on after the last file."""
    found: list[RunListing] = []
    last = ""

    def attempt() -> None:
        nonlocal last
        stream = connection.stream("list_run:listing", folder=connection.target.dir, run=run, after=last)
        head = next(stream)
        if not found:
            found.append(RunListing(run, **head))
        for entry in stream:
            found[0].add(entry)
            last = entry["path"]
            _show(f"the server has looked at {len(found[0].files)} files, {megabytes(found[0].bytes)}")

    connection.again(attempt)
    _show("")
    return found[0]


def _show(text: str) -> None:
    """A line that the next one replaces, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
