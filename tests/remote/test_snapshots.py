"""Snapshots of the code on the server: old ones are removed, unless a job runs or will run from them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from src.errors import Stopped
from src.remote.agent.snapshots import KEEP
from tests.remote.client import Client
from tests.remote.kill_points import KillPoints
from tests.remote.server import Server, needs_ssh, until
from tests.remote.test_start import python
from tests.slurm import Cluster, needs_slurm

pytest_plugins = ["tests.remote.server", "tests.remote.client", "tests.slurm"]
pytestmark = needs_ssh


class Snapshots:
    """The snapshots of a project on the server, and a user who pushes there."""

    def __init__(self, user: Client, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.user, self.code, self.monkeypatch = user, project / "outputs/remote/code", monkeypatch
        self.jobs = project / "outputs/remote/jobs"

    def age(self) -> Path:
        """Make the existing snapshot the oldest of more than are kept. Returns: its folder."""
        (first,) = self.code.iterdir()
        for n in range(KEEP + 1):
            shutil.copytree(first, self.code / f"newer-{n}")
            os.utime(self.code / f"newer-{n}", (n + 1, n + 1))
        os.utime(first, (0, 0))
        return first

    def pushed(self) -> set[str]:
        """The names that are left after a push."""
        self.user.run_in_process(self.monkeypatch, "push")
        return self.left()

    def evaluated(self) -> set[str]:
        """The names that are left after a start, and the push before it."""
        assert self.user.run_in_process(self.monkeypatch, "ssh-eval") == 0
        return self.left()

    def left(self) -> set[str]:
        return {path.name for path in self.code.iterdir()}


NEWEST = {f"newer-{n + 1}" for n in range(KEEP)}


@pytest.fixture
def snapshots(user: Client, recorded_args: Path, monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    return Snapshots(user, recorded_args.parent, monkeypatch)


def test_a_snapshot_in_use_is_kept_and_removed_afterwards(
    snapshots: Snapshots, user: Client, recorded_args: Path
) -> None:
    (recorded_args.parent / "wait").touch()
    user.run_in_process(snapshots.monkeypatch, "ssh-eval", "--detach", "--run=it")
    until(recorded_args.exists)
    first = snapshots.age()
    (snapshots.code / "of-a-killed-one.tmp").mkdir()
    assert snapshots.pushed() == {*NEWEST, first.name}
    supervisor = psutil.Process(json.loads((snapshots.jobs / "it/job.json").read_text())["pid"]).parent()
    assert supervisor is not None
    supervisor.kill()  # it held the lock; the record still has the running process
    supervisor.wait()
    assert snapshots.pushed() == {*NEWEST, first.name}
    (recorded_args.parent / "wait").unlink()
    with suppress(Stopped):  # no supervisor is left to record its end
        user.run_in_process(snapshots.monkeypatch, "ssh-attach", "it")
    run = recorded_args.parent / "outputs/runs/r"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text('{"status": "interrupted"}')
    (snapshots.jobs / "it/run").write_text(f"{run}\n")
    assert snapshots.pushed() == {*NEWEST, first.name}
    (run / "manifest.json").write_text('{"status": "finished"}')
    assert snapshots.pushed() == NEWEST


def test_a_snapshot_locked_by_a_supervisor_without_record_is_kept(
    sshd: Server, snapshots: Snapshots, user: Client, recorded_args: Path, tmp_path: Path
) -> None:
    kill_points = KillPoints(tmp_path, recorded_args.parent)
    with sshd.session(**kill_points.variables("supervisor", 1, "wait")):
        starting = user.start("ssh-eval", "--detach", "--run=it", to=tmp_path / "printed")
        until(kill_points.reached.exists)
        slow = next(p for p in sshd.started() if python(p) and python(p.parent()))
        starter = slow.parent()
        assert starter is not None
        starting.kill()
        starter.kill()
        starting.wait()
    first = snapshots.age()
    assert not (snapshots.jobs / "it/job.json").exists()
    assert snapshots.pushed() == {*NEWEST, first.name}
    kill_points.release.touch()
    until((snapshots.jobs / "it/exit.json").exists)
    assert json.loads((snapshots.jobs / "it/exit.json").read_text())["code"] == 0 and recorded_args.exists()
    until(lambda: not slow.is_running() or slow.status() == psutil.STATUS_ZOMBIE)
    assert snapshots.pushed() == NEWEST


def test_a_start_removes_old_snapshots_and_marks_its_own_as_used(snapshots: Snapshots) -> None:
    snapshots.evaluated()
    first = snapshots.age()
    assert snapshots.evaluated() == {*sorted(NEWEST)[1:], first.name}
    os.utime(first, (3.5, 3.5))  # between the others
    snapshots.evaluated()
    assert first.stat().st_mtime > 10


def test_files_removed_from_a_snapshot_are_copied_again(snapshots: Snapshots) -> None:
    (name,) = snapshots.evaluated()
    first = snapshots.code / name
    complete = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    (first / "src/main.py").unlink()
    (first / "src/code.json").unlink()
    shutil.rmtree(first / "configs")
    snapshots.evaluated()
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == complete


@pytest.mark.slurm
@needs_slurm[1]
def test_a_snapshot_is_kept_while_its_job_waits_in_slurm_or_squeue_fails(
    sshd: Server, cluster: Cluster, snapshots: Snapshots, user: Client
) -> None:
    user.run_in_process(snapshots.monkeypatch, "ssh-eval", "--run=it")
    first = snapshots.age()
    environment = os.environ | cluster.environment
    words = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"]
    id = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    (snapshots.jobs / "it/slurm.json").write_text(json.dumps({"ids": [f"{id}_0"]}))
    with sshd.session(**cluster.environment):
        assert snapshots.pushed() == {*NEWEST, first.name}
    subprocess.run(["scancel", id], env=environment, check=True)
    with sshd.session(SLURM_CONF="/dev/null"):
        assert snapshots.pushed() == {*NEWEST, first.name}
    with sshd.session(**cluster.environment):
        assert snapshots.pushed() == NEWEST
