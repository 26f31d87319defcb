"""An SSH connection that is re-established when it is lost, and requests to the agent on the server through it."""

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
from invoke.exceptions import CommandTimedOut
from paramiko import Channel, SFTPClient
from paramiko.auth_strategy import AuthFailure
from paramiko.ssh_exception import AuthenticationException, BadHostKeyException, SSHException

from ..errors import LostConnection, RemoteError
from .agent.bootstrap import BOOTSTRAP
from .target import HostKeyPolicy, KeyAuth, RemoteTarget, changed_host_key, load_host_keys

Answer = TypeVar("Answer")

AGENT_DIR = Path(__file__).parent / "agent"
AGENT_MODULES = (  # sent with each request, in import order
    "bootstrap", "fs", "venv", "jobs", "snapshots", "start", "host_info", "apply_push", "list_run", "sessions",
)  # fmt: skip
RETRY_S = 120.0  # how long a lost connection is retried before it is reported
CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 20.0  # without any data; the agent sends a heartbeat every 3 s
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # between attempts; the last value repeats
logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)  # errors are reported as RemoteError


class Connection:
    """Sends requests to one target. Requests are idempotent: the agent recognises a repeated request by its id.

    Raises: RemoteError; LostConnection if the network or the server is unreachable.
    """

    def __init__(self, target: RemoteTarget) -> None:
        self.target = target
        self.was_connected = False  # a failure to connect after that is a lost network, and is retried
        self._ssh: fabric.Connection | None = None
        self._proxy: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: str, retry_s: float = RETRY_S, **args: Any) -> Any:
        """The result of `module:function` of the agent; the call is repeated if the connection is lost."""
        return self.retry(lambda: self._call_once(function, args), retry_s)

    def stream(self, function: str, **args: Any) -> Iterator[dict[str, Any]]:
        """What `module:function` of the agent yields, as it arrives.

        Raises: LostConnection; the caller knows where to resume.
        """
        for message in self._messages(function, args):
            if "frame" in message:
                yield message["frame"]

    def retry(self, attempt: Callable[[], Answer], retry_s: float = RETRY_S) -> Answer:
        """The result of `attempt`, which is repeated for `retry_s` seconds while the connection is lost."""
        end = time.monotonic() + retry_s
        for pause in _backoff():
            try:
                return attempt()
            except LostConnection:
                self.close()
                if not self.was_connected or time.monotonic() + pause > end:
                    raise
            time.sleep(pause)
        raise AssertionError("unreachable")

    @property
    def ssh(self) -> fabric.Connection:
        """Fabric's connection, opened if necessary."""
        if self._ssh is None or not self._ssh.is_connected:
            self.close()
            self._ssh = self._open()
            self.was_connected = True
        return self._ssh

    def reconnect(self) -> None:
        """Connect again, however long it takes."""
        self.close()
        self.retry(lambda: self.ssh, retry_s=float("inf"))

    def sftp(self) -> SFTPClient:
        return self.ssh.sftp()

    def close(self) -> None:
        ssh, proxy = self._ssh, self._proxy
        self._ssh = self._proxy = None
        if ssh is not None:
            with suppress(Exception):  # a lost connection may fail to close in any way
                ssh.close()
        if proxy is not None:
            proxy.kill()
            proxy.wait()

    # Opening

    def _open(self) -> fabric.Connection:
        target, auth = self.target, KeyAuth(self.target)
        name, port = target.known_as
        options = {
            "sock": self._open_socket(),
            "auth_strategy": auth,
            "timeout": CONNECT_TIMEOUT_S,
            "banner_timeout": SILENCE_TIMEOUT_S,
            "auth_timeout": SILENCE_TIMEOUT_S,
            "channel_timeout": SILENCE_TIMEOUT_S,
        }
        config = fabric.Config(overrides={"load_ssh_configs": False})  # `ssh -G` has read them, see target.py
        ssh = fabric.Connection(name, user=target.user, port=port, config=config, connect_kwargs=options)
        load_host_keys(ssh.client, target)
        ssh.client.set_missing_host_key_policy(HostKeyPolicy(target))
        started = time.monotonic()
        try:
            ssh.open()
            ssh.transport.set_keepalive(5)
            return ssh
        except BadHostKeyException as error:
            raise changed_host_key(error, target) from None
        except AuthFailure as error:
            if error.result and not any(isinstance(r.result, AuthenticationException) for r in error.result):
                raise LostConnection(f"{target} closed the connection: {error.result[-1].result}") from None
            raise auth.refusal(error) from None
        except (SSHException, OSError, EOFError) as error:
            proxy_error = self._proxy_error()
            if not proxy_error and time.monotonic() - started >= CONNECT_TIMEOUT_S:
                raise self._no_response() from None
            raise LostConnection(
                f"{target} does not respond as an SSH server: {proxy_error or error}",
                hint=f"check REMOTE_HOST and REMOTE_PORT, and try ssh {target.host}",
            ) from None
        finally:
            if not ssh.is_connected:
                with suppress(Exception):
                    ssh.close()

    def _open_socket(self) -> socket.socket:
        """A stream to the server, through the jump hosts or the ProxyCommand of ssh's configuration."""
        target = self.target
        if target.proxy:
            # Not paramiko's ProxyCommand, which does not notice that its process has ended.
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
        try:
            return socket.create_connection((target.hostname, target.port), timeout=CONNECT_TIMEOUT_S)
        except (socket.gaierror, UnicodeError) as error:  # UnicodeError: not a valid host name
            why = str(getattr(error, "strerror", error)).lower()
            raise LostConnection(
                f"the host name {target.hostname} cannot be resolved: {why}", hint="check REMOTE_HOST"
            ) from None
        except TimeoutError:
            raise self._no_response() from None
        except OSError as error:
            raise LostConnection(
                f"{target.hostname}:{target.port} cannot be reached: {(error.strerror or str(error)).lower()}",
                hint="check REMOTE_HOST and REMOTE_PORT, and that an SSH server listens on this port",
            ) from None

    def _no_response(self) -> LostConnection:
        return LostConnection(
            f"no response from {self.target.hostname}:{self.target.port} within {CONNECT_TIMEOUT_S:g} s",
            hint="check REMOTE_HOST, and the firewall of its network",
        )

    def _proxy_error(self) -> str:
        """The last line that the proxy command printed, if there is one."""
        if self._proxy is None or self._proxy.stderr is None:
            return ""
        self._proxy.kill()
        lines = self._proxy.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    # Requests

    def _call_once(self, function: str, args: dict[str, Any]) -> Any:
        return next(message["answer"] for message in self._messages(function, args) if "answer" in message)

    def _messages(self, function: str, args: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Every message of one request, the answer last; agent/bootstrap.py describes them."""
        mark = base64.b32encode(os.urandom(10)).decode()
        sources = {name: (AGENT_DIR / f"{name}.py").read_text(encoding="utf-8") for name in AGENT_MODULES}
        request = {"sources": sources, "mark": mark, "call": function, "args": args}
        try:
            channel = self.ssh.transport.open_session(timeout=SILENCE_TIMEOUT_S)
            with channel:
                channel.settimeout(SILENCE_TIMEOUT_S)
                channel.exec_command(self.target.python_command(BOOTSTRAP))
                channel.sendall(json.dumps(request).encode() + b"\n")
                noise: list[str] = []  # printed by the login shell
                for line in _lines(channel):
                    if mark:
                        mark = "" if line.strip() == mark else mark
                        noise.append(line)
                        continue
                    message = json.loads(line)
                    if "error" in message:
                        raise RemoteError(message["error"], hint=message.get("hint", ""))
                    yield message
                    if "answer" in message:
                        return
                raise self._no_answer(channel, started=not mark, noise=noise)
        except TimeoutError:
            raise LostConnection(f"no response from {self.target} for {SILENCE_TIMEOUT_S:g} s") from None
        except (SSHException, OSError, EOFError) as error:
            raise LostConnection(
                f"the connection to {self.target} was lost: {error or 'closed by the server'}"
            ) from None

    def _no_answer(self, channel: Channel, started: bool, noise: list[str]) -> Exception:
        """Why a request ended without an answer; `started` means that the agent has printed its mark."""
        # The status arrives after the output, and never if the network is gone.
        channel.status_event.wait(SILENCE_TIMEOUT_S)
        status = channel.recv_exit_status() if channel.exit_status_ready() else -1
        ready = channel.recv_stderr_ready()
        stderr = channel.recv_stderr(1 << 16).decode(errors="replace").strip() if ready else ""
        if status < 0:
            return LostConnection(f"the connection to {self.target} was lost")
        if not started and (shell := self._shell_failure()):
            return shell
        if status in {126, 127}:
            return RemoteError(
                f"{self.target} has no {self.target.python}",
                hint="install Python 3.11 or newer on the server, or set REMOTE_PYTHON to its path",
            )
        if not started:
            last = " ".join(noise).strip() or (stderr.splitlines() or [f"exit code {status}"])[-1]
            return RemoteError(
                f"{self.target.python} did not start on {self.target}: {last}",
                hint="" if any(noise) else "set REMOTE_PYTHON to the path of Python 3.8 or newer",
            )
        return RuntimeError(f"the agent failed on {self.target}:\n{stderr}")

    def _shell_failure(self) -> Exception | None:
        """The error of a login shell that runs no command at all; None if it runs one."""
        try:
            done = self.ssh.run("echo ok", hide=True, warn=True, timeout=SILENCE_TIMEOUT_S, in_stream=False)
        except CommandTimedOut:
            return None
        if "ok" in done.stdout.split():
            return None
        printed = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return RemoteError(
            f"the login shell of {self.target} ended before it ran a command: "
            + (printed[-1] if printed else f"exit code {done.exited}"),
            hint=f"check its startup files, such as ~/.bashrc, and whether ssh {self.target.host} logs in",
        )


def _lines(channel: Channel) -> Iterator[str]:
    """The lines of the channel's output, as they arrive."""
    rest = b""
    while data := channel.recv(1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)


def _backoff() -> Iterator[float]:
    yield from BACKOFF_S
    while True:
        yield BACKOFF_S[-1]
