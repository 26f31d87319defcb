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
from ..utils.logs import eprint
from ..utils.units import format_size
from . import messages
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
START_TIMEOUT_S = 60.0  # for a login shell that prints, until the agent starts
MAX_LINE = 64 << 20  # bytes of one message; the records of 10,000 jobs are about 10 MB
MAX_NOISE = 1 << 20  # characters that the login shell prints
MAX_ERROR = 10_000  # characters of a text of the server in an error
MAX_TRACEBACK = 40  # lines
MAX_SHOWN = 200  # characters of an invalid answer
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
                lines = self._lines(channel)
                noise, started = self._read_to_mark(lines, mark)
                if not started:
                    raise self._no_answer(channel, started, noise)
                for line in lines:
                    yield (message := self._parse(function, line))
                    if "answer" in message:
                        return
                raise self._no_answer(channel, started, [])
        except TimeoutError:
            raise LostConnection(f"no response from {self.target} for {SILENCE_TIMEOUT_S:g} s") from None
        except (SSHException, OSError, EOFError) as error:
            raise LostConnection(
                f"the connection to {self.target} was lost: {error or 'closed by the server'}"
            ) from None

    def _read_to_mark(self, lines: Iterator[str], mark: str) -> tuple[list[str], bool]:
        """Read what the login shell prints. Returns: its lines, and whether the mark of the agent follows them."""
        noise: list[str] = []
        end, size = time.monotonic() + START_TIMEOUT_S, 0
        for line in lines:
            if line.strip() == mark:
                return noise, True
            noise.append(line)
            size += len(line)
            if size > MAX_NOISE or time.monotonic() > end:
                raise RemoteError(
                    f"{self.target.python} did not start on {self.target}: the session does not stop printing "
                    f"({line.strip()[:80]!r})",
                    hint=f"check the startup files of the login shell: ssh {self.target.host} true",
                )
        return noise, False

    def _parse(self, function: str, line: str) -> dict[str, Any]:
        """One message of the agent. Raises: RemoteError if it is an error, or not what `function` promises."""
        try:
            message = messages.parse(function, line)
        except ValueError as error:
            raise self.invalid_answer(f"{function}: {error}") from None
        if "error" in message:
            raise RemoteError(message["error"][:MAX_ERROR], hint=message.get("hint", "")[:MAX_ERROR])
        return message

    def invalid_answer(self, what: str) -> RemoteError:
        """The error for an answer that no agent sends."""
        shown = what[:MAX_SHOWN] if what.isprintable() else ascii(what[:MAX_SHOWN])
        return RemoteError(
            f"{self.target} sent an invalid answer, {shown}",
            hint="nothing was changed here; check that it is your server, and that no program of its login shell "
            "prints in the background",
        )

    def _lines(self, channel: Channel) -> Iterator[str]:
        """The lines of the channel's output, as they arrive. Raises: RemoteError if one does not end."""
        rest = bytearray()
        while data := channel.recv(1 << 16):
            rest += data
            if b"\n" in data:
                *lines, rest = rest.split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
            if len(rest) > MAX_LINE:
                raise self.invalid_answer(f"a line of more than {format_size(MAX_LINE)}")

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
            last = " ".join(noise).strip()[:MAX_ERROR] or (stderr.splitlines() or [f"exit code {status}"])[-1]
            return RemoteError(
                f"{self.target.python} did not start on {self.target}: {last}",
                hint="" if any(noise) else "set REMOTE_PYTHON to the path of Python 3.8 or newer",
            )
        *traceback, last = stderr.splitlines() or [f"exit code {status}"]
        eprint("\n".join(traceback[-MAX_TRACEBACK:]))
        return RemoteError(
            f"the agent failed on {self.target}: {last}",
            hint="the lines above are the server's traceback"
            if traceback
            else "check the server's memory and disk",
        )

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


def _backoff() -> Iterator[float]:
    yield from BACKOFF_S
    while True:
        yield BACKOFF_S[-1]
