"""The standard streams of a command: text that cannot be shown is lost, and the result of the command is not.

stdout and stderr may be closed, on a full disk, on a terminal that is gone, or unable to encode a character.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

_NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}


class _Lossy(io.FileIO):
    """A file descriptor whose failed writes are noted instead of raised, except where a reader closed a pipe."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:  # of `... | head`, which ends the command or silences it
            raise
        except OSError as error:
            self.failure = error
            return memoryview(data).nbytes


_guarded: dict[str, _Lossy] = {}


def guard() -> None:
    """Replace stdout and stderr of this process by streams that never fail; open those that are closed.

    A file that is opened next must not become the standard output by taking its number.
    """
    for number in _NUMBERS.values():
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        before = getattr(sys, name)
        raw = _guarded[name] = _Lossy(_NUMBERS[name], "w", closefd=False)
        raw.name = f"<{name}>"
        unbuffered = before is not None and isinstance(before.buffer, io.FileIO)  # python -u
        stream = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),
            encoding=before.encoding if before else "utf-8",
            errors="backslashreplace",
            line_buffering=name == "stderr" or raw.isatty(),
            write_through=unbuffered,
        )
        setattr(sys, name, stream)


def lost() -> str:
    """Where a standard stream could not be written, and why; empty if all was."""
    for name, raw in _guarded.items():
        if raw.failure is not None:
            return f"{_target(name)}: {os.strerror(raw.failure.errno or 0).lower()}"
    return ""


def _target(name: str) -> str:
    """The file that a standard stream is redirected to, or its name."""
    try:
        found = os.readlink(f"/proc/self/fd/{_NUMBERS[name]}")
    except OSError:
        return name
    return found if found.startswith("/") else name
