"""Files on their way, by rsync where both sides have it, else by SFTP. What was sent already is not sent again.

Neither is trusted: who calls compares the content of what has arrived.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

from paramiko import SFTPClient
from paramiko.ssh_exception import SSHException

from src.errors import LostConnection, RemoteError
from src.remote.connection import SILENCE_TIMEOUT_S, Connection
from src.utils.logs import eprint

Answer = TypeVar("Answer")

TRIES = 3  # that bring nothing further
BLOCK = 1 << 15  # bytes, what an SFTP server takes at once
LARGE = 20_000_000  # bytes, from which on a terminal is shown how far it is
HERE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # which SFTP never says of the server's disk
KEEP_ALIVE = ("-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4")
FULL = ("No space left", "Disk quota exceeded")
CLOSED = ("Permission denied", "Read-only file system", "Operation not permitted")


def send(connection: Connection, files: Mapping[str, Path], folder: str, rsync: bool, size: int) -> None:
    """Send files to an absolute folder of the server, as the names that they have in `files`.

    Raises: RemoteError if they cannot be written there; LostConnection.
    """

    def arrived() -> int:
        return int(connection.call("fs:size", folder=folder))

    def put(sftp: SFTPClient) -> None:
        for name, path in files.items():
            _put(sftp, path, _bytes(folder, name))

    if rsync and _local_rsync():
        with tempfile.TemporaryDirectory() as linked:
            for name, path in files.items():
                Path(linked, name).symlink_to(path.absolute())
            words = ["-rL", "--append", *_progress(size), f"{linked}/", f"{_host(connection)}:{folder}/"]
            if _by_rsync(connection, words, b"", arrived):
                return
    _by_sftp(connection, put, arrived)


def receive(connection: Connection, names: Sequence[str], folder: str, to: Path, rsync: bool, size: int) -> None:
    """Fetch files by their names in an absolute folder of the server.

    Raises: RemoteError; LostConnection.
    """

    def arrived() -> int:
        return sum(path.stat().st_size for name in names if (path := to / name).is_file())

    def get(sftp: SFTPClient) -> None:
        for name in names:
            _get(sftp, _bytes(folder, name), to / name)

    if rsync and _local_rsync():
        words = ["-r", "--append", "--from0", "--files-from=-", *_progress(size)]
        words += [f"{_host(connection)}:{folder}/", f"{to}/"]
        if _by_rsync(connection, words, b"".join(os.fsencode(name) + b"\0" for name in names), arrived):
            return
    _by_sftp(connection, get, arrived)


def _local_rsync() -> bool:
    return shutil.which("rsync") is not None and shutil.which("ssh") is not None


def _host(connection: Connection) -> str:
    return f"[{connection.target.host}]" if ":" in connection.target.host else connection.target.host


def _progress(size: int) -> list[str]:
    return ["--info=progress2", "--no-inc-recursive"] if size > LARGE and sys.stderr.isatty() else []


def _by_rsync(connection: Connection, words: Sequence[str], given: bytes, arrived: Callable[[], int]) -> bool:
    """Run rsync until it is done. Returns: False, said in a line, where it does not work."""
    shell = " ".join("'" + word.replace("'", "''") + "'" for word in (*connection.target.ssh, *KEEP_ALIVE))

    def attempt() -> str:
        done = subprocess.run(
            ["rsync", "--protect-args", "--timeout=30", "-e", shell, *words],
            input=given,
            stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        said = os.fsdecode(done.stderr)
        if done.returncode in {0, 24}:  # 24: a file vanished, which is seen when it is asked after
            return ""
        if done.returncode != 255 and any(reason in said for reason in (*FULL, *CLOSED)):
            raise refused(connection, said)
        lines = [line.strip() for line in said.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if "rsync" in line), lines[0])
        if done.returncode in {1, 2, 4, 127}:  # it does not understand what it is told, or who it speaks to
            return reason
        raise LostConnection(reason)

    try:
        reason = _repeated(connection, attempt, arrived)
    except LostConnection as error:
        reason = error.problems[0]
    if reason:
        eprint(f"rsync does not work ({reason}): SFTP goes on")
    return not reason


def _repeated(connection: Connection, attempt: Callable[[], Answer], arrived: Callable[[], int]) -> Answer:
    """The result of `attempt`, which is repeated as long as each time some more bytes have `arrived`."""
    tries, before = TRIES, -1
    while True:
        try:
            return attempt()
        except LostConnection:
            connection.again(lambda: connection.ssh)  # it may take its time
            now = arrived()
            tries, before = (TRIES if now > before else tries - 1), now
            if not tries:
                raise


def refused(connection: Connection, said: str) -> RemoteError:
    """The error of a disk that takes no more, in a sentence."""
    line = next(line for line in said.splitlines() if any(reason in line for reason in (*FULL, *CLOSED)))
    if any(reason in line for reason in FULL):
        return RemoteError(
            f"no space is left on the device: {line.strip()}", hint="free some; what is there stays"
        )
    return RemoteError(f"{connection.target} refuses a file: {line.strip()}")


def _by_sftp(connection: Connection, work: Callable[[SFTPClient], None], arrived: Callable[[], int]) -> None:
    """Do some work of SFTP, again where the connection is lost."""

    def attempt() -> None:
        try:
            sftp = connection.sftp()
            channel = sftp.get_channel()
            channel.settimeout(SILENCE_TIMEOUT_S)
            work(sftp)
        except (SSHException, EOFError, TimeoutError, ConnectionError) as error:
            connection.close()
            raise LostConnection(
                f"the connection to {connection.target} was lost: {error or 'it was closed'}"
            ) from None
        except OSError as error:
            if channel.closed or not channel.get_transport().is_active():
                connection.close()
                raise LostConnection(f"the connection to {connection.target} was lost: {error}") from None
            if error.errno in HERE:
                raise
            raise RemoteError(
                f"{connection.target} refuses a file: {str(error).lower()}",
                hint="is its disk full, or the folder closed?",
            ) from None

    _repeated(connection, attempt, arrived)


def _put(sftp: SFTPClient, path: Path, there: bytes) -> None:
    """Send one file, from where it broke off."""
    try:
        offset = int(sftp.stat(there).st_size or 0)
    except FileNotFoundError:
        offset = 0
    with path.open("rb") as source, sftp.open(there, "ab") as target:
        source.seek(offset)
        target.set_pipelined(True)  # what is refused then is not told
        _copy(source, target)
        end = source.tell()
    if sftp.stat(there).st_size != end:
        raise OSError("it was not written to its end")


def _get(sftp: SFTPClient, there: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with sftp.open(there, "rb") as source, path.open("ab") as target:
        source.seek(target.tell())
        source.prefetch(source.stat().st_size, max_concurrent_requests=64)
        _copy(source, target)


def _bytes(folder: str, name: str) -> bytes:
    """A path on the server, whatever bytes its name has."""
    return f"{folder}/{name}".encode("utf-8", "surrogateescape")


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    while block := source.read(BLOCK):
        target.write(block)
