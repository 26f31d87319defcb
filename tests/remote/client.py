"""Whoever uses the server: a project in a clean git repository, an environment, and the commands typed there.

`user` is such a client, whose project folder is the session's: a test that changes it takes `user.copy()`.
`remote_project` is a folder on the server that is ready: the code is there, and an environment to run it.
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

CODE = ("src", "configs", "hydra_plugins", "scripts")
FILES = (".gitignore", "Makefile", "pyproject.toml")
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "init.defaultBranch=main")
PATIENCE = 300  # seconds until a command that does not end is given up

# Takes the place of the Python there: writes down what it was told, and what it has of the environment.
PYTHON = f"""#!{sys.executable}
import hashlib, json, os, sys, time
have = {{name: hashlib.sha256(os.fsencode(value)).hexdigest() for name, value in os.environ.items()}}
with open("told.json", "w") as file:
    json.dump({{"words": sys.argv[1:], "have": have, "cwd": os.getcwd(), "pid": os.getpid()}}, file)
while os.path.exists("wait"):
    time.sleep(0.01)
"""


@dataclass(frozen=True)
class Client:
    """The commands of one person. `environment` is all that they find, besides PATH."""

    project: Path
    environment: dict[str, str]

    def start(self, *words: str, to: Path | None = None, **variables: str) -> subprocess.Popen[bytes]:
        """Start `python -m src.main WORDS` in the project; what it says goes to `to`.out and .err."""
        streams = [to.with_suffix(end).open("wb") if to else subprocess.PIPE for end in (".out", ".err")]
        process = subprocess.Popen(
            [sys.executable, "-m", "src.main", *words],
            cwd=self.project,
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **self.environment, **variables},
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

    def typed_here(self, monkeypatch: pytest.MonkeyPatch, *words: str, **variables: str) -> int:
        """Run it in this process, which is quicker."""
        monkeypatch.chdir(self.project)
        for name, value in {**self.environment, **variables}.items():
            monkeypatch.setenv(name, value)
        return commands.run(words[0], words[1:], list(STAGES))

    def refused(self, *words: str, **variables: str) -> str:
        """What a command says that is refused, as every one should be: exit code 2, and no traceback."""
        done = self(*words, **variables)
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr.strip()

    @property
    def known_hosts(self) -> Path:
        return Path(self.environment["REMOTE_SSH_CONFIG"]).with_name("known_hosts")

    def configure(self, text: str, first: bool = False) -> None:
        """Add to ssh's configuration; what stands `first` in it wins."""
        config = Path(self.environment["REMOTE_SSH_CONFIG"])
        config.write_text(text + config.read_text() if first else config.read_text() + text)

    def copy(self, project: Path) -> Client:
        shutil.copytree(self.project, project, symlinks=True)
        return replace(self, project=project)

    def having(self, **variables: str) -> Client:
        return replace(self, environment=self.environment | variables)


def copy_code(project: Path) -> Path:
    """The code as it is now, in a folder of its own."""
    for name in CODE:
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*map(ROOT.joinpath, FILES), *ROOT.glob("requirements*.txt")]:
        shutil.copy(file, project)
    return project


def borrow_environment(project: Path) -> None:
    """A `.venv` that is this Python's, and that can have files of its own at its top."""
    (project / ".venv").mkdir(parents=True)
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith("."):
            (project / ".venv" / part.name).symlink_to(part)


@pytest.fixture(scope="session")
def local_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one commit. To be read only."""
    project = copy_code(tmp_path_factory.mktemp("project"))
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "the first"]):
        subprocess.run([*GIT, *words], cwd=project, check=True)
    return project


@pytest.fixture(scope="session")
def _remote_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_code(tmp_path_factory.mktemp("pushed"))


@pytest.fixture
def remote_project(_remote_project: Path, sshd: Server, tmp_path: Path) -> Path:
    """A folder of the test's own in the sessions' home, to be named by REMOTE_DIR."""
    project = sshd.home / tmp_path.name
    shutil.copytree(_remote_project, project)
    borrow_environment(project)
    return project


@pytest.fixture
def user(sshd: Server, local_project: Path, remote_project: Path, tmp_path: Path) -> Client:
    """Somebody whose REMOTE_DIR is `remote_project`."""
    return Client(local_project, sshd.client(tmp_path / "person", str(remote_project)))


@pytest.fixture
def connection(user: Client) -> Iterator[Connection]:
    """That person's connection, in this process."""
    with Connection(RemoteTarget.from_env(user.environment)) as opened:
        yield opened


@pytest.fixture
def noted(remote_project: Path) -> Path:
    """Where the Python of `remote_project` writes down what it is told; it ends once there is no file `wait`."""
    python = remote_project / ".venv" / "bin"
    python.unlink()
    python.mkdir()
    (python / "python").write_text(PYTHON)
    (python / "python").chmod(0o755)
    return remote_project / "told.json"
