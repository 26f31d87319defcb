"""A user of the server: a project in a clean git repository, an environment, and the commands that they run.

`user` is such a client. Its project folder is shared by all tests: a test that changes it uses `user.copy()`.
`remote_project` is a folder on the server with the code and an environment to run it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from src.remote import commands
from src.remote.connection import Connection
from src.remote.target import RemoteTarget
from src.stages import STAGES
from tests.remote.server import ROOT, Server

CODE = ("src", "configs", "scripts")
FILES = (".gitignore", "Makefile", "pyproject.toml")
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "init.defaultBranch=main")
PATIENCE = 300  # seconds, until a command is killed

# Replaces the server's Python: records its arguments and the hashes of its environment variables.
PYTHON = f"""#!{sys.executable}
import hashlib, json, os, sys, time
have = {{name: hashlib.sha256(os.fsencode(value)).hexdigest() for name, value in os.environ.items()}}
with open("args.json", "w") as file:
    json.dump({{"words": sys.argv[1:], "have": have, "cwd": os.getcwd(), "pid": os.getpid()}}, file)
while os.path.exists("wait"):
    time.sleep(0.01)
"""


@dataclass(frozen=True)
class Client:
    """The commands of one user. `environment` is all that they have, except for PATH."""

    project: Path
    environment: dict[str, str]

    def start(self, *words: str, to: Path | None = None, **variables: str) -> subprocess.Popen[bytes]:
        """Start `python -m src.main WORDS` in the project; its output goes to `to`.out and .err."""
        streams = [to.with_suffix(end).open("wb") if to else subprocess.PIPE for end in (".out", ".err")]
        process = subprocess.Popen(
            [sys.executable, "-m", "src.main", *words],
            cwd=self.project,
            env={
                "PATH": os.environ["PATH"],
                "LANG": "C.UTF-8",
                "ASSAY_PROGRAM": "make",
                **self.environment,
                **variables,
            },
            stdin=subprocess.DEVNULL,
            stdout=streams[0],
            stderr=streams[1],
        )
        for stream in streams:
            if not isinstance(stream, int):
                stream.close()
        return process

    def __call__(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        process = self.start(*words, **variables)
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(words, process.returncode, out.decode(), err.decode())

    def run_in_process(self, monkeypatch: pytest.MonkeyPatch, *words: str, **variables: str) -> int:
        """Run it in this process, which is faster."""
        monkeypatch.chdir(self.project)
        for name, value in {**self.environment, **variables}.items():
            monkeypatch.setenv(name, value)
        return commands.run(words[0], words[1:], list(STAGES))

    def refused(self, *words: str, **variables: str) -> str:
        """The error of a command that must be refused: exit code 2, no traceback."""
        done = self(*words, **variables)
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr.strip()

    @property
    def known_hosts(self) -> Path:
        return Path(self.environment["REMOTE_SSH_CONFIG"]).with_name("known_hosts")

    def configure(self, text: str, first: bool = False) -> None:
        """Add to ssh's configuration; the `first` value of a keyword applies."""
        config = Path(self.environment["REMOTE_SSH_CONFIG"])
        config.write_text(text + config.read_text() if first else config.read_text() + text)

    def copy(self, project: Path) -> Client:
        shutil.copytree(self.project, project, symlinks=True)
        return replace(self, project=project)

    def having(self, **variables: str) -> Client:
        return replace(self, environment=self.environment | variables)


def copy_code(project: Path) -> Path:
    """A copy of the current code."""
    for name in CODE:
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*map(ROOT.joinpath, FILES), *ROOT.glob("requirements*.txt")]:
        shutil.copy(file, project)
    return project


def borrow_environment(project: Path) -> None:
    """A `.venv` with links to this Python's environment, to which files can be added."""
    (project / ".venv").mkdir(parents=True)
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith("."):
            (project / ".venv" / part.name).symlink_to(part)


@pytest.fixture(scope="session")
def local_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one commit, which tests must not change."""
    project = copy_code(tmp_path_factory.mktemp("project"))
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "the first"]):
        subprocess.run([*GIT, *words], cwd=project, check=True)
    return project


@pytest.fixture(scope="session")
def _remote_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_code(tmp_path_factory.mktemp("pushed"))


@pytest.fixture
def remote_project(_remote_project: Path, sshd: Server, tmp_path: Path) -> Path:
    """A folder for this test in the sessions' home, for REMOTE_DIR."""
    project = sshd.home / tmp_path.name
    shutil.copytree(_remote_project, project)
    borrow_environment(project)
    return project


@pytest.fixture
def user(sshd: Server, local_project: Path, remote_project: Path, tmp_path: Path) -> Client:
    """A user whose REMOTE_DIR is `remote_project`."""
    return Client(local_project, sshd.client(tmp_path / "person", str(remote_project)))


@pytest.fixture
def connection(user: Client) -> Iterator[Connection]:
    """That user's connection, in this process."""
    with Connection(RemoteTarget.from_env(user.environment)) as opened:
        yield opened


@pytest.fixture
def recorded_args(remote_project: Path) -> Path:
    """Where the Python of `remote_project` records its arguments; it ends once there is no file `wait`."""
    python = remote_project / ".venv" / "bin"
    python.unlink()
    python.mkdir()
    (python / "python").write_text(PYTHON)
    (python / "python").chmod(0o755)
    return remote_project / "args.json"
