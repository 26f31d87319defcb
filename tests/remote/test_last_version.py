"""What the previous version has written on a server and on the client is still read.

last_version.json has the files by path. The previous version's own code made them: a push with ALSO, `ssh-init`,
jobs that ended in each way, one whose process was killed, one that was running, and a fetch. `{root}`, `{host}`
and `{boot_id}` stand for REMOTE_DIR, the host name and the boot id.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.errors import RemoteError
from src.remote import fetch, jobs, status_table
from src.remote import push as pushing
from src.remote.agent import jobs as agent_jobs
from src.remote.agent import venv
from src.remote.connection import Connection
from src.remote.target import RemoteTarget
from tests.fixtures import tree
from tests.remote.client import GIT
from tests.remote.server import BOOT_ID, OWN_MOUNTS, Server, needs_ssh, until

pytest_plugins = ["tests.remote.server"]
pytestmark = needs_ssh

FILES = json.loads(Path(__file__).with_name("last_version.json").read_text())
DAY = "2026-11-01"
FINISHED, RUNNING = f"{DAY}_10-00-00-aaaa", f"{DAY}_14-00-00-eeee"
STATUSES = {
    f"{DAY}_09-00-00-0000": "finished",
    FINISHED: "finished",
    f"{DAY}_11-00-00-bbbb": "stopped, with a checkpoint",
    f"{DAY}_12-00-00-cccc": "invalid input",
    f"{DAY}_13-00-00-dddd": "interrupted",
    RUNNING: "running",
    f"{DAY}_15-00-00-ffff": "finished",
}
# As agent/start.py of the previous version: the job leads a session, and its supervisor waits to write exit.json.
SUPERVISOR = """
import json, os, subprocess, sys, time
folder, script = sys.argv[1:]
with open(folder + "/log", "ab") as log:
    child = subprocess.Popen(["/bin/sh", "-c", script], stdout=log, stderr=log, start_new_session=True)
print(child.pid, flush=True)
code = child.wait()
with open(folder + "/exit.json.tmp", "w") as file:
    json.dump({"code": code, "ended": time.time()}, file)
