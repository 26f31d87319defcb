"""A shell on the server, and the server's TensorBoard through an SSH tunnel."""

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

from ..errors import ConfigError, LostConnection, RemoteError
from .connection import Connection

PORT = 6006
PORTS_TRIED = 100  # from PORT on
LOOPBACK = "127.0.0.1"
CHANNEL_TIMEOUT_S = 10.0
BLOCK = 1 << 15  # bytes
PROHIBITED = 1  # the server's reason for rejecting a channel, RFC 4254, section 5.1
START = (
    "import json,os;d=json.loads(bytes.fromhex({given!r}));os.chdir(d[{root!r}]);"
    "os.environ.update(d[{environment!r}]);os.execvp(d[{argv!r}][0],d[{argv!r}])"
)


# Shell


def shell(connection: Connection) -> int:
    """Open a shell in REMOTE_DIR with its environment activated: by OpenSSH if it is installed, else by Fabric.

    Returns: the exit code of the shell.
    """
    found = connection.call("sessions:shell", folder=connection.target.dir)
    names = {name: name for name in ("root", "environment", "argv")}
    code = START.format(given=json.dumps(found).encode().hex(), **names).replace("'", '"')
    command = connection.target.python_command(code)
    if shutil.which("ssh"):
        connection.close()
        sys.stdout.flush()
        os.execvp("ssh", ["ssh", "-t", *connection.target.options, connection.target.host, command])
    done = connection.ssh.run(command, pty=True, warn=True)
    return int(done.exited)


# TensorBoard


def tensorboard(connection: Connection, port: str | None = None) -> int:
    """Show the server's TensorBoard at a port of this machine until Ctrl-C, across lost connections.

    TensorBoard on the server ends with this command.
    Raises: ConfigError if the requested port is in use; RemoteError.
    """
    with closing(open_listener(port)) as listener:
        address = f"http://localhost:{listener.getsockname()[1]}"
        tunnel = Tunnel(listener)
        threading.Thread(target=tunnel.serve, daemon=True).start()
        while True:
            try:
                for frame in connection.stream("sessions:tensorboard", folder=connection.target.dir):
                    tunnel.open(connection.ssh.transport, frame["port"], str(connection.target))
                    print(f"TensorBoard of {connection.target}: {address} (stop with Ctrl-C)", flush=True)
                raise LostConnection(f"the connection to {connection.target} was lost")
            except LostConnection as error:
                if not connection.was_connected:
                    raise
                print(f"{error.problems[0]}; reconnecting to show TensorBoard", file=sys.stderr, flush=True)
                connection.reconnect()


def open_listener(requested: str | None) -> socket.socket:
    """A socket on this machine's loopback, at the requested port or the first free one from PORT on."""
    if requested is not None and not (requested.isdecimal() and 0 < int(requested) < 1 << 16):
        raise ConfigError(f"PORT={requested}: should be a number from 1 to 65535")
    for port in [int(requested)] if requested else range(PORT, PORT + PORTS_TRIED):
        try:
            return socket.create_server((LOOPBACK, port))
        except OSError as error:
            problem = f"port {port} of this machine cannot be used: {(error.strerror or str(error)).lower()}"
    raise ConfigError(problem, hint="choose another PORT, or omit PORT")


class Tunnel:
    """Forwards each connection to `listener` to a port of the server, through the current SSH connection."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self._to: tuple[Transport, int] | None = None

    def open(self, transport: Transport, port: int, name: str) -> None:
        """Forward to this port from now on. Raises: RemoteError if the server does not permit it."""
        try:
            self._channel(transport, port).close()
        except ChannelException as error:
            if error.code != PROHIBITED:  # TensorBoard no longer listens at that port
                raise LostConnection(f"no response from TensorBoard on {name}: {error.text.lower()}") from None
            raise RemoteError(
                f"{name} does not permit port forwarding: {error.text.lower()}",
                hint="set AllowTcpForwarding to yes or local in the server's sshd_config",
            ) from None
        except (SSHException, OSError, EOFError) as error:
            raise LostConnection(f"the connection to {name} was lost: {error}") from None
        self._to = transport, port

    def serve(self) -> None:
        """Accept connections until the listener is closed."""
        with suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, suppress(SSHException, OSError, EOFError, TypeError):
            assert self._to is not None  # the address is printed after `open`
            with self._channel(*self._to) as channel:
                while True:
                    for end in select.select([client, channel], [], [])[0]:
                        if not (data := end.recv(BLOCK)):
                            return
                        (channel if end is client else client).sendall(data)

    @staticmethod
    def _channel(transport: Transport, port: int) -> Channel:
        return transport.open_channel("direct-tcpip", (LOOPBACK, port), (LOOPBACK, 0), timeout=CHANNEL_TIMEOUT_S)
