"""The answers of an evaluation that has not finished: appended batch by batch, found again after a kill.

A file of lines of JSON. The first says what the answers depend on, the model included; a file that says anything
else is of no use, and is replaced. Each further line holds the rows of one batch, or says that a part starts anew
with smaller batches. A line that a kill has torn is dropped, and its batch is asked again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from src.errors import RunError
from src.utils.files import disk_errors
from src.utils.logs import log
from src.utils.secrets import redact, restore_secrets

SUFFIX = ".unfinished.jsonl"


class PartialResults:
    """The file at `path`, held by this process until `close`.

    Raises: RunError if another process holds it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.parts: dict[str, Part] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(path):
            self._file = path.open("a+", encoding="utf-8")
        self._hold()
        lines = [] if fresh else complete_lines(path)
        if lines[:1] != [_line(identity)]:
            lines = []
        with disk_errors(path):
            self._file.truncate(sum(map(len, lines)))  # its letters are ASCII, one byte each
        if not lines:
            self.write(identity)
        for line in lines[1:]:
            self._take(json.loads(line))
        if count := sum(len(part.rows) for part in self.parts.values()):
            log.info("going on with the %d rows of %s; overwrite_answers=true answers anew", count, path)

    def part(self, name: str) -> Part:
        """The answers of one part of the evaluation, such as a split."""
        return self.parts.setdefault(name, Part(self, name))

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line that is on the disk before this returns."""
        with disk_errors(self.path):
            self._file.write(_line(line))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self, remove: bool = False) -> None:
        """Let go of the file; `remove` it where its answers stand elsewhere by now. An empty one goes too."""
        if remove or not any(part.rows for part in self.parts.values()):
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _take(self, line: Mapping[str, Any]) -> None:
        part = self.part(line["part"])
        if "batch_size" in line:
            part.size, part.rows = line["batch_size"], {}
        part.rows |= {place: restore_secrets(row) for place, row in line.get("rows", [])}

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RunError(
                f"another process is answering the same prompts and writes {self.path}", hint="wait for its end"
            ) from None
        except OSError:
            log.warning("%s: files cannot be locked here; start no second evaluation of this model", self.path)


class Part:
    """rows: what was answered, by the place of its example.

    size: its batch size; None for that of the beginning.
    """

    def __init__(self, file: PartialResults, name: str) -> None:
        self._file, self.name = file, name
        self.rows: dict[int, dict[str, Any]] = {}
        self.size: int | None = None

    def add(self, rows: Mapping[int, dict[str, Any]]) -> None:
        self._file.write({"part": self.name, "rows": [[place, row] for place, row in rows.items()]})
        self.rows |= rows

    def restart(self, size: int) -> None:
        """Forget the answers: all of this part will come from batches of `size`."""
        self._file.write({"part": self.name, "batch_size": size})
        self.size, self.rows = size, {}


def is_of(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the file at `path` holds answers that depend on `identity`."""
    return path.is_file() and complete_lines(path)[:1] == [_line(identity)]


def complete_lines(path: Path) -> list[str]:
    """The lines of the file up to the first that is not whole."""
    found = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not (line.endswith("\n") and _is_json(line)):
                break
            found.append(line)
    return found


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(redact(value), ensure_ascii=True) + "\n"


def _is_json(line: str) -> bool:
    with suppress(ValueError):
        return isinstance(json.loads(line), dict)
    return False


def remove_others(kept: Path, pattern: str) -> None:
    """Remove the files beside `kept` of evaluations that were never finished, but those that are being written."""
    for path in kept.parent.glob(pattern + SUFFIX):
        if path != kept and _is_free(path):
            path.unlink(missing_ok=True)


def _is_free(path: Path) -> bool:
    file: TextIO
    with suppress(OSError), path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