os.replace(folder + "/exit.json.tmp", folder + "/exit.json")
"""
SCRIPT = 'trap "echo saved; exit 75" TERM; echo step 2; while :; do sleep 0.02; done'


def write(folder: Path, files: dict[str, str], root: Path) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("{root}", str(root)).replace("{host}", socket.gethostname()))


@pytest.fixture
def root(sshd: Server, tmp_path: Path) -> Iterator[Path]:
    """REMOTE_DIR as the previous version left it, with one job still running."""
    folder = sshd.home / tmp_path.name
    write(folder, FILES["server"], folder)
    (folder / ".venv/bin").mkdir()
    (folder / ".venv/bin/python").symlink_to("/bin/sh")
    boot_id = sshd.boot_id if OWN_MOUNTS else BOOT_ID
    for path in folder.glob("outputs/remote/jobs/*/job.json"):
        path.write_text(path.read_text().replace("{boot_id}", boot_id.read_text().strip()))
    place = folder / "outputs/remote/jobs" / RUNNING
    record = json.loads((place / "job.json").read_text())
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, place, SCRIPT], stdout=subprocess.PIPE)
    assert supervisor.stdout
    pid = int(supervisor.stdout.readline())
    record |= {"pid": pid, "ticks": agent_jobs.start_ticks(pid)}
    record["supervisor"] = [supervisor.pid, agent_jobs.start_ticks(supervisor.pid)]
    (place / "job.json").write_text(json.dumps(record))
    yield folder
    if supervisor.poll() is None:
        os.kill(pid, signal.SIGKILL)
    supervisor.communicate()


@pytest.fixture
def project(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client's folder as the previous version left it."""
    folder = tmp_path / "project"
    write(folder, {f"outputs/{name}": text for name, text in FILES["client"].items()}, root)
    code = {name: text for name, text in FILES["server"].items() if not name.startswith((".venv/", "outputs/"))}
    write(folder, code, root)
    subprocess.run([*GIT, "init", "-q"], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def connection(sshd: Server, root: Path, tmp_path: Path) -> Iterator[Connection]:
    with Connection(RemoteTarget.from_env(sshd.client(tmp_path / "person", f"~/{root.name}"))) as opened:
        yield opened


def test_its_jobs_are_listed_with_their_states(connection: Connection, capsys: pytest.CaptureFixture[str]) -> None:
    found = jobs.list_jobs(connection)
    assert {job["id"]: jobs.format_status(job) for job in found} == STATUSES
    status_table.print_table(found, "server", "~/assay")
    assert "trained" in capsys.readouterr().out


def test_its_running_job_is_followed_and_stopped(
    connection: Connection, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    until(lambda: jobs.find_job(connection, RUNNING)["last_line"] == "step 2")
    job = jobs.follow(connection, RUNNING, wait=False)
    assert job["status"] == "running" and capfd.readouterr().out == "step 1\nstep 2\n"
    with pytest.raises(RemoteError, match=f"run {RUNNING} is still running"):
        fetch.fetch(connection, job)
    ended = jobs.stop(connection, jobs.find_job(connection, None, running=True))
    assert (ended["id"], jobs.format_status(ended)) == (RUNNING, "stopped, with a checkpoint")
    assert capfd.readouterr().out == "saved\n"
    with pytest.raises(RemoteError, match="is not running"):
        jobs.stop(connection, ended)


def test_a_start_with_the_id_of_its_job_starts_nothing(connection: Connection) -> None:
    again = jobs.start(connection, "train", [jobs.PYTHON, "-c", "echo 2"], ["lr=1"], {}, None, FINISHED)
    assert again["existed"] and again["code"] == 0


def test_its_runs_are_fetched(connection: Connection, root: Path, project: Path) -> None:
    before = tree(project / "outputs/runs" / FINISHED)
    ours = fetch.fetch(connection, jobs.find_run(connection, FINISHED))
    kept = tree(ours)
    assert {p: d for p, d in kept.items() if p not in {"fetched.json", ".lock"}} == {
        p: d for p, d in before.items() if p != "fetched.json"
    }
    proof: dict[str, Any] = json.loads(kept["fetched.json"])
    old = json.loads(before["fetched.json"])
    assert {**proof, "fetched": None, "from": None} == {**old, "fetched": None, "from": None}
    assert not (project / "outputs/replaced").exists()  # the earlier fetch brought these files
    (root / "outputs/runs" / FINISHED / "model/weights").write_text("better\n")
    fetch.fetch(connection, jobs.find_run(connection, FINISHED))
    assert (ours / "model/weights").read_text() == "better\n" and not (project / "outputs/replaced").exists()
    died = fetch.fetch(connection, jobs.find_run(connection, f"{DAY}_13"))
    assert json.loads((died / "manifest.json").read_text())["status"] == "interrupted"


def test_a_push_replaces_what_its_pushes_put_there(
    connection: Connection, root: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(project / "src/remote")
    shutil.rmtree(project / "models")
    (project / "src/changed.py").write_text("after\n")
    code = pushing.push(connection)
    shown = capsys.readouterr()
    assert "1 changed, 1 removed" in shown.out and shown.err == ""  # nothing had to be backed up
    assert (root / "src/changed.py").read_text() == "after\n" and not (root / "src/remote").exists()
    assert (root / "models/m/weights").read_text() == "weights\n"  # from ALSO
    (snapshot,) = (root / "outputs/remote/code").iterdir()
    assert snapshot.name == jobs.find_job(connection, RUNNING)["snapshot"] != code["digest"]


def test_the_snapshot_of_its_running_job_is_kept(connection: Connection, root: Path, project: Path) -> None:
    (snapshot,) = (root / "outputs/remote/code").iterdir()
    for n in range(6):
        shutil.copytree(snapshot, snapshot.with_name(f"newer-{n}"))
    os.utime(snapshot, (0, 0))
    pushing.push(connection)
    assert snapshot.exists() and len(list(snapshot.parent.iterdir())) == 6
    jobs.stop(connection, jobs.find_job(connection, RUNNING))
    manifest = root / "outputs/runs" / RUNNING / "manifest.json"
    for path in (manifest, manifest.parents[1] / f"{DAY}_13-00-00-dddd/manifest.json"):
        path.write_text(path.read_text().replace('"running"', '"finished"'))
    (root / f"outputs/remote/jobs/{DAY}_15-00-00-ffff/slurm.json").unlink()
    (project / "README.md").write_text("changed\n")
    pushing.push(connection)
    assert not snapshot.exists()


def test_its_environment_is_complete(root: Path) -> None:
    assert venv.missing(str(root), "cpu") == []
    venv.check(str(root))
