"""What the tests of pushing and fetching share: a link to a folder of their own, and both ways that files go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.remote.link import Link
from src.remote.target import Target
from tests.remote.server import Server


@pytest.fixture
def link(sshd: Server, there: Path, tmp_path: Path) -> Iterator[Link]:
    """A link whose REMOTE_DIR is `there`."""
    variables = sshd.client(tmp_path / "person", f"~/{there.name}", REMOTE_PYTHON=sys.executable)
    with Link(Target.of(variables)) as link:
        yield link


@pytest.fixture(params=["rsync", "sftp"])
def way(request: pytest.FixtureRequest, sshd: Server) -> Iterator[str]:
    """Both ways: without rsync in the sessions' PATH it is SFTP."""
    if request.param == "rsync":
        yield "rsync"
        return
    with sshd.session(PATH="/nowhere"):
        yield "sftp"


def variables(link: Link) -> dict[str, str]:
    """The environment that means the target of a link."""
    target = link.target
    return {
        "REMOTE_HOST": target.host,
        "REMOTE_PORT": str(target.port),
        "REMOTE_USER": target.user,
        "REMOTE_KEY": str(target.keys[0]),
        "REMOTE_DIR": target.dir,
        "REMOTE_SSH_CONFIG": target.options[1],
        "REMOTE_PYTHON": target.python,
    }
