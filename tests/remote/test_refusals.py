"""Errors for invalid input and environments, one sentence each; lines that ssh ignores are ignored."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from src.errors import UserError
from src.remote.agent import bootstrap
from tests.remote.client import Client
from tests.remote.server import Server, make_key, needs_ssh
from tests.remote.test_shells import run

pytest_plugins = ["tests.remote.server", "tests.remote.client"]
pytestmark = needs_ssh


def python(version: str) -> str:
    """The path of an old Python."""
    name = f"python{version}"
    elsewhere = Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}")
    for program in filter(None, (shutil.which(name), *elsewhere)):
        printed = subprocess.run([program, "--version"], capture_output=True, text=True)
        if printed.returncode == 0 and f" {version}." in printed.stdout + printed.stderr:
            return str(program)
    pytest.skip(f"NO PYTHON {version} HERE: servers that have no newer one are NOT tested")


@pytest.mark.parametrize(
    ("words", "variables", "printed"),
    [
        (["ssh-tensorboard", "--port=²"], {}, "PORT=²: should be a number from 1 to 65535"),
        (["ssh-stop", "--grace=nan", "x"], {}, "GRACE=nan: should be a number of seconds"),
        (["ssh-stop", "--grace=-1", "x"], {}, "GRACE=-1: should be a number of seconds"),
        (["ssh-stop", ""], {}, "ssh-stop needs a run"),
        (["push", "--also"], {}, "--also needs a value: --also=..."),
        (["ssh-train", "--run", "x"], {}, "--run needs a value: --run=..."),
        (["ssh-status"], {"REMOTE_PORT": "²"}, "REMOTE_PORT=²: should be a number"),
        (["ssh-status"], {"REMOTE_HOST": "a..b"}, "the host name a..b cannot be resolved"),
        (
            ["ssh-status"],
            {"REMOTE_PYTHON": "/bin/ls"},
            "/bin/ls did not start on .*: .*; set REMOTE_PYTHON to the path of Python 3.8",
        ),
        (["ssh-status"], {"REMOTE_DIR": "~nobody-of-that-name/x"}, "user nobody-of-that-name does not exist"),
        (["push"], {"REMOTE_DIR": "x" * 300}, "file name too long"),
        (["push"], {"REMOTE_DIR": "x/" * 2500}, "file name too long"),
    ],
)
def test_invalid_input_is_refused_in_a_sentence(
    user: Client, monkeypatch: pytest.MonkeyPatch, words: list[str], variables: dict[str, str], printed: str
) -> None:
    with pytest.raises(UserError) as refused:
        user.run_in_process(monkeypatch, *words, **variables)
    assert re.search(printed, str(refused.value))


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7"])
def test_a_python_that_is_too_old_is_reported(user: Client, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    with pytest.raises(UserError, match=r"3\.8.*REMOTE_PYTHON|REMOTE_PYTHON.*3\.8"):
        user.run_in_process(monkeypatch, "ssh-status", REMOTE_PYTHON=python(version))


def test_the_oldest_supported_python_works(user: Client, recorded_args: Path) -> None:
    run(user.having(REMOTE_PYTHON=python(".".join(map(str, bootstrap.MIN_PYTHON)))), recorded_args)


def test_the_status_of_a_folder_without_runs(
    user: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert user.run_in_process(monkeypatch, "ssh-status", REMOTE_DIR="~/nothing") == 0
    assert capsys.readouterr().out.startswith("no runs in ~/nothing on ")


# known_hosts


def test_unknown_lines_of_known_hosts_are_skipped(
    sshd: Server, user: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = sshd.known_hosts()
    other = make_key(tmp_path / "other").with_suffix(".pub").read_text()
    user.known_hosts.write_bytes(
        b"\xff\xfe\n# a comment of four words\n" + f"@cert-authority * {other}a b c d\n  {mine}".encode()
    )
    assert user.run_in_process(monkeypatch, "ssh-status") == 0
    user.known_hosts.write_text(f"@revoked * {' '.join(mine.split()[1:])}\n{mine}")
    with pytest.raises(UserError, match="is not a known host"):
        user.run_in_process(monkeypatch, "ssh-status")


def test_a_key_is_accepted_even_if_it_cannot_be_written(
    sshd: Server, user: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    user.known_hosts.unlink()
    user.known_hosts.mkdir()
    assert user.run_in_process(monkeypatch, "ssh-status", REMOTE_FINGERPRINT=sshd.fingerprint) == 0
    user.configure("  UserKnownHostsFile none\n", first=True)
    assert user.run_in_process(monkeypatch, "ssh-status", REMOTE_FINGERPRINT=sshd.fingerprint) == 0
    assert not (user.project / "none").exists()
