"""The predictions of an unfinished evaluation: appended batch by batch, and reused after an interruption.

A file of JSON lines. The first holds the identity: everything that the predictions depend on, the model included.
A file with another identity is replaced. Each further line holds the rows of one batch, or says that a part
restarts with smaller batches. A line that a kill has truncated is dropped, and its batch is predicted again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ..errors import RunError
from ..utils.files import disk_errors
from ..utils.logs import log
from ..utils.secrets import redact_secrets, restore_secrets
from ..utils.units import count

SUFFIX = ".unfinished.jsonl"


class PartialResults:
    """The file at `path`, locked by this process until `close`, which leaving a `with` block calls.

    Args: overwrite: whether to discard the rows of an interrupted evaluation.
    Raises: RunError if another process has locked it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.parts: dict[str, Part] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(path):
            self._file = path.open("a+", encoding="utf-8")
        self._lock()
        lines = [] if overwrite else complete_lines(path)
        if lines[:1] != [_line(identity)]:
            lines = []
        with disk_errors(path):
            self._file.truncate(sum(map(len, lines)))  # ASCII: a character is a byte
        if not lines:
            self.write(identity)
        for line in lines[1:]:
            self._read(json.loads(line))
        if known := sum(len(part.rows) for part in self.parts.values()):
            log.info(
                "resuming with %s of %s; overwrite_answers=true predicts all again", count(known, "row"), path
            )

    def __enter__(self) -> PartialResults:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def part(self, name: str) -> Part:
        """The rows of one part of the evaluation, such as a split."""
        return self.parts.setdefault(name, Part(self, name))

    def fill(self, found: Mapping[str, Mapping[int, dict[str, Any]]], source: Path) -> None:
        """Take over rows by part and index, of a finished evaluation in the folder `source`."""
        for name, rows in found.items():
            self.part(name).add({index: restore_secrets(row) for index, row in rows.items()})
        log.info(
            "scoring the answers in %s again, since only the metrics differ; overwrite_answers=true predicts anew",
            source,
        )

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, and wait until it is on the disk."""
        with disk_errors(self.path):
            self._file.write(_line(line))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self, remove: bool = False) -> None:
        """Unlock the file; `remove` it once its rows are saved elsewhere. One without rows is always removed."""
        if remove or not any(part.rows for part in self.parts.values()):
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _read(self, line: Mapping[str, Any]) -> None:
        part = self.part(line["part"])
        if "batch_size" in line:
            part.size, part.rows = line["batch_size"], {}
        part.rows |= {index: restore_secrets(row) for index, row in line.get("rows", [])}

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RunError(
                f"another process runs the same evaluation and writes {self.path}", hint="wait until it ends"
            ) from None
        except OSError:
            log.warning("%s: this file system has no locks; do not evaluate this model twice at once", self.path)


class Part:
    """rows: by the index of their example. size: the batch size, or None for the planned one."""

    def __init__(self, file: PartialResults, name: str) -> None:
        self._file, self.name = file, name
        self.rows: dict[int, dict[str, Any]] = {}
        self.size: int | None = None

    def add(self, rows: Mapping[int, dict[str, Any]]) -> None:
        self._file.write({"part": self.name, "rows": [[index, row] for index, row in rows.items()]})
        self.rows |= rows

    def restart(self, size: int) -> None:
        """Discard the rows; batches of `size` will make all of this part."""
        self._file.write({"part": self.name, "batch_size": size})
        self.size, self.rows = size, {}


def is_of(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the file at `path` holds predictions with this identity."""
    return path.is_file() and complete_lines(path)[:1] == [_line(identity)]


def complete_lines(path: Path) -> list[str]:
    """The lines of the file before the first that is truncated."""
    found = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not (line.endswith("\n") and _is_json(line)):
                break
            found.append(line)
    return found


def remove_others(path: Path, pattern: str) -> None:
    """Remove the other files of this kind in the folder of `path`, unless a process has locked them."""
    for other in path.parent.glob(pattern + SUFFIX):
        if other != path and _is_unlocked(other):
            other.unlink(missing_ok=True)


def _is_unlocked(path: Path) -> bool:
    file: TextIO
    with suppress(OSError), path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(redact_secrets(value), ensure_ascii=True) + "\n"


def _is_json(line: str) -> bool:
    with suppress(ValueError):
        return isinstance(json.loads(line), dict)
    return False
