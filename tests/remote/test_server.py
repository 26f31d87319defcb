"""The test server itself: a real sshd with isolated sessions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.remote.client import Client
from tests.remote.proxy import proxy
from tests.remote.server import BOOT_ID, Server, needs_own_mounts, needs_ssh, reused_pid, until

pytest_plugins = ["tests.remote.server", "tests.remote.client"]
pytestmark = needs_ssh


@pytest.fixture
def client(sshd: Server, tmp_path: Path) -> dict[str, str]:
    return sshd.client(tmp_path / "client", "~/assay")


def test_ssh_rsync_and_fabric_reach_the_server(sshd: Server, client: dict[str, str], tmp_path: Path) -> None:
    from fabric import Config, Connection

    assert sshd.ssh("echo $HOME", client).stdout.strip() == str(sshd.home)
    (tmp_path / "sent.txt").write_text("sent")
    by = f"ssh -F {client['REMOTE_SSH_CONFIG']} -p {sshd.port} -l {sshd.user}"
    subprocess.run(["rsync", "-e", by, str(tmp_path / "sent.txt"), f"{sshd.host}:got.txt"], check=True)
    plain = Config(overrides={"load_ssh_configs": False})
    with Connection(
        sshd.host, sshd.user, sshd.port, plain, connect_kwargs={"key_filename": str(sshd.key)}
    ) as fabric:
        fabric.client.load_host_keys(str(Path(client["REMOTE_SSH_CONFIG"]).with_name("known_hosts")))
        assert fabric.run("cat ~/got.txt", hide=True, in_stream=False).stdout == "sent"
        fabric.put(tmp_path / "sent.txt", str(sshd.home / "put.txt"))
    assert (sshd.home / "put.txt").read_text() == "sent"


@needs_own_mounts
def test_a_session_begins_in_its_home_with_its_own_tmp(sshd: Server, client: dict[str, str]) -> None:
    assert sshd.ssh("pwd; touch here /tmp/there", client).stdout.strip() == str(sshd.home)
    assert (sshd.home / "here").exists() and (sshd.tmp / "there").exists()
    assert not Path("/tmp/there").exists()
    assert sshd.ssh(f"{sys.executable} -c 'import torch.version'", client).returncode == 0


def test_a_session_has_no_variable_of_the_tests(
    sshd: Server, client: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANG", "xx_YY")  # SendEnv of ssh may forward it
    found = dict(line.partition("=")[::2] for line in sshd.ssh("env", client).stdout.splitlines())
    assert found["HOME"] == str(sshd.home) and "LANG" not in found and "PYTHONPATH" not in found


def test_a_session_may_have_other_variables(sshd: Server, client: dict[str, str]) -> None:
    with sshd.session(NAME="a b"):
        assert sshd.ssh("echo $NAME", client).stdout == "a b\n"
    assert sshd.ssh("echo $NAME", client).stdout == "\n"


def test_a_process_outlives_the_connection(sshd: Server, client: dict[str, str]) -> None:
    waiting = subprocess.Popen(
        ["ssh", "-F", client["REMOTE_SSH_CONFIG"], "-p", str(sshd.port), sshd.host, "echo up; exec sleep 1000"],
        stdout=subprocess.PIPE,
    )
    assert waiting.stdout and waiting.stdout.readline() == b"up\n"
    assert sshd.cut() >= 1
    assert waiting.wait(timeout=30) == 255
    until(lambda: [p.name() for p in sshd.started()] == ["sleep"])
    (left,) = sshd.started()
    sshd.block()
    assert sshd.ssh("true", client).returncode == 255
    assert sshd.started() == [left]
    sshd.unblock()
    assert sshd.ssh("true", client).returncode == 0
    sshd.kill_all()
    assert sshd.started() == []
    waiting.stdout.close()


@needs_own_mounts
def test_a_reboot_kills_all_processes_and_changes_the_boot_id(sshd: Server, client: dict[str, str]) -> None:
    before = sshd.ssh(f"cat {BOOT_ID}; setsid sleep 1000 >/dev/null 2>&1 </dev/null & ", client).stdout
    until(lambda: [p.name() for p in sshd.started()] == ["sleep"])
    sshd.reboot()
    assert sshd.started() == []
    assert {before, sshd.ssh(f"cat {BOOT_ID}", client).stdout} & {"", BOOT_ID.read_text()} == set()
    assert before != sshd.ssh(f"cat {BOOT_ID}", client).stdout


def test_a_process_id_is_reused() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with reused_pid(gone.pid) as pid:
        os.kill(pid, 0)


def test_the_proxy_disturbs_the_network(sshd: Server, client: dict[str, str]) -> None:
    words = ["ssh", "-F", client["REMOTE_SSH_CONFIG"], "-o", "StrictHostKeyChecking=no", "-p"]
    with proxy(sshd.port) as between:
        there = [*words, str(between.port), sshd.host]
        assert subprocess.run([*there, "true"], capture_output=True).returncode == 0
        total = between.sent
        between.room = total // 2
        assert subprocess.run([*there, "true"], capture_output=True).returncode == 255
        assert (between.count, between.sent) == (2, total // 2)
        between.room = None
        between.silence()
        waiting = subprocess.Popen([*there, "echo heard"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=0.5)
        between.speak()
        assert waiting.communicate(timeout=30)[0] == b"heard\n"


def test_a_project_on_the_server_runs_without_an_installation(sshd: Server, remote_project: Path) -> None:
    done = sshd.ssh(f"cd {remote_project} && .venv/bin/python -m src.main version", sshd.client(sshd.folder, ""))
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout and done.stdout.endswith(f"Python {sys.version.split()[0]}\n")


def test_a_client_is_a_clean_repository(user: Client) -> None:
    git = ["git", "-C", str(user.project), "status", "--porcelain"]
    assert subprocess.run(git, check=True, capture_output=True).stdout == b""
    done = user("version", PATH="/nowhere")
    assert (done.returncode, done.stderr) == (0, "")
