"""Shared locks on the folders that a command uses, so that `make clean` leaves them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_held: dict[Path, int] = {}  # file descriptors


@contextmanager
def using(*folders: str) -> Iterator[None]:
    """Hold the locks of `folders`, and of those that `hold` adds, until the end of the `with` statement."""
    before = set(_held)
    for folder in folders:
        hold(folder)
    try:
        yield
    finally:
        for path in _held.keys() - before:
            os.close(_held.pop(path))


def hold(folder: str) -> None:
    """Hold the locks of `folder` and of the folders that it is in, as far as they exist. No file is created.

    A user of outputs/a/b uses outputs/ too. Where a file system has no locks, none is held.
    """
    path = Path(folder).absolute()
    for each in (path, *path.parents) if folder else ():
        if each not in _held:
            with suppress(OSError):
                _held[each] = os.open(each, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(_held[each], fcntl.LOCK_SH | fcntl.LOCK_NB)
