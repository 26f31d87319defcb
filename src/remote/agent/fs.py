"""Files of the server's project folder: its path, and how files are read and written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from typing import Any

from .bootstrap import AgentError


def root(folder: str) -> str:
    """The absolute path of the project folder, `~` expanded. Raises: AgentError if `~user` does not exist."""
    found = os.path.expanduser(folder)
    if found.startswith("~"):
        raise AgentError(f"user {found[1:].split('/')[0]} does not exist on the server", "check REMOTE_DIR")
    return os.path.abspath(found)


def write_text(path: str, text: str, exclusive: bool = False) -> bool:
    """Write a file atomically. Returns: False if it must be new (`exclusive`) and exists already."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            _create(temporary, path)
        os.replace(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):  # left by a full disk, or a second link to the replaced file
            os.unlink(temporary)


def _create(temporary: str, path: str) -> None:
    """Make `path`, as a link to `temporary` where the file system has links. Raises: FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def read_json(path: str) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file, or no JSON object in it."""
    try:
        found = json.loads(read_text(path))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_text(path: str) -> str:
    """The text of a file, empty if there is none."""
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


def folder_size(folder: str) -> int:
    """Bytes of the files in a folder."""
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.is_file())
