"""What of the server is shown here: a shell in the project's folder, and its TensorBoard."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import sys
import threading
from contextlib import closing, suppress

from paramiko import Channel, Transport
from paramiko.ssh_exception import ChannelException, SSHException

from src.errors import ConfigError, LostConnection, RemoteError
from src.remote.connection import Connection

PORT = 6006
TRIES = 100  # ports after PORT
LOCAL = "127.0.0.1"
ANSWERS = 10.0  # seconds
BLOCK = 1 << 15  # bytes
PROHIBITED = 1  # the server's reason for refusing a channel, of RFC 4254, 5.1
START = (
    "import json,os;d=json.loads(bytes.fromhex({given!r}));os.chdir(d[{root!r}]);"
    "os.environ.update(d[{environment!r}]);os.execvp(d[{argv!r}][0],d[{argv!r}])"
)


# Shell


def shell(connection: Connection) -> int:
    """A shell in REMOTE_DIR, with its environment activated: OpenSSH's where it is installed, else Fabric's.

    Returns: the exit code of the shell.
    """
    found = connection.call("sessions:shell", folder=connection.target.dir)
    names = {name: name for name in ("root", "environment", "argv")}
    code = START.format(given=json.dumps(found).encode().hex(), **names).replace("'", '"')
    command = connection.target.command(code)
    if shutil.which("ssh"):
        connection.close()
        sys.stdout.flush()
        os.execvp("ssh", ["ssh", "-t", *connection.target.options, connection.target.host, command])
    done = connection.ssh.run(command, pty=True, warn=True)
    return int(done.exited)


# TensorBoard


def tensorboard(connection: Connection, port: str | None = None) -> int:
    """Show the server's TensorBoard at a port of this machine until Ctrl-C, over lost connections.

    It runs there for as long as this does. Raises: ConfigError where the port that was asked for is taken.
    """
    with closing(listener(port)) as listening:
        address = f"http://localhost:{listening.getsockname()[1]}"
        tunnel = Tunnel(listening)
        threading.Thread(target=tunnel.serve, daemon=True).start()
        while True:
            try:
                for frame in connection.stream("sessions:tensorboard", folder=connection.target.dir):
                    tunnel.open(connection.ssh.transport, frame["port"], str(connection.target))
                    print(f"TensorBoard of {connection.target}: {address} (Ctrl-C ends it)", flush=True)
                raise LostConnection(f"the connection to {connection.target} was lost")
            except LostConnection as error:
                if not connection.reached:
                    raise
                print(f"{error.problems[0]}; TensorBoard comes back with it", file=sys.stderr, flush=True)
                connection.close()
                connection.again(lambda: connection.ssh, patience=float("inf"))


def listener(asked: str | None) -> socket.socket:
    """A socket of this machine's loopback at the port that was asked for, or the first free one from PORT on."""
    if asked is not None and not (asked.isdecimal() and 0 < int(asked) < 1 << 16):
        raise ConfigError(f"PORT={asked}: should be a number from 1 to 65535")
    for port in [int(asked)] if asked else range(PORT, PORT + TRIES):
        try:
            return socket.create_server((LOCAL, port))
        except OSError as error:
            problem = f"port {port} of this machine cannot be had: {(error.strerror or str(error)).lower()}"
    raise ConfigError(problem, hint="name another by PORT=, or leave it out")


class Tunnel:
    """Carries each connection to `listening` to a port of the server, by the connection that there is now."""

    def __init__(self, listening: socket.socket) -> None:
        self.listening = listening
        self._to: tuple[Transport, int] | None = None

    def open(self, transport: Transport, port: int, name: str) -> None:
        """Carry to this port from now on. Raises: RemoteError where the server does not permit it."""
        try:
            self._channel(transport, port).close()
        except ChannelException as error:
            if error.code != PROHIBITED:  # nobody listens at that port any more
                raise LostConnection(f"TensorBoard on {name} does not answer: {error.text.lower()}") from None
            raise RemoteError(
                f"{name} does not let a port be forwarded: {error.text.lower()}",
                hint="AllowTcpForwarding of its sshd must be yes or local",
            ) from None
        except (SSHException, OSError, EOFError) as error:
            raise LostConnection(f"the connection to {name} was lost: {error}") from None
        self._to = transport, port

    def serve(self) -> None:
        """Take connections until the listener is closed."""
        with suppress(OSError):
            while True:
                client = self.listening.accept()[0]
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, suppress(SSHException, OSError, EOFError, TypeError):
            assert self._to is not None  # before it is, nobody was told of the port
            with self._channel(*self._to) as channel:
                while True:
                    for one in select.select([client, channel], [], [])[0]:
                        if not (data := one.recv(BLOCK)):
                            return
                        (channel if one is client else client).sendall(data)

    @staticmethod
    def _channel(transport: Transport, port: int) -> Channel:
        return transport.open_channel("direct-tcpip", (LOCAL, port), (LOCAL, 0), timeout=ANSWERS)
