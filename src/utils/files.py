"""Atomic writes of files and folders: write to a temporary sibling, flush it to disk, rename it; and hashes."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from .. import outcome
from ..errors import RunError
from .secrets import redact, redact_secrets


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically. It is not redacted: that is the caller's task.

    Raises: RunError if the disk is full; the previous file is intact then.
    """
    temporary = _temporary_path(path)
    with _cleanup_on_error(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(
        path,
        json.dumps(redact(value), indent=2, ensure_ascii=False, default=lambda other: redact(str(other))) + "\n",
    )


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(redact_secrets(row), ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def disk_errors(what: Path) -> Iterator[None]:
    """Raise a RunError about `what` instead of the errors of a full disk or a read-only folder.

    Libraries wrap the operating system's error (safetensors raises a SafetensorError): if there is no errno, the
    message is read.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # torch.save gives no reason: check the free space
        silent = isinstance(error, RuntimeError) and disk_free(what) < 1 << 20
        if number in {errno.ENOSPC, errno.EDQUOT} or "No space left" in str(error) or silent:
            raise RunError(
                f"{what} could not be written: no space left on the device",
                hint="the previous version is intact; free some space and run the command again",
            ) from error
        if number == errno.EEXIST and Path(str(getattr(error, "filename", ""))) in what.parents:
            number = errno.ENOTDIR  # mkdir found a file in place of a folder
        if number in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}:
            reason = os.strerror(number).lower()
            raise RunError(f"{what} could not be written: {reason}", hint=_other_place(what)) from error
        raise


def _other_place(what: Path) -> str:
    """The remedy where `what` cannot be written: the setting that names its folder, if the command has one."""
    settings: Mapping[str, str] = outcome.current().facts.get("folders", {})
    for name, folder in sorted(settings.items(), key=lambda item: len(item[1]), reverse=True):
        if what.absolute().is_relative_to(Path(folder).absolute()):
            return f"choose another {name}"
    return f"make {what.parent} a folder that this user may write to"


def disk_free(path: Path) -> int:
    """Free bytes on the disk of `path`, which need not exist."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def _cleanup_on_error(what: Path, temporary: Path) -> Iterator[None]:
    """Remove `temporary`, through which `what` is written, if the body fails.

    Raises: RunError if the disk is full or the folder read-only.
    """
    try:
        with disk_errors(what):
            yield
    except BaseException:
        with suppress(OSError):
            if temporary.is_dir() and not temporary.is_symlink():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """Yield a folder to fill, which replaces `target` when the body has succeeded.

    Raises: RunError if the disk is full; the previous folder is intact then.
    """
    temporary = _temporary_path(target)
    with _cleanup_on_error(target, temporary):
        temporary.mkdir(parents=True)
        yield temporary
        flush_files(temporary)
        replace_dir(temporary, target)


def flush_files(folder: Path) -> list[Path]:
    """Flush every file below `folder` to disk, and give it the mode of a new file: 0666 without the umask.

    safetensors creates its files with mode 0600, so that a server under another user could not read them.
    Returns: the files, sorted.
    """
    mode = 0o666 & ~_umask()
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        if not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) != mode:
            with suppress(PermissionError):  # a file system without modes
                file.chmod(mode)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    return files


def _umask() -> int:
    """The umask of this process, which can only be read by setting it: to a strict one, for other threads."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def replace_dir(new: Path, target: Path) -> None:
    """Replace the folder `target` by `new`, atomically where the system can exchange two names."""
    try:
        new.rename(target)
        return
    except OSError as error:  # target exists, or another process has just created it
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
    if _exchange(new, target):
        shutil.rmtree(new)
        return
    old = _temporary_path(target)
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names by Linux's renameat2(2). Returns: whether that succeeded."""
    cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        return ctypes.CDLL(None).renameat2(cwd, os.fsencode(a), cwd, os.fsencode(b), exchange) == 0
    except AttributeError:
        return False


def _temporary_path(path: Path) -> Path:
    """A hidden sibling of `path` with a unique name."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def switch_link(link: Path, target: Path) -> None:
    """Switch the symbolic link `link` to `target`, a sibling or in a sibling, atomically.

    Raises: RunError if `link` is a folder, or the disk is full or read-only.
    """
    temporary = _temporary_path(link)
    with _cleanup_on_error(link, temporary):
        temporary.symlink_to(os.path.relpath(target, link.parent))
        temporary.replace(link)


def read_json(path: Path) -> Any:
    """Raises: RunError if the file is missing or is not JSON."""
    if path.exists() and not path.is_file():  # a device or a FIFO may have no end
        raise RunError(f"{path} is not a regular file", hint="remove it, and restore the file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist", hint="check that its folder is a run directory") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON: {error}", hint="restore it, or start a new run") from None


def read_object(path: Path, groups: Collection[str] = ()) -> dict[str, Any]:
    """A JSON object, in which the values of `groups` are objects too where they are there.

    Raises: RunError, as `read_json`.
    """
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(found.get(key, {}), dict) for key in groups):
        raise RunError(f"{path} is not a record of a run", hint="restore it, or start a new run")
    return found


def hash_files(folder: Path) -> dict[str, str]:
    """The sha256 of every file in `folder`, by its relative path."""
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


@cache
def code_hash(*packages: Path) -> str:
    """sha256 over the name and content of every Python file in `packages`, their subfolders included.

    A part of cache keys, so that entries from older code are not used.
    """
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted(package.rglob("*.py")):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
