"""A real training run on a server survives lost connections, its client and a reboot, with the same result."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from src.train.checkpoint import COMPLETE
from tests.fixtures import World
from tests.remote.client import Client
from tests.remote.server import Server, needs_own_mounts, needs_ssh, reused_pid, until

pytest_plugins = ["tests.fixtures", "tests.remote.server", "tests.remote.client"]
pytestmark = needs_ssh

CUTS = 20
PATIENCE = 300  # seconds
LONG = ("epochs=240", "save_steps=20")  # long enough to be interrupted; later words override earlier ones
ONE_THREAD = {"OMP_NUM_THREADS": "1", "REMOTE_ENV": "OMP_NUM_THREADS"}


def words(world: World) -> list[str]:
    """The settings of the tiny training run, with the default folders."""
    return [w for w in world.settings("train") if not w.startswith(("output_dir=", "artifacts_dir="))] + [*LONG]


def adapter(run: Path) -> bytes:
    return (run / "model" / "adapter_model.safetensors").read_bytes()


@dataclass(frozen=True)
class Remote:
    """What is in REMOTE_DIR."""

    project: Path

    def one(self, below: str) -> Path:
        (found,) = [p for p in (self.project / "outputs" / below).iterdir() if not p.is_symlink()]
        return found

    @property
    def job(self) -> Path:
        return self.one("remote/jobs")

    @property
    def run(self) -> Path:
        return self.one("runs")

    def checkpoints(self) -> list[Path]:
        return list((self.project / "outputs" / "runs").glob(f"*/checkpoints/*/{COMPLETE}"))


@pytest.fixture
def remote(remote_project: Path) -> Remote:
    return Remote(remote_project)


@pytest.fixture(scope="session")
def here(_tiny_world: World, local_project: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of the same training run on this machine, with the same interpreter and code."""
    output = tmp_path_factory.mktemp("here")
    done = Client(local_project, {"HOME": str(output), **ONE_THREAD})(
        "train", *words(_tiny_world), f"output_dir={output}"
    )
    assert done.returncode == 0, done.stderr
    return adapter((output / "runs" / "latest").resolve())


def test_a_connection_cut_twenty_times_loses_nothing_and_doubles_nothing(
    sshd: Server, user: Client, remote: Remote, world: World, here: bytes, tmp_path: Path
) -> None:
    printed, outside = tmp_path / "printed", sshd.outside(remote.project)
    followed = user.start("ssh-train", *words(world), to=printed, **ONE_THREAD)
    try:
        until(lambda: b" started on " in printed.with_suffix(".out").read_bytes())
        for n in range(1, CUTS + 1):
            if n > CUTS // 2:  # half of them during frequent output
                until(lambda: b"step 2/" in (remote.job / "log").read_bytes(), PATIENCE)
            if n % 2:
                assert sshd.cut()
            else:
                sshd.block()
                until(lambda n=n: printed.with_suffix(".err").read_text().count("was lost") == n)
                sshd.unblock()
            until(lambda n=n: printed.with_suffix(".err").read_text().count("reconnected to") == n)
        assert not (remote.job / "exit.json").exists(), "the run was too short for so many cuts"
        assert followed.wait(timeout=PATIENCE) == 0
    finally:
        sshd.unblock()
        followed.kill()
        followed.wait()
    out, log = printed.with_suffix(".out").read_bytes(), (remote.job / "log").read_bytes()
    before, shown, after = out.partition(log)
    assert shown and re.fullmatch(rb"run \S+ started on .*", before.splitlines()[-1])
    assert re.fullmatch(rb"next: .* ssh-fetch .*\n", after)
    assert json.loads((remote.job / "exit.json").read_text())["code"] == 0
    assert remote.run.name == remote.job.name
    assert adapter(remote.run) == here
    assert sshd.outside(remote.project) == outside
    assert printed.with_suffix(".err").read_text().splitlines()[-1].startswith(f"run {remote.run.name}: finished")


@needs_own_mounts
def test_a_run_outlives_its_client_and_resumes_after_a_reboot(
    sshd: Server, user: Client, remote: Remote, world: World, here: bytes, tmp_path: Path
) -> None:
    printed = tmp_path / "printed"
    starting = user.start("ssh-train", *words(world), to=printed, **ONE_THREAD)
    until(lambda: b" started on " in printed.with_suffix(".out").read_bytes())
    starting.send_signal(signal.SIGKILL)
    starting.wait()
    (id,) = re.findall(r"run (\S+) started", printed.with_suffix(".out").read_text())
    assert re.search(rf"{id} +train +running", user("ssh-status").stdout)
    until(remote.checkpoints)
    record = json.loads((remote.job / "job.json").read_text())
    sshd.reboot()
    assert not (remote.job / "exit.json").exists(), "the run was too short"
    with reused_pid(record["pid"]):
        assert re.search(rf"{id} +train +interrupted", user("ssh-status").stdout)
        done = user("ssh-attach", id)
        assert done.returncode == 75 and f"make ssh-train resume={id}" in done.stderr
        done = user("ssh-train", *words(world), f"resume={id}", **ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert "resuming after" in done.stdout
    assert remote.run.name == id
    assert adapter(remote.run) == here
    again = [p.name for p in (remote.project / "outputs/remote/jobs").iterdir()]
    assert len(again) == 2 and id in again
