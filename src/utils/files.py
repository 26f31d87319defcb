"""Files that appear whole or not at all: written beside their place, flushed to disk, renamed over it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.errors import RunError
from src.utils.secrets import redact


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically, as it is: callers redact.

    Raises: RunError if the disk is full; the previous file is intact then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with saving(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(redact(value), indent=2, ensure_ascii=False, default=str) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(redact(row), ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def disk_errors(what: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one sentence about `what`.

    Libraries wrap the operating system's error in their own (safetensors raises a SafetensorError), so
    the message is read where there is no errno.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or "No space left" in str(error):
            raise RunError(
                f"{what} could not be written: no space left on the device",
                hint="what was there before is intact; free some space and run the command again",
            ) from error
        if isinstance(error, PermissionError):
            raise RunError(
                f"{what} could not be written: permission denied", hint="choose another output_dir"
            ) from error
        raise


@contextmanager
def saving(what: Path, temporary: Path) -> Iterator[None]:
    """Write `what` by way of `temporary`, of which nothing is left if that fails.

    Raises: RunError if the disk is full or the folder read-only.
    """
    try:
        with disk_errors(what):
            yield
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `target` only once it is complete.

    Raises: RunError if the disk is full; the previous folder is intact then.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with saving(target, temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _swap(temporary, target)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)


def point(link: Path, target: Path) -> None:
    """Switch the symbolic link `link` to its sibling or descendant `target`, atomically."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)


def read_json(path: Path) -> Any:
    """Raises: RunError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist", hint="is its folder a run directory?") from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}", hint="restore it or make a new run") from None


def sha256(path: Path) -> str:
    """Content hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()
