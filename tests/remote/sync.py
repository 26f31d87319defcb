"""Fixtures for tests of push and fetch: connections to `server_dir`, a fixture that each test file defines.

The fixtures of a plugin are visible in all of a session: no two plugins may define the same name
(test_architecture.py holds this).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.remote.connection import Connection
from src.remote.target import RemoteTarget
from tests.fixtures import ROOT
from tests.remote.proxy import Proxy, proxy
from tests.remote.server import Server


@pytest.fixture
def sync_connection(sshd: Server, server_dir: Path, tmp_path: Path) -> Iterator[Connection]:
    variables = sshd.client(tmp_path / "person", f"~/{server_dir.name}", REMOTE_PYTHON=sys.executable)
    with Connection(RemoteTarget.from_env(variables)) as connection:
        yield connection


@pytest.fixture
def bad_connection(sshd: Server, server_dir: Path, tmp_path: Path) -> Iterator[tuple[Connection, Proxy]]:
    """A connection through a proxy that can cut it."""
    with proxy(sshd.port) as between:
        variables = sshd.client(
            tmp_path / "far", f"~/{server_dir.name}", REMOTE_PORT=str(between.port), REMOTE_PYTHON=sys.executable
        )
        known = Path(variables["HOME"], "known_hosts")
        known.write_text(known.read_text().replace(f":{sshd.port}", f":{between.port}"))
        with Connection(RemoteTarget.from_env(variables)) as connection:
            yield connection, between


@pytest.fixture(params=["rsync", "sftp"])
def sync_way(request: pytest.FixtureRequest, sshd: Server) -> Iterator[str]:
    """Both ways of transfer: without rsync on the sessions' PATH it is SFTP."""
    if request.param == "rsync":
        yield "rsync"
        return
    with sshd.session(PATH="/nowhere"):
        yield "sftp"


def environment_of(connection: Connection) -> dict[str, str]:
    """The environment of a command that runs in any folder and has the target of a connection."""
    target = connection.target
    return os.environ | {
        "REMOTE_HOST": target.host,
        "REMOTE_PORT": str(target.port),
        "REMOTE_USER": target.user,
        "REMOTE_KEY": str(target.keys[0]),
        "REMOTE_DIR": target.dir,
        "REMOTE_SSH_CONFIG": target.options[1],
        "REMOTE_PYTHON": target.python,
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",
    }
