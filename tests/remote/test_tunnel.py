"""A shell in the server's folder, and its TensorBoard at a port of this machine."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from src.errors import ConfigError
from src.remote import tunnel
from tests.remote.client import Client
from tests.remote.server import Server, free_port, needs_ssh

pytest_plugins = ["tests.remote.server", "tests.remote.client"]
pytestmark = needs_ssh

ODD = ' it\'s a "$HOME" `x` ! é'
PATIENCE = 30  # seconds


def wait(done: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


# Shell


def typed(user: Client, text: str, **variables: str) -> tuple[str, int]:
    """The terminal output of `ssh-shell` with `text` typed at its prompt, and the exit code."""
    environment = {
        "PATH": os.environ["PATH"],
        "TERM": "dumb",
        "LANG": "C.UTF-8",
        **user.environment,
        **variables,
    }
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(user.project)
        os.execve(sys.executable, [sys.executable, "-m", "src.main", "ssh-shell"], environment)
    shown, end, sent = b"", time.monotonic() + PATIENCE, False
    while time.monotonic() < end:
        if not sent and shown.rstrip().endswith((b"#", b"$")):
            os.write(terminal, f"{text}\n".encode())
            sent = True
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # its other end is closed
                break
            shown += data
    else:
        os.kill(child, signal.SIGKILL)
    return shown.decode(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def odd(user: Client, remote_project: Path) -> tuple[Client, Path]:
    """A folder whose name has special characters of every shell."""
    folder = remote_project.with_name(remote_project.name + ODD)
    remote_project.rename(folder)
    return user.having(REMOTE_DIR=str(folder)), folder


SAY = "echo [$PWD] [$(python -c 'import sys; print(sys.prefix)')] [$-]; exit 7"


def test_a_shell_opens_in_the_folder_with_its_environment(odd: tuple[Client, Path]) -> None:
    user, folder = odd
    shown, code = typed(user, SAY)
    assert f"[{folder}] [{sys.prefix}]" in shown and "i" in shown.rpartition("[")[2], shown
    assert code == 7


def test_without_openssh_a_shell_opens_too(odd: tuple[Client, Path], sshd: Server, tmp_path: Path) -> None:
    user, folder = odd
    home = Path(user.environment["HOME"])
    (home / ".ssh").mkdir()
    (home / ".ssh/known_hosts").write_text(sshd.known_hosts())
    shown, code = typed(user, SAY, PATH=str(tmp_path))
    assert f"[{folder}] [{sys.prefix}]" in shown and "i" in shown.rpartition("[")[2], shown
    assert code == 7


def test_a_shell_in_a_missing_folder_is_refused(user: Client) -> None:
    assert "does not exist on the server; run make push" in user.refused("ssh-shell", REMOTE_DIR="~/nowhere")


# TensorBoard


class Board:
    """A running ssh-tensorboard, at `address`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        self.process = process
        self.first = process.stdout.readline().decode()
        assert self.first, process.communicate()
        self.address = next(word for word in self.first.split() if word.startswith("http://"))

    def runs(self) -> list[str]:
        with urllib.request.urlopen(f"{self.address}/data/runs", timeout=PATIENCE) as answer:
            found: list[str] = json.load(answer)
            return found

    def shown(self) -> bool:
        try:
            return self.runs() == ["a/logs"]
        except OSError:
            return False


@contextmanager
def board(user: Client, *words: str) -> Iterator[Board]:
    process = user.start("ssh-tensorboard", *words)
    try:
        yield Board(process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def run(remote_project: Path) -> Path:
    """A run with curves on the server."""
    from torch.utils.tensorboard.writer import SummaryWriter

    logs = remote_project / "outputs/runs/a/logs"
    with SummaryWriter(str(logs)) as writer:
        writer.add_scalar("loss", 1.0, 1)
    return logs


def boards(sshd: Server) -> list[str]:
    """The running processes of TensorBoard on the server."""
    return [words for p in sshd.started() if "--logdir" in (words := " ".join(p.cmdline()))]


def test_tensorboard_survives_lost_connections_and_ends_with_the_command(
    user: Client, run: Path, sshd: Server
) -> None:
    with board(user, f"--port={free_port()}") as shown:
        wait(shown.shown)
        assert len(boards(sshd)) >= 1
        sshd.block()
        wait(lambda: boards(sshd) == [])  # it ends when its client is killed
        with pytest.raises(OSError):
            shown.runs()
        sshd.unblock()
        wait(shown.shown)  # at the same address
        shown.process.send_signal(signal.SIGINT)
        _, err = shown.process.communicate(timeout=PATIENCE)
        assert shown.process.returncode == 130 and b"Traceback" not in err, err
        assert b"was lost" in err
    wait(lambda: boards(sshd) == [])


def test_a_requested_port_in_use_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(
            ConfigError, match=f"port {port} of this machine cannot be used: address already in use"
        ):
            tunnel.open_listener(port)
    for wrong in ("x", "0", "70000"):
        with pytest.raises(ConfigError, match=f"PORT={wrong}: should be a number"):
            tunnel.open_listener(wrong)


def test_by_default_the_next_free_port_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(tunnel, "PORT", taken.getsockname()[1])
        with tunnel.open_listener(None) as found:
            assert 0 < found.getsockname()[1] - tunnel.PORT < tunnel.PORTS_TRIED


def test_a_tensorboard_that_does_not_start_is_reported(user: Client, remote_project: Path) -> None:
    (remote_project / ".venv/bin").unlink()
    (remote_project / ".venv/bin").mkdir()
    (remote_project / ".venv/bin/python").symlink_to("/usr/bin/false")
    assert "TensorBoard on the server ended: no output" in user.refused("ssh-tensorboard")
    (remote_project / ".venv/bin/python").unlink()
    assert "run make ssh-init" in user.refused("ssh-tensorboard")


def test_a_server_without_port_forwarding_is_reported(user: Client, run: Path, sshd: Server) -> None:
    config = sshd.folder / "sshd_config"
    text = config.read_text()
    sshd.block()
    config.write_text(f"{text}AllowTcpForwarding no\n")
    sshd.unblock()
    try:
        message = user.refused("ssh-tensorboard", f"--port={free_port()}")
        assert "does not permit port forwarding" in message and "AllowTcpForwarding" in message
    finally:
        sshd.block()
        config.write_text(text)
        sshd.unblock()
