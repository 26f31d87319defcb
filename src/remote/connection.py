"""The connection to the server: Fabric's, made again when it is lost, and one request after another through it."""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fabric
from paramiko import Channel, SFTPClient
from paramiko.auth_strategy import AuthFailure
from paramiko.ssh_exception import AuthenticationException, BadHostKeyException, SSHException

from src.errors import LostConnection, RemoteError
from src.remote import host_keys
from src.remote.agent.protocol import BOOTSTRAP
from src.remote.target import RemoteTarget

Answer = TypeVar("Answer")

AGENT_DIR = Path(__file__).parent / "agent"
AGENT_MODULES = (  # each after those it imports
    "protocol", "fs", "venv", "jobs", "snapshots", "daemonize", "start", "logs", "stop",
    "host_info", "apply_push", "list_run", "sessions",
)  # fmt: skip
RETRY_S = 120.0  # seconds in which a lost connection is made again before that is told
CONNECT_TIMEOUT_S = 10.0  # seconds within which a host answers at all
SILENCE_TIMEOUT_S = (
    20.0  # seconds without a sign of life after which a connection is lost; agent/bootstrap.py gives one every 3
)
logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)  # what matters of it is told in a sentence

BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between attempts, the last for all that follow


class Connection:
    """Requests to one target. Every one of them may be repeated: nothing is done twice by that.

    Raises: RemoteError in a sentence; LostConnection where the network, or the server, is gone.
    """

    def __init__(self, target: RemoteTarget) -> None:
        self.target = target
        self.reached = False  # at least once: from then on a failure to connect is the network's
        self._ssh: fabric.Connection | None = None
        self._proxy: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: str, patience: float = RETRY_S, **given: Any) -> Any:
        """The answer of `module:function` of there/, called with `given`; asked again while it is lost."""
        return self.again(lambda: self._answer(function, given), patience)

    def stream(self, function: str, **given: Any) -> Iterator[dict[str, Any]]:
        """What `module:function` of there/ yields, as it comes.

        Raises: LostConnection; the caller knows where to begin again.
        """
        for frame in self._frames(function, given):
            if "frame" in frame:
                yield frame["frame"]

    def again(self, attempt: Callable[[], Answer], patience: float = RETRY_S) -> Answer:
        """The result of `attempt`, which is repeated for `patience` seconds while the connection is lost."""
        end = time.monotonic() + patience
        for pause in _pauses():
            try:
                return attempt()
            except LostConnection:
                self.close()
                if not self.reached or time.monotonic() + pause > end:
                    raise
            time.sleep(pause)
        raise AssertionError("unreachable")

    @property
    def ssh(self) -> fabric.Connection:
        """Fabric's connection, open."""
        if self._ssh is None or not self._ssh.is_connected:
            self.close()
            self._ssh = self._opened()
            self.reached = True
        return self._ssh

    def sftp(self) -> SFTPClient:
        return self.ssh.sftp()

    def close(self) -> None:
        connection, proxy = self._ssh, self._proxy
        self._ssh = self._proxy = None
        if connection is not None:
            with suppress(Exception):  # it is gone, however that may fail
                connection.close()
        if proxy is not None:
            proxy.kill()
            proxy.wait()

    def _opened(self) -> fabric.Connection:
        target, own = self.target, host_keys.KeyAuth(self.target)
        name, port = host_keys.name_of_key(target)
        known = {
            "sock": self._socket(),
            "auth_strategy": own,
            "timeout": CONNECT_TIMEOUT_S,
            "banner_timeout": SILENCE_TIMEOUT_S,
            "auth_timeout": SILENCE_TIMEOUT_S,
            "channel_timeout": SILENCE_TIMEOUT_S,
        }
        plain = fabric.Config(overrides={"load_ssh_configs": False})  # ssh itself has read them: target.py
        connection = fabric.Connection(name, user=target.user, port=port, config=plain, connect_kwargs=known)
        host_keys.trust_known(connection.client, target)
        connection.client.set_missing_host_key_policy(host_keys.HostKeyCheck(target))
        asked = time.monotonic()
        try:
            connection.open()
            connection.transport.set_keepalive(5)
            return connection
        except BadHostKeyException as error:
            raise host_keys.changed(error, target) from None
        except AuthFailure as error:
            if error.result and not any(isinstance(r.result, AuthenticationException) for r in error.result):
                raise LostConnection(f"{target} broke off: {error.result[-1].result}") from None
            raise own.refusal(error) from None
        except (SSHException, OSError, EOFError) as error:
            said = self._said()
            if not said and time.monotonic() - asked >= CONNECT_TIMEOUT_S:
                raise self._no_answer() from None
            raise LostConnection(
                f"{target} does not speak as an SSH server: {said or error}",
                hint=f"check REMOTE_HOST and REMOTE_PORT; does ssh {target.host} work?",
            ) from None
        finally:
            if not connection.is_connected:
                with suppress(Exception):
                    connection.close()

    def _socket(self) -> socket.socket:
        """A stream to the server, through what ssh's configuration puts between."""
        target = self.target
        if target.proxy:
            # Not paramiko's ProxyCommand, which does not see that its process has ended.
            ours, theirs = socket.socketpair()
            with theirs:
                self._proxy = subprocess.Popen(
                    target.proxy,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
            return ours
        at = f"{target.hostname}:{target.port}"
        try:
            return socket.create_connection((target.hostname, target.port), timeout=CONNECT_TIMEOUT_S)
        except (socket.gaierror, UnicodeError) as error:  # the second of what can be no name
            why = str(getattr(error, "strerror", error)).lower()
            raise LostConnection(f"there is no host {target.hostname}: {why}", hint="check REMOTE_HOST") from None
        except TimeoutError:
            raise self._no_answer() from None
        except OSError as error:
            raise LostConnection(
                f"{at} cannot be reached: {(error.strerror or str(error)).lower()}",
                hint="check REMOTE_HOST and REMOTE_PORT, and that an SSH server runs there",
            ) from None

    def _no_answer(self) -> LostConnection:
        return LostConnection(
            f"{self.target.hostname}:{self.target.port} does not answer within {CONNECT_TIMEOUT_S:g} s",
            hint="check REMOTE_HOST, and that its network lets you in",
        )

    def _said(self) -> str:
        """The last that the process between said, if there is one and it has ended."""
        if self._proxy is None or self._proxy.stderr is None:
            return ""
        self._proxy.kill()
        lines = self._proxy.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _answer(self, function: str, given: dict[str, Any]) -> Any:
        return next(frame["answer"] for frame in self._frames(function, given) if "answer" in frame)

    def _frames(self, function: str, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Everything that is said to one request, the answer last."""
        mark = base64.b32encode(os.urandom(10)).decode()
        request = {"boot": _source("bootstrap"), "sources": {name: _source(name) for name in AGENT_MODULES}}
        request |= {"mark": mark, "call": function, "given": given}
        try:
            channel = self.ssh.transport.open_session(timeout=SILENCE_TIMEOUT_S)
            with channel:
                channel.settimeout(SILENCE_TIMEOUT_S)
                channel.exec_command(self.target.command(BOOTSTRAP))
                channel.sendall(json.dumps(request).encode() + b"\n")
                noise: list[str] = []
                for line in _lines(channel):
                    if mark:
                        mark = "" if line.strip() == mark else mark
                        noise.append(line)
                        continue
                    frame = json.loads(line)
                    if "refused" in frame:
                        raise RemoteError(frame["refused"], hint=frame.get("hint", ""))
                    yield frame
                    if "answer" in frame:
                        return
                raise self._broken(channel, mark, noise)
        except TimeoutError:
            raise LostConnection(f"{self.target} has not answered for {SILENCE_TIMEOUT_S:g} s") from None
        except (SSHException, OSError, EOFError) as error:
            raise LostConnection(f"the connection to {self.target} was lost: {error or 'it was closed'}") from None

    def _broken(self, channel: Channel, mark: str, noise: list[str]) -> Exception:
        """Why a request ended without its answer: `mark` is empty once it has come, after `noise`."""
        channel.status_event.wait(
            SILENCE_TIMEOUT_S
        )  # it may come after the last of the output, and does not if it is lost
        status = channel.recv_exit_status() if channel.exit_status_ready() else -1
        said = channel.recv_stderr(1 << 16).decode(errors="replace").strip() if channel.recv_stderr_ready() else ""
        if status < 0:
            return LostConnection(f"the connection to {self.target} was lost")
        if status in {126, 127}:
            return RemoteError(
                f"{self.target} has no {self.target.python}",
                hint="install Python 3.11 or newer there, or say by REMOTE_PYTHON where it is",
            )
        if mark:
            last = " ".join(noise).strip() or (said.splitlines() or [f"exit code {status}"])[-1]
            return RemoteError(
                f"{self.target} did not run {self.target.python}: {last}",
                hint="" if any(noise) else "it should be Python 3.8 or newer; REMOTE_PYTHON says where one is",
            )
        return RuntimeError(f"on {self.target}:\n{said}")


def _source(name: str) -> str:
    return (AGENT_DIR / f"{name}.py").read_text(encoding="utf-8")


def _lines(channel: Channel) -> Iterator[str]:
    """The lines of the channel's output, as they come."""
    rest = b""
    while data := channel.recv(1 << 16):
        *whole, rest = (rest + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)


def _pauses() -> Iterator[float]:
    yield from BACKOFF_S
    while True:
        yield BACKOFF_S[-1]
