"""The files of a server's project folder: what is there, whether it is whole, and code that no push changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from typing import Any

from src.remote.there.wire import Refused

CODE = "outputs/remote/code"


def root(folder: str) -> str:
    """The project's folder, absolute, `~` expanded."""
    return os.path.abspath(os.path.expanduser(folder))


def write(path: str, text: str, new: bool = False) -> bool:
    """A whole file or none. Returns: False if it is to be a `new` one and another has just made it."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        if new:
            os.link(temporary, path)
            os.unlink(temporary)
            return True
    except FileExistsError:
        os.unlink(temporary)
        return False
    except OSError:  # of a file system without links
        pass
    os.replace(temporary, path)
    return True


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


def snapshot(folder: str, code: dict[str, Any]) -> str:
    """A folder of its own with the code that was pushed, which later pushes leave alone.

    `code` is `{"digest", "files": {path: sha256}, "state"}`: the name of the snapshot, what it holds, and what git
    says of it.
    Returns: the folder.
    Raises: Refused if what is there is not that code.
    """
    project = root(folder)
    target = os.path.join(project, CODE, code["digest"])
    if os.path.isdir(target):
        return target
    temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        for path, digest in code["files"].items():
            new = os.path.join(temporary, path)
            os.makedirs(os.path.dirname(new), exist_ok=True)
            try:
                shutil.copyfile(os.path.join(project, path), new)
            except FileNotFoundError:
                raise Refused(f"{path} is not on the server", "push again") from None
            if sha256(new) != digest:
                raise Refused(f"{path} is another there than here: somebody else pushed", "push again")
        write(os.path.join(temporary, "src", "code.json"), json.dumps(code["state"]))
        os.rename(temporary, target)
    except OSError:
        if not os.path.isdir(target):  # else another has just made it
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
