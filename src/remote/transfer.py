"""File transfer by rsync where both sides have it, else by SFTP. Interrupted transfers resume.

Neither is trusted: the caller compares the hashes of what has arrived.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar, cast

from paramiko import SFTPClient, SFTPError
from paramiko.ssh_exception import SSHException

from ..errors import LostConnection, RemoteError
from ..utils.logs import eprint
from ..utils.progress import BYTES, Progress, progress, watched
from .connection import SILENCE_TIMEOUT_S, Connection

Answer = TypeVar("Answer")

ATTEMPTS = 3  # without any progress
MAX_MESSAGES = 1 << 20  # bytes of rsync's messages
BLOCK = 1 << 15  # bytes, the most that an SFTP server accepts at once
LARGE = 20_000_000  # bytes, from which on a terminal shows the progress
LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # SFTP does not report these of the server's disk
KEEP_ALIVE = ("-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4")
DISK_FULL = ("No space left", "Disk quota exceeded")
NOT_WRITABLE = ("Permission denied", "Read-only file system", "Operation not permitted")


def send(connection: Connection, files: Mapping[str, Path], folder: str, rsync: bool, size: int) -> None:
    """Send files to an absolute folder of the server, under the names that are their keys in `files`.

    Args:
        rsync: whether the server has it.
        size: bytes in all, for the progress.
    Raises: RemoteError if the server cannot write them; LostConnection.
    """

    def arrived() -> int:
        return int(connection.call("fs:folder_size", folder=folder))

    def put(sftp: SFTPClient) -> None:
        with progress("sending", size, BYTES) as bar:
            for name, path in files.items():
                _put(sftp, path, _remote_path(folder, name), bar)

    if rsync and _has_local_rsync():
        with tempfile.TemporaryDirectory() as links:
            for name, path in files.items():
                Path(links, name).symlink_to(path.absolute())
            words = ["-rL", "--append", *_progress(size), f"{links}/", f"{_rsync_host(connection)}:{folder}/"]
            if _by_rsync(connection, words, b"", arrived):
                return
    _by_sftp(connection, put, arrived)


def receive(
    connection: Connection, sizes: Mapping[str, int], folder: str, to: Path, rsync: bool, size: int
) -> None:
    """Receive files of known sizes by their names in an absolute folder of the server; the rest as for `send`.

    No file becomes longer than its size (with rsync: than the largest). No link is made or followed below `to`.
    Raises: RemoteError; LostConnection.
    """

    def arrived() -> int:
        return sum(path.stat().st_size for name in sizes if (path := to / name).is_file())

    def get(sftp: SFTPClient) -> None:
        for name, length in sizes.items():
            _get(sftp, _remote_path(folder, name), to, name, length)

    before = arrived()
    with watched("receiving", size, lambda: arrived() - before):
        if rsync and _has_local_rsync():
            words = ["-r", "--append", "--from0", "--files-from=-"]  # -r alone makes files and folders, no links
            words += [f"{_rsync_host(connection)}:{folder}/", f"{to}/"]
            stdin = b"".join(os.fsencode(name) + b"\0" for name in sizes)
            if _by_rsync(connection, words, stdin, arrived, longest=max(sizes.values())):
                return
        _by_sftp(connection, get, arrived)


def _retry(connection: Connection, attempt: Callable[[], Answer], arrived: Callable[[], int]) -> Answer:
    """The result of `attempt`, which is repeated while each time more bytes have `arrived`."""
    attempts, before = ATTEMPTS, -1
    while True:
        try:
            return attempt()
        except LostConnection:
            connection.retry(lambda: connection.ssh)
            now = arrived()
            attempts, before = (ATTEMPTS if now > before else attempts - 1), now
            if not attempts:
                raise


# rsync


def _has_local_rsync() -> bool:
    return shutil.which("rsync") is not None and shutil.which("ssh") is not None


def _rsync_host(connection: Connection) -> str:
    return f"[{connection.target.host}]" if ":" in connection.target.host else connection.target.host


def _progress(size: int) -> list[str]:
    return ["--info=progress2", "--no-inc-recursive"] if size > LARGE and sys.stderr.isatty() else []


def _by_rsync(
    connection: Connection,
    words: Sequence[str],
    stdin: bytes,
    arrived: Callable[[], int],
    longest: int | None = None,
) -> bool:
    """Run rsync until it has succeeded. It cannot write a file that is longer than `longest` bytes.

    Returns: False if it does not work, which is logged in a line.
    """
    limit = () if longest is None else ("sh", "-c", 'ulimit -f "$0"; exec "$@"', str(longest // 512 + 1))
    ssh = (*connection.target.ssh_command, *KEEP_ALIVE)
    shell = " ".join("'" + word.replace("'", "''") + "'" for word in ssh)

    def attempt() -> str:
        with tempfile.TemporaryFile() as names:
            names.write(stdin)
            names.seek(0)
            with subprocess.Popen(
                [*limit, "rsync", "--protect-args", "--timeout=30", "-e", shell, *words],
                stdin=names,
                stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            ) as done:
                said = cast(IO[bytes], done.stderr).read(MAX_MESSAGES)
                if len(said) == MAX_MESSAGES:
                    done.kill()
                    return "its messages do not end"
        stderr = os.fsdecode(said)
        if done.returncode in {0, 24}:  # 24: a file has vanished; the caller notices
            return ""
        if done.returncode != 255 and any(reason in stderr for reason in (*DISK_FULL, *NOT_WRITABLE)):
            raise write_error(str(connection.target), stderr)
        lines = [s for line in stderr.splitlines() if (s := line.strip())] or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if "rsync" in line), lines[0])
        if done.returncode in {1, 2, 4, 127}:  # an incompatible rsync on either side
            return reason
        raise LostConnection(reason)

    try:
        reason = _retry(connection, attempt, arrived)
    except LostConnection as error:
        reason = error.problems[0]
    if reason:
        eprint(f"rsync failed ({reason}); using SFTP")
    return not reason


def write_error(server: str, stderr: str) -> RemoteError:
    """The error for a full or read-only disk, from rsync's output."""
    line = next(
        line for line in stderr.splitlines() if any(reason in line for reason in (*DISK_FULL, *NOT_WRITABLE))
    )
    if any(reason in line for reason in DISK_FULL):
        return RemoteError(
            f"no space is left on the device: {line.strip()}",
            hint="free some space and run the command again; the transfer resumes",
        )
    return RemoteError(f"{server} rejected a file: {line.strip()}")


