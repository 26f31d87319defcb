"""launch=slurm on a server: the login node of a real Slurm, reached through a real sshd."""

from __future__ import annotations

import json
import re
from pathlib import Path

from src import runs
from tests.fixtures import World
from tests.remote.client import Client
from tests.remote.server import Server, needs_ssh
from tests.slurm import Cluster, needs_slurm, wait_for

pytest_plugins = ["tests.fixtures", "tests.slurm", "tests.remote.server", "tests.remote.client"]
pytestmark = [*needs_ssh, *needs_slurm]

SLURM = ("launch=slurm", "partition=debug", "timeout_min=9", "cpus_per_task=1")


def words_of(world: World, *more: str) -> list[str]:
    """A training run in the server's folder."""
    return [w for w in world.settings("train") if not w.startswith(("output_dir=", "artifacts_dir="))] + list(more)


def slurm_ids(project: Path, id: str) -> list[str]:
    file = project / "outputs" / "remote" / "jobs" / id / "slurm.json"
    return list(json.loads(file.read_text())["ids"]) if file.exists() else []


def test_a_training_run_is_submitted_on_the_login_node_and_followed(
    sshd: Server, cluster: Cluster, user: Client, remote_project: Path, world: World
) -> None:
    with sshd.session(**cluster.environment):
        done = user("ssh-train", *words_of(world, "max_steps=2"), *SLURM)
    assert done.returncode == 0, done.stdout + done.stderr
    id = re.findall(r"run (\S+) started", done.stdout)[0]
    (job,) = slurm_ids(remote_project, id)
    assert f"slurm job {job}" in done.stdout and "step 2/2" in done.stdout
    (run,) = runs.training_runs(remote_project / "outputs")
    assert run.status == runs.FINISHED
    assert run.id == id and run.manifest["process"]["slurm"]["job"] == job
    assert cluster.state(job) == "COMPLETED"


def test_stopping_makes_the_slurm_job_save_a_checkpoint(
    sshd: Server, cluster: Cluster, user: Client, remote_project: Path, world: World
) -> None:
    with sshd.session(**cluster.environment):
        begun = user("ssh-train", *words_of(world, "epochs=1000"), *SLURM, "--detach")
        id = re.findall(r"run (\S+) started", begun.stdout)[0]
        wait_for(lambda: "step " in user("ssh-logs", id).stdout)
        (job,) = slurm_ids(remote_project, id)
        stopped = user("ssh-stop", id)
        assert f"run {id}: stopped, with a checkpoint" in stopped.stdout, stopped.stdout + stopped.stderr
    wait_for(lambda: cluster.state(job) not in {"RUNNING", "PENDING", "COMPLETING"})
    (run,) = runs.training_runs(remote_project / "outputs")
    assert run.status == runs.INTERRUPTED
    assert [folder for folder in run.checkpoints.iterdir() if (folder / "COMPLETE").exists()]
