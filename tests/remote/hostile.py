"""An SSH server of this process whose every answer a test chooses: what a malicious or broken server may send.

server.replies["jobs:list_jobs"] = [b'{"answer": null}']   the lines that follow the mark
server.run = "/srv/outputs/runs/2026-01-02_03-04-05"       the run directory of the only job
server.listing = [entry, ...]                              what list_run yields after its head
server.files = {"model/weights": b"..."}                   what SFTP sends, by the path in the run
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import paramiko
import pytest

from src.remote.connection import Connection
from src.remote.target import RemoteTarget
from tests.remote.server import make_key

RUN_ID = "2026-01-02_03-04-05"
MANIFEST: dict[str, Any] = {
    "run": RUN_ID,
    "stage": "train",
    "status": "finished",
    "started": "2026-01-02T03:04:05",
}
Reply = list[bytes] | Callable[[dict[str, Any]], Iterator[bytes]]


def line(**message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def file_entry(path: str, content: bytes, **changes: Any) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"path": path, "size": len(content), "mtime": 1.0, "sha256": digest} | changes


class HostileServer:
    """Listens on loopback; `connection()` is a client that knows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key, self.host_key = make_key(folder / "id"), make_key(folder / "host_key")
        self.replies: dict[str, Reply] = {}
        self.run = f"/srv/outputs/runs/{RUN_ID}"
        self.listing: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.before_mark = b""
        self.sftp: bytes | None = None  # sent in place of the SFTP protocol, to connections that begin then
        self.stderr, self.exit_code = b"", 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._transports: list[paramiko.Transport] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """The variables of a client that knows this server."""
        known, config = self.folder / "known_hosts", self.folder / "ssh_config"
        public = self.host_key.with_suffix(".pub").read_text().split()[:2]
        known.write_text(f"[127.0.0.1]:{self.port} {' '.join(public)}\n")
        config.write_text(f'Host *\n  UserKnownHostsFile "{known}"\n  IdentityAgent none\n')
        return {
            "REMOTE_HOST": "127.0.0.1",
            "REMOTE_PORT": str(self.port),
            "REMOTE_USER": "victim",
            "REMOTE_KEY": str(self.key),
            "REMOTE_DIR": "/srv",
            "REMOTE_SSH_CONFIG": str(config),
        }

    def connection(self) -> Connection:
        return Connection(RemoteTarget.from_env(self.environment()))

    def serves(self, listing: list[dict[str, Any]], files: dict[str, bytes] | None = None) -> None:
        """A run with this listing; the manifest is added if the listing has none."""
        manifest = json.dumps(MANIFEST).encode()
        added = (
            []
            if any(e.get("path") == "manifest.json" for e in listing)
            else [file_entry("manifest.json", manifest)]
        )
        self.listing, self.files = [*added, *listing], {"manifest.json": manifest, **(files or {})}

    def reply(self, function: str, args: dict[str, Any]) -> Iterator[bytes]:
        known = self.replies.get(function)
        if known is not None:
            yield from known(args) if callable(known) else known
        elif function == "jobs:list_jobs":
            yield line(answer=[job(run=self.run)])
        elif function == "list_run:list_run":
            yield line(frame={"manifest": MANIFEST, "host": "srv", "rsync": False})
            yield from (line(frame=entry) for entry in self.listing)
            yield line(answer=None)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # else accept() holds the port
        self._listener.close()
        for transport in self._transports:
            transport.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                transport = paramiko.Transport(client)
                transport.add_server_key(paramiko.PKey.from_path(self.host_key))
                if self.sftp is None:
                    transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _Files, source=self)
                else:
                    transport.set_subsystem_handler("sftp", _Raw)
                self._transports.append(transport)
                with suppress(paramiko.SSHException, EOFError):
                    transport.start_server(server=_Session(self))


class _Session(paramiko.ServerInterface):
    """Accepts every key and every request."""

    def __init__(self, server: HostileServer) -> None:
        self.server = server

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._serve, args=(channel,), daemon=True).start()
        return True

    def _serve(self, channel: paramiko.Channel) -> None:
        with suppress(OSError, paramiko.SSHException), channel:
            request = json.loads(channel.makefile("rb").readline())
            channel.sendall(self.server.before_mark + b"\n" + request["mark"].encode() + b"\n")
            for data in self.server.reply(request["call"], request["args"]):
                channel.sendall(data)
            channel.sendall_stderr(self.server.stderr)
            channel.send_exit_status(self.server.exit_code)


class _Raw(paramiko.SubsystemHandler):
    """Sends the server's `sftp` and waits until the client ends."""

    def start_subsystem(self, name: str, transport: paramiko.Transport, channel: paramiko.Channel) -> None:
        channel.sendall(self.get_server().server.sftp)
        while channel.recv(1 << 10):
            pass


class _Files(paramiko.SFTPServerInterface):
    """The files of the server's run directory, read only."""

    def __init__(self, session: _Session, source: HostileServer) -> None:
        super().__init__(session)
        self.source = source

    def canonicalize(self, path: str) -> str:
        return path

    def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes) -> paramiko.SFTPHandle | int:
        content = self.source.files.get(path.removeprefix(f"{self.source.run}/"))
        return paramiko.SFTP_NO_SUCH_FILE if content is None else _File(content)


class _File(paramiko.SFTPHandle):
    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content

    def stat(self) -> paramiko.SFTPAttributes:
        found = paramiko.SFTPAttributes()
        found.st_size = len(self.content)
        return found

    def read(self, offset: int, length: int) -> bytes | int:
        return self.content[offset : offset + length] or paramiko.SFTP_EOF


def job(**changes: Any) -> dict[str, Any]:
    """The record of a job, as agent/jobs.py returns it."""
    return {
        "id": "the-job",
        "stage": "train",
        "words": [],
        "host": "srv",
        "pid": 1,
        "started": 1.0,
        "status": "ended",
        "run": None,
        "run_status": None,
        "code": 0,
        "ended": 2.0,
        "disk_full": False,
        "log_size": 0,
        "log_time": None,
        "last_line": "",
        "now": 3.0,
    } | changes


@pytest.fixture
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileServer]:
    server = HostileServer(tmp_path_factory.mktemp("hostile"))
    yield server
    server.close()
