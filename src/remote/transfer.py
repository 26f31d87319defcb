"""Files on their way, by rsync where both sides have it, else by SFTP. What was sent already is not sent again.

Neither is trusted: who calls compares the content of what has arrived.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from paramiko import SFTPClient
from paramiko.ssh_exception import SSHException

from src.errors import LostConnection, RemoteError
from src.remote.link import SILENCE, Link

TRIES = 3  # of rsync, while the connection is there
BLOCK = 1 << 15  # bytes, what an SFTP server takes at once
LARGE = 20_000_000  # bytes, from which on a terminal is shown how far it is
KEEP_ALIVE = ("-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4")
FULL = ("No space left", "Disk quota exceeded")
CLOSED = ("Permission denied", "Read-only file system", "Operation not permitted")


def send(link: Link, files: Mapping[str, Path], folder: str, rsync: bool, size: int) -> None:
    """Send files to an absolute folder of the server, as the names that they have in `files`.

    Raises: RemoteError if they cannot be written there; LostConnection.
    """
    if rsync and _local_rsync():
        with tempfile.TemporaryDirectory() as linked:
            for name, path in files.items():
                Path(linked, name).symlink_to(path.absolute())
            words = ["-rL", "--append", *_progress(size), f"{linked}/", f"{_host(link)}:{folder}/"]
            if _by_rsync(link, words, b"", lambda: int(link.call("files:size", folder=folder))):
                return

    def put(sftp: SFTPClient) -> None:
        for name, path in files.items():
            _put(sftp, path, f"{folder}/{name}")

    _by_sftp(link, put)


def receive(link: Link, names: Sequence[str], folder: str, to: Path, rsync: bool, size: int) -> None:
    """Fetch files by their names in an absolute folder of the server.

    Raises: RemoteError; LostConnection.
    """
    if rsync and _local_rsync():
        words = ["-r", "--append", "--from0", "--files-from=-", *_progress(size)]
        words += [f"{_host(link)}:{folder}/", f"{to}/"]
        given = b"".join(os.fsencode(name) + b"\0" for name in names)
        if _by_rsync(link, words, given, lambda: _here(to, names)):
            return

    def get(sftp: SFTPClient) -> None:
        for name in names:
            _get(sftp, f"{folder}/{name}", to / name)

    _by_sftp(link, get)


def _local_rsync() -> bool:
    return shutil.which("rsync") is not None and shutil.which("ssh") is not None


def _host(link: Link) -> str:
    return f"[{link.target.host}]" if ":" in link.target.host else link.target.host


def _progress(size: int) -> list[str]:
    return ["--info=progress2", "--no-inc-recursive"] if size > LARGE and sys.stderr.isatty() else []


def _by_rsync(link: Link, words: Sequence[str], given: bytes, arrived: Callable[[], int]) -> bool:
    """Run rsync until it is done, through lost connections. `arrived` counts the bytes that are where they should.

    Returns: False where it does not work.
    """
    shell = " ".join("'" + word.replace("'", "''") + "'" for word in (*link.target.ssh, *KEEP_ALIVE))
    tries, before = TRIES, -1
    while tries:
        done = subprocess.run(
            ["rsync", "--protect-args", "--timeout=30", "-e", shell, *words],
            input=given,
            stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        said = os.fsdecode(done.stderr)
        if done.returncode in {0, 24}:  # 24: a file vanished, which is seen when it is asked after
            return True
        if done.returncode != 255 and any(reason in said for reason in (*FULL, *CLOSED)):
            raise refused(link, said)
        if done.returncode in {1, 2, 4, 127}:  # it does not understand what it is told, or who it speaks to
            break
        link.call("files:root", folder=link.target.dir)  # waits until the connection is back
        now = arrived()
        tries, before = (TRIES if now > before else tries - 1), now
    last = [line for line in said.splitlines() if line.strip()] or [""]
    _tell(f"rsync does not work ({last[0].strip() or f'exit code {done.returncode}'}): SFTP goes on")
    return False


def _here(folder: Path, names: Sequence[str]) -> int:
    return sum(path.stat().st_size for name in names if (path := folder / name).is_file())


def refused(link: Link, said: str) -> RemoteError:
    """The error of a disk that takes no more, in a sentence."""
    line = next(line for line in said.splitlines() if any(reason in line for reason in (*FULL, *CLOSED)))
    if any(reason in line for reason in FULL):
        return RemoteError(
            f"no space is left on the device: {line.strip()}", hint="free some; what is there stays"
        )
    return RemoteError(f"{link.target} refuses a file: {line.strip()}")


def _by_sftp(link: Link, work: Callable[[SFTPClient], None]) -> None:
    """Do some work of SFTP, again from its beginning where the connection is lost."""

    def attempt() -> None:
        try:
            sftp = link.sftp()
            channel = sftp.get_channel()
            channel.settimeout(SILENCE)
            work(sftp)
        except (SSHException, EOFError, TimeoutError, ConnectionError) as error:
            raise LostConnection(f"the connection to {link.target} was lost: {error or 'it was closed'}") from None
        except OSError as error:
            if channel.closed or not channel.get_transport().is_active():
                raise LostConnection(f"the connection to {link.target} was lost: {error}") from None
            raise

    link.again(attempt)


def _put(sftp: SFTPClient, path: Path, there: str) -> None:
    """Send one file, from where it broke off."""
    try:
        offset = int(sftp.stat(there).st_size or 0)
    except FileNotFoundError:
        offset = 0
    with path.open("rb") as source, sftp.open(there, "ab") as target:
        source.seek(offset)
        target.set_pipelined(True)
        _copy(source, target)


def _get(sftp: SFTPClient, there: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with sftp.open(there, "rb") as source, path.open("ab") as target:
        source.seek(target.tell())
        source.prefetch(source.stat().st_size, max_concurrent_requests=64)
        _copy(source, target)


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    while block := source.read(BLOCK):
        target.write(block)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