# SFTP


def _by_sftp(connection: Connection, work: Callable[[SFTPClient], None], arrived: Callable[[], int]) -> None:
    """Do `work`, again if the connection is lost."""
    target = connection.target

    def attempt() -> None:
        try:
            sftp = connection.sftp()
            channel = sftp.get_channel()
            channel.settimeout(SILENCE_TIMEOUT_S)
            work(sftp)
        except (SSHException, EOFError, TimeoutError, ConnectionError) as error:
            connection.close()
            raise LostConnection(
                f"the connection to {target} was lost: {error or 'closed by the server'}"
            ) from None
        except (SFTPError, struct.error, ValueError) as error:  # paramiko's parser of a malformed packet
            raise connection.invalid_answer(f"by SFTP: {error}") from None
        except OSError as error:
            if channel.closed or not channel.get_transport().is_active():
                connection.close()
                raise LostConnection(f"the connection to {target} was lost: {error}") from None
            if error.errno in LOCAL_ERRORS:
                raise
            raise RemoteError(
                f"{target} rejected a file: {str(error).lower()}",
                hint="check whether the server's disk is full, or its folder read-only",
            ) from None

    _retry(connection, attempt, arrived)


def _put(sftp: SFTPClient, path: Path, remote: bytes, bar: Progress) -> None:
    """Send one file, resuming after the bytes that have arrived."""
    try:
        offset = int(sftp.stat(remote).st_size or 0)
    except FileNotFoundError:
        offset = 0
    with path.open("rb") as source, sftp.open(remote, "ab") as target:
        source.seek(offset)
        target.set_pipelined(True)  # faster, and does not report write errors of the server
        _copy(source, target, bar)
        end = source.tell()
    if sftp.stat(remote).st_size != end:
        raise OSError("the file was not written completely")


def _get(sftp: SFTPClient, remote: bytes, to: Path, name: str, size: int) -> None:
    """Receive one file, resuming after the bytes that have arrived, up to `size` bytes."""
    with sftp.open(remote, "rb") as source, open(_open_below(to, name), "ab") as target:
        source.seek(target.tell())
        source.prefetch(min(size, source.stat().st_size or 0), max_concurrent_requests=64)
        _copy(source, target, most=size - target.tell())


def _open_below(folder: Path, name: str) -> int:
    """A descriptor to append to the file `name` below a folder. Raises: OSError if a part of it is a link."""
    *folders, last = name.split("/")
    at = os.open(folder, os.O_RDONLY)
    try:
        for part in folders:
            with suppress(FileExistsError):
                os.mkdir(part, dir_fd=at)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        return os.open(last, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666, dir_fd=at)
    finally:
        os.close(at)


def _remote_path(folder: str, name: str) -> bytes:
    """A path on the server, byte for byte, whatever its encoding is."""
    return f"{folder}/{name}".encode("utf-8", "surrogateescape")


def _copy(source: IO[bytes], target: IO[bytes], bar: Progress | None = None, most: int | None = None) -> None:
    left = sys.maxsize if most is None else most
    while left > 0 and (block := source.read(min(BLOCK, left))):
        target.write(block)
        left -= len(block)
        if bar is not None:
            bar.add(len(block))


# File names and sizes in messages


def printable(path: str) -> str:
    """A path without characters that a terminal cannot display."""
    return path if path.isprintable() else ascii(path)


def join_names(paths: Sequence[str], most: int = 5) -> str:
    """The first `most` paths, and how many more there are."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(printable, paths[:most])) + more
