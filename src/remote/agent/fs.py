"""The files of a server's project folder: where that is, and how they are written and read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from typing import Any

from src.remote.agent.protocol import AgentError


def root(folder: str) -> str:
    """The project's folder, absolute, `~` expanded. Raises: Refused where it is that of nobody."""
    found = os.path.expanduser(folder)
    if found.startswith("~"):
        raise AgentError(f"there is no user {found[1:].split('/')[0]} on the server", "check REMOTE_DIR")
    return os.path.abspath(found)


def write(path: str, text: str, new: bool = False) -> bool:
    """A whole file or none. Returns: False if it is to be a `new` one and another has just made it."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if new:
            _claim(temporary, path)
        os.replace(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # of a full disk; and what has both names keeps them when it replaces itself


def _claim(temporary: str, path: str) -> None:
    """Make a path, of another's content at once where links can be. Raises: FileExistsError if it is there."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # of a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def read(path: str) -> dict[str, Any] | None:
    """What `write` wrote as JSON; None where nothing is, or what nobody of us has written."""
    try:
        found = json.loads(text(path))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def text(path: str) -> str:
    """What is in a file; nothing where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def sha256(path: str | bytes) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def size(folder: str) -> int:
    """Bytes of the files in a folder."""
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.is_file())
