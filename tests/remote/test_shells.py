"""Any login shell, locale, user, and path of Python on the server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.remote import jobs
from src.remote.connection import Connection
from src.remote.target import RemoteTarget
from tests.remote.client import Client
from tests.remote.server import GUEST_ID, GUEST_NAME, Server, needs_own_mounts, needs_ssh, until

pytest_plugins = ["tests.remote.server", "tests.remote.client"]
pytestmark = needs_ssh

NAME = "it's ünï & 漢字"
LATIN_1 = "en_US.ISO-8859-1"
STRANGE = "a b/it's $HOME \\ !x #1 (é) ~"


def run(user: Client, recorded_args: Path) -> None:
    """Push, start, follow: arguments with special characters of shells arrive as they were typed."""
    typed = ["lr=a b", "x='$HOME'", 'y="!!"', "z=\\n"]
    done = user("ssh-eval", *typed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(recorded_args.read_text())["words"] == ["-m", "src.main", "eval", *typed]


@pytest.fixture
def strange_python(sshd: Server) -> Iterator[Path]:
    """This Python, at a path with special characters of every shell."""
    python = sshd.home / STRANGE / "python3"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    yield python
    shutil.rmtree(sshd.home / STRANGE.split("/")[0])


@needs_own_mounts
@pytest.mark.parametrize("name", ["tcsh", "fish", "zsh"])
def test_the_login_shell_may_be_any(
    sshd: Server, user: Client, recorded_args: Path, strange_python: Path, name: str
) -> None:
    shell = shutil.which(name)
    if not shell:
        pytest.skip(f"NO {name} HERE: it is NOT tested as a login shell")
    with sshd.login_shell(shell):
        assert shell in sshd.ssh("echo $SHELL", user.environment).stdout
        run(user.having(REMOTE_PYTHON=str(strange_python)), recorded_args)


def test_the_path_of_python_may_have_any_characters(
    user: Client, recorded_args: Path, strange_python: Path
) -> None:
    run(user.having(REMOTE_PYTHON=f"~/{STRANGE}/{strange_python.name}"), recorded_args)


def test_the_folder_may_have_any_name_in_a_latin_1_locale(
    sshd: Server, user: Client, recorded_args: Path, tmp_path: Path
) -> None:
    words = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / LATIN_1)]
    if not shutil.which("localedef") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("NO LOCALE OF LATIN-1 CAN BE MADE HERE: sessions in one are NOT tested")
    folder = sshd.home / recorded_args.parent.name / NAME
    shutil.move(recorded_args.parent, sshd.home / "moved")
    folder.parent.mkdir()
    shutil.move(sshd.home / "moved", folder)
    before = sshd.outside(folder)
    user = user.having(REMOTE_DIR=f"~/{folder.parent.name}/{NAME}")
    with sshd.session(LOCPATH=str(tmp_path), LC_ALL=LATIN_1):
        run(user, folder / "args.json")
        assert user("ssh-status").stdout.count("finished") == 1
    assert sshd.outside(folder) == before


WORK = """
trap "echo saved; exit 75" TERM
mkdir -p outputs/runs/r
echo '{"started": 1, "status": "interrupted"}' > outputs/runs/r/manifest.json
echo "$PWD/outputs/runs/r" > "$ASSAY_RUN_FILE"
id -u
while :; do sleep 0.02; done
"""


@needs_own_mounts
def test_a_user_without_a_writable_home_pushes_starts_stops_and_fetches(
    sshd: Server,
    user: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = sshd.tmp / tmp_path.name
    guest = user.copy(tmp_path / "mine").having(REMOTE_USER=GUEST_NAME, REMOTE_DIR=f"/tmp/{place.name}")
    if sshd.ssh("python3 --version", guest.environment).returncode:
        pytest.skip("NO python3 FOR OTHERS THAN root HERE: other users are NOT tested")
    before = sshd.outside(place)
    guest.run_in_process(monkeypatch, "push")
    (place / ".venv/bin").mkdir(parents=True)
    (place / ".venv/bin/python").symlink_to("/bin/sh")
    with Connection(RemoteTarget.from_env(guest.environment)) as connection:
        job = jobs.start(connection, "train", [jobs.PYTHON, "-c", WORK], [], {}, None)
        until(lambda: jobs.find_job(connection, job["id"])["last_line"] == str(GUEST_ID))
    guest.run_in_process(monkeypatch, "ssh-stop", job["id"])
    assert "stopped, with a checkpoint" in capfd.readouterr().out
    guest.run_in_process(monkeypatch, "ssh-fetch", "r")
    assert (guest.project / "outputs/runs/r/manifest.json").is_file()
    assert sshd.outside(place) == before
