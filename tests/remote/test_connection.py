"""Connecting to a real OpenSSH server, its errors, and requests over lost connections."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from src.errors import LostConnection, RemoteError
from src.remote import connection as connection_module
from src.remote.connection import Connection
from src.remote.target import RemoteTarget
from tests.remote.client import Client
from tests.remote.proxy import proxy
from tests.remote.server import GUEST_NAME, Server, free_port, make_key, needs_own_mounts, needs_ssh

pytest_plugins = ["tests.remote.server", "tests.remote.client"]
pytestmark = needs_ssh

STATUS = "ssh-status"


def reached(user: Client, **variables: str) -> None:
    done = user(STATUS, **variables)
    assert (done.returncode, done.stderr) == (0, "")


# Addresses


def test_all_missing_variables_are_reported_at_once(user: Client) -> None:
    printed = user.refused(STATUS, REMOTE_HOST="", REMOTE_DIR="", REMOTE_PORT="ssh", REMOTE_KEY="/no/key")
    assert [line.split()[0] for line in printed.splitlines()[:-1]] == [
        "REMOTE_HOST", "REMOTE_DIR", "REMOTE_PORT=ssh:", "REMOTE_KEY=/no/key",
    ]  # fmt: skip
    assert ".env" in printed.splitlines()[-1]


def test_an_unknown_host_name_is_reported(user: Client) -> None:
    printed = user.refused(STATUS, REMOTE_HOST="no-such-host.invalid")
    assert printed.startswith("the host name no-such-host.invalid cannot be resolved: ") and printed.endswith(
        "; check REMOTE_HOST"
    )
    assert "\n" not in printed


def test_a_host_is_never_an_option_of_ssh(user: Client, tmp_path: Path) -> None:
    printed = user.refused(STATUS, REMOTE_HOST=f"-oProxyCommand=touch {tmp_path}/touched")
    assert printed.endswith("is not a host name")
    assert not (tmp_path / "touched").exists()


def test_a_closed_port_is_reported(user: Client) -> None:
    port = free_port()
    printed = user.refused(STATUS, REMOTE_PORT=str(port))
    assert printed == (
        f"127.0.0.1:{port} cannot be reached: connection refused; "
        "check REMOTE_HOST and REMOTE_PORT, and that an SSH server listens on this port"
    )


def test_a_port_out_of_range_is_reported(user: Client) -> None:
    assert "99999" in user.refused(STATUS, REMOTE_PORT="99999")


def test_a_network_that_drops_all_packets_is_reported(user: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "CONNECT_TIMEOUT_S", 0.5)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]  # fills the queue: no further connection is answered
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        with pytest.raises(LostConnection, match=f"no response from 127.0.0.1:{port} within 0.5 s"):
            Connection(RemoteTarget.from_env(user.environment | {"REMOTE_PORT": str(port)})).call(
                "jobs:list_jobs", folder="~/x"
            )
        for each in waiting:
            each.close()


def test_a_silent_server_is_reported(sshd: Server, user: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "CONNECT_TIMEOUT_S", 0.5)
    with proxy(sshd.port) as between:
        between.silence()
        target = RemoteTarget.from_env(user.environment | {"REMOTE_PORT": str(between.port)})
        with pytest.raises(LostConnection, match=r"no response from .* within 0\.5 s"):
            Connection(target).call("jobs:list_jobs", folder="~/x")


def test_a_server_that_is_not_an_ssh_server_is_reported(user: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as web:
        port = web.getsockname()[1]

        def answer() -> None:
            client = web.accept()[0]
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            client.close()

        answering = threading.Thread(target=answer)
        answering.start()
        printed = user.refused(STATUS, REMOTE_PORT=str(port))
        answering.join()
    assert printed.startswith(f"{user.environment['REMOTE_USER']}@127.0.0.1 does not respond as an SSH server")
    assert "check REMOTE_HOST and REMOTE_PORT" in printed


# Host keys


def test_an_unknown_server_is_refused_until_its_fingerprint_is_accepted(sshd: Server, user: Client) -> None:
    user.known_hosts.write_text("")
    printed = user.refused(STATUS)
    assert f"[127.0.0.1]:{sshd.port} is not a known host: its ssh-ed25519 key is {sshd.fingerprint}" in printed
    assert printed.endswith(f"accept the key with REMOTE_FINGERPRINT={sshd.fingerprint}")
    assert user.known_hosts.read_text() == ""
    done = user(STATUS, REMOTE_FINGERPRINT=sshd.fingerprint)
    assert done.returncode == 0 and sshd.fingerprint in done.stdout + done.stderr
    assert user.known_hosts.read_text() == sshd.known_hosts()
    reached(user)  # known from now on
    assert sshd.ssh("true", user.environment).returncode == 0  # to ssh as well


def test_another_fingerprint_than_the_accepted_one_is_refused(sshd: Server, user: Client) -> None:
    user.known_hosts.write_text("")
    other = f"SHA256:{'a' * 43}"
    printed = user.refused(STATUS, REMOTE_FINGERPRINT=other)
    assert other in printed and sshd.fingerprint in printed
    assert user.known_hosts.read_text() == ""


def test_a_changed_host_key_is_refused_whatever_is_accepted(sshd: Server, user: Client, tmp_path: Path) -> None:
    was = sshd.known_hosts(make_key(tmp_path / "earlier"))
    user.known_hosts.write_text(was)
    for accepted in ({}, {"REMOTE_FINGERPRINT": sshd.fingerprint}):
        printed = user.refused(STATUS, **accepted)
        assert printed.startswith("the host key of 127.0.0.1 has changed from ")
        assert f" to {sshd.fingerprint}; " in printed and str(user.known_hosts) in printed
        assert user.known_hosts.read_text() == was


def test_strict_host_key_checking_of_ssh_applies(sshd: Server, user: Client) -> None:
    user.known_hosts.write_text("")
    user.configure("  StrictHostKeyChecking accept-new\n")
    assert user(STATUS).returncode == 0
    assert user.known_hosts.read_text() == sshd.known_hosts()


# Private keys


def test_a_rejected_key_is_named(user: Client, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other")
    printed = user.refused(STATUS, REMOTE_KEY=str(other))
    login = f"rejected the login of {user.environment['REMOTE_USER']}"
    assert f"{login}: none of the keys was accepted: {other}; check REMOTE_USER" in printed


def test_an_unknown_user_is_named(user: Client) -> None:
    printed = user.refused(STATUS, REMOTE_USER="nobody-of-that-name")
    assert "rejected the login of nobody-of-that-name" in printed and "check REMOTE_USER" in printed


def test_an_invalid_key_file_is_named(user: Client, tmp_path: Path) -> None:
    (tmp_path / "no_key").write_text("not a key\n")
    printed = user.refused(STATUS, REMOTE_KEY=str(tmp_path / "no_key"))
    assert f"{tmp_path}/no_key" in printed and "cannot be read" in printed


def test_a_key_with_a_passphrase_requires_an_agent(sshd: Server, user: Client, tmp_path: Path) -> None:
    locked = make_key(tmp_path / "locked", passphrase="of eight words")
    user.configure("  IdentityAgent SSH_AUTH_SOCK\n", first=True)
    with sshd.session(locked):
        printed = user.refused(STATUS, REMOTE_KEY=str(locked))
        assert f"{locked} has a passphrase" in printed and printed.endswith(f"run ssh-add {locked}")
        agent = tmp_path / "agent"
        holding = subprocess.Popen(["ssh-agent", "-D", "-a", str(agent)], stdout=subprocess.DEVNULL)
        try:
            shutil.copy(locked, tmp_path / "open")
            (tmp_path / "open").chmod(0o600)
            words = ["ssh-keygen", "-q", "-p", "-P", "of eight words", "-N", "", "-f", str(tmp_path / "open")]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            known = {"SSH_AUTH_SOCK": str(agent)}
            subprocess.run(["ssh-add", "-q", str(tmp_path / "open")], check=True, env=known)
            reached(user, REMOTE_KEY=str(locked), **known)
        finally:
            holding.kill()
            holding.wait()


# ssh's configuration


def test_an_alias_of_sshs_configuration_is_resolved(sshd: Server, user: Client, tmp_path: Path) -> None:
    (tmp_path / "more.conf").write_text(
        f"Host gpu\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User {sshd.user}\n  HostKeyAlias the-gpu\n"
    )
    user.configure(f'Include "{tmp_path}/more.conf"\n', first=True)
    user.known_hosts.write_text("the-gpu " + sshd.known_hosts().partition(" ")[2])
    reached(user, REMOTE_HOST="gpu", REMOTE_PORT="", REMOTE_USER="", REMOTE_KEY="")
    printed = user.refused(STATUS, REMOTE_HOST="gpus", REMOTE_PORT="", REMOTE_USER="", REMOTE_KEY="")
    assert printed.startswith("the host name gpus cannot be resolved")


def test_a_jump_host_is_used(sshd: Server, user: Client) -> None:
    with proxy(sshd.port) as hop:
        user.configure(
            f"Host hop\n  HostName 127.0.0.1\n  Port {hop.port}\n  User {sshd.user}\n  HostKeyAlias hop\n"
            f"Host behind\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User {sshd.user}\n  ProxyJump hop\n",
            first=True,
        )
        user.known_hosts.write_text(sshd.known_hosts() + "hop " + sshd.known_hosts().partition(" ")[2])
        reached(user, REMOTE_HOST="behind", REMOTE_PORT="", REMOTE_USER="", REMOTE_KEY="")
        assert hop.count == 1


def test_a_proxy_command_is_used(sshd: Server, user: Client, tmp_path: Path) -> None:
    user.configure(f"  ProxyCommand ssh -F {user.environment['REMOTE_SSH_CONFIG']}.hop -W %h:%p hop\n")
    Path(user.environment["REMOTE_SSH_CONFIG"] + ".hop").write_text(
        f"Host hop\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User {sshd.user}\n  IdentityFile {sshd.key}\n"
        f"  UserKnownHostsFile {user.known_hosts}\n"
    )
    reached(user)


def test_an_error_of_the_jump_host_is_shown(user: Client) -> None:
    user.configure(
        f"Host hop\n  HostName 127.0.0.1\n  Port {free_port()}\nHost behind\n  ProxyJump hop\n", first=True
    )
    printed = user.refused(STATUS, REMOTE_HOST="behind")
    assert "Connection refused" in printed and "\n" not in printed


def test_an_invalid_ssh_configuration_is_reported(user: Client) -> None:
    user.configure("  NoSuchOption yes\n")
    printed = user.refused(STATUS)
    assert printed.startswith("ssh rejects its configuration for 127.0.0.1: ") and "nosuchoption" in printed


# The server's Python and folder


def test_a_server_without_python_is_reported(sshd: Server, user: Client) -> None:
    with sshd.session(PATH="/nowhere"):
        printed = user.refused(STATUS)
        assert printed.startswith(f"{sshd.user}@127.0.0.1 has no python3; install Python")
        reached(user, REMOTE_PYTHON=os.path.realpath(sys.executable))


@needs_own_mounts
def test_a_login_shell_that_exits_is_not_blamed_on_python(sshd: Server, user: Client, tmp_path: Path) -> None:
    shells = {"echo Sorry, no login.": "Sorry, no login.", "exit 3": "exit code 3"}
    for number, (line, printed) in enumerate(shells.items()):
        shell = tmp_path / f"shell{number}"
        shell.write_text(f"#!/bin/sh\n{line}\n")
        shell.chmod(0o755)
        with sshd.login_shell(str(shell)):
            said = user.refused("ssh-status")
        assert f"ended before it ran a command: {printed}; check its startup files" in said
        assert "python" not in said.lower()


def test_output_of_the_login_shell_is_skipped(sshd: Server, user: Client) -> None:
    noisy = sshd.home / ".bashrc"
    try:
        noisy.write_text('echo \'{"answer": []}\'; echo Welcome; printf "no end of line"; echo "a quota" >&2\n')
        reached(user)
        noisy.write_text("echo Out of service until noon; exit 1\n")
        assert "Out of service until noon" in user.refused(STATUS)
    finally:
        noisy.unlink()


@needs_own_mounts
@pytest.mark.parametrize("command", ["ssh-plan"])
def test_a_folder_without_write_permission_is_reported(sshd: Server, user: Client, command: str) -> None:
    printed = user.refused(command, REMOTE_USER=GUEST_NAME, REMOTE_DIR="/var/lib/assay")
    assert printed == (
        "/var/lib/assay: permission denied; REMOTE_DIR must be a folder that REMOTE_USER may write to"
    )
    assert not Path("/var/lib/assay").exists()


@pytest.mark.parametrize("folder", ["/proc/assay", "/dev/null", "/dev/null/assay"])
def test_a_path_that_cannot_be_a_folder_is_reported(user: Client, folder: str) -> None:
    printed = user.refused("ssh-plan", REMOTE_DIR=folder)
    assert printed.startswith(folder[:9]) and "REMOTE_DIR" in printed and "\n" not in printed


@needs_own_mounts
def test_a_full_disk_is_reported(sshd: Server, user: Client) -> None:
    small = sshd.home / "small"
    small.mkdir()
    fill = f"dd if=/dev/zero of={small}/big bs=4k 2>/dev/null || true"
    done = sshd.inside(
        f"mount -t tmpfs -o size=8m none {small}; mkdir -p {small}/.venv/bin;"
        f"ln -s /bin/sh {small}/.venv/bin/python; {fill}"
    )
    assert done.returncode == 0, done.stderr
    user = user.having(REMOTE_DIR="~/small")
    printed = user.refused("ssh-plan")
    assert re.search(
        r"has 0 bytes of free space, but the push needs [\d.]+ MB; free some space on the server$", printed
    )
    sshd.inside(f"rm {small}/big")
    assert user("push").returncode == 0
    sshd.inside(fill)
    assert user.refused("ssh-plan").endswith(
        "no space left on device; free some space on the server and run the command again; nothing is lost"
    )


# Requests


def test_a_request_is_repeated_after_a_lost_connection(sshd: Server, connection: Connection) -> None:
    for _ in range(3):
        assert connection.call("jobs:list_jobs", folder=connection.target.dir) == []
        sshd.cut()


def test_a_lost_server_is_retried(sshd: Server, connection: Connection) -> None:
    assert connection.call("jobs:list_jobs", folder=connection.target.dir) == []
    sshd.block()
    try:
        with pytest.raises(LostConnection, match="cannot be reached"):
            connection.call("jobs:list_jobs", folder=connection.target.dir, retry_s=0.3)
        back = threading.Timer(0.3, sshd.unblock)
        back.start()
        assert connection.call("jobs:list_jobs", folder=connection.target.dir) == []
        back.join()
    finally:
        sshd.unblock()


def test_a_silent_connection_is_replaced(sshd: Server, user: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "SILENCE_TIMEOUT_S", 0.5)
    with proxy(sshd.port) as between:
        target = RemoteTarget.from_env(user.environment | {"REMOTE_PORT": str(between.port)})
        user.known_hosts.write_text(sshd.known_hosts().replace(str(sshd.port), str(between.port)))
        with Connection(target) as connection:
            assert connection.call("jobs:list_jobs", folder=target.dir) == []
            between.lose()
            assert connection.call("jobs:list_jobs", folder=target.dir) == []
        assert between.count == 2


def test_an_unexpected_error_on_the_server_keeps_its_traceback(
    connection: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RemoteError, match=r"the agent failed on .*: TypeError"):
        connection.call("jobs:list_jobs", nothing=1)
    assert capsys.readouterr().err.startswith("Traceback (most recent call last)")


def test_an_agent_error_becomes_a_remote_error(connection: Connection) -> None:
    with pytest.raises(RemoteError, match="/dev/null is a file on the server") as refused:
        connection.call("apply_push:apply", folder="/dev/null", push={}, wanted={}, named=[])
    assert refused.value.hint == "REMOTE_DIR should be a folder"
