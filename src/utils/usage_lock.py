"""A shared lock on a folder of outputs while a command uses it, so that `make clean` leaves it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_held: dict[Path, int] = {}  # file descriptors


@contextmanager
def using(folder: str) -> Iterator[None]:
    """Hold the lock of `folder`, and of those that `hold` adds, until the end of the `with` statement."""
    before = set(_held)
    hold(folder)
    try:
        yield
    finally:
        for path in _held.keys() - before:
            os.close(_held.pop(path))


def hold(folder: str) -> None:
    """Hold the lock of `folder` if it exists, on a file system that has locks. No file is created for it."""
    path = Path(folder).absolute()
    if folder and path not in _held:
        with suppress(OSError):
            _held[path] = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(_held[path], fcntl.LOCK_SH | fcntl.LOCK_NB)
