"""Fetching a run: complete or not at all, verified, and without losing local files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src import runs
from src.errors import RemoteError, RunError
from src.remote import fetch as fetching
from src.remote import jobs, transfer
from src.remote.connection import Connection
from tests.fixtures import tree
from tests.remote.proxy import Proxy
from tests.remote.server import Server, needs_own_mounts, needs_ssh
from tests.remote.sync import environment_of

pytest_plugins = ["tests.remote.server", "tests.remote.sync"]
pytestmark = needs_ssh

ID = "2026-01-02_03-04-05"
MANIFEST: dict[str, Any] = {
    "run": ID,
    "stage": "train",
    "status": "finished",
    "started": "2026-01-02T03:04:05+00:00",
    "process": {"pid": 1 << 30, "created": 1.0, "host": "server", "boot_id": None},
}
NAMES = ["a b.txt", "ünïcödé 漢字.txt", "two\nlines", "-rf", "it's", 'quo"te', "$HOME", "*", "#x"]


@pytest.fixture
def local_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my project").mkdir()
    monkeypatch.chdir(tmp_path / "my project")
    return tmp_path / "my project"


@pytest.fixture
def server_dir(sshd: Server, tmp_path: Path) -> Path:
    """REMOTE_DIR, where a job's python is a shell."""
    folder = sshd.home / f"{tmp_path.name} ünd more"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to("/bin/sh")
    return folder


@pytest.fixture
def run(server_dir: Path) -> Path:
    """A run directory on the server that no job made."""
    run = server_dir / "outputs/runs" / ID
    for name in ("logs", "model", "checkpoints/empty"):
        (run / name).mkdir(parents=True)
    manifest(run)
    (run / "model/weights").write_bytes(os.urandom(3_000_000))
    (run / "logs/run.log").write_text("log")
    (run / "nothing").touch()
    return run


def manifest(run: Path, **changes: Any) -> None:
    (run / "manifest.json").write_text(json.dumps(MANIFEST | changes))


def fetch(connection: Connection, word: str = ID) -> Path:
    return fetching.fetch(connection, jobs.find_run(connection, word))


def content(run: Path) -> dict[str, bytes]:
    return {path: data for path, data in tree(run).items() if path not in {"fetched.json", ".lock"}}


def until(true: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


# Content


def test_a_run_arrives_complete_with_its_proof_and_is_the_latest(
    sync_connection: Connection, local_dir: Path, run: Path, sync_way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.utime(run / "logs/run.log", (1000, 1000))
    ours = fetch(sync_connection)
    assert ours.absolute() == local_dir / "outputs/runs" / ID and content(ours) == content(run)
    assert (ours / "checkpoints/empty").is_dir()
    assert (ours / "logs/run.log").stat().st_mtime == 1000
    assert (local_dir / "outputs/runs/latest").resolve() == ours.resolve()
    proof = json.loads((ours / "fetched.json").read_text())
    assert proof["from"] == str(sync_connection.target) and proof["folder"] == str(run)
    assert proof["sha256"] == {path: hashlib.sha256(data).hexdigest() for path, data in tree(run).items()}
    size = sum(map(len, tree(run).values()))
    assert (proof["files"], proof["bytes"]) == (4, size)
    assert capsys.readouterr().out == (
        f"fetched run {ID}: 4 files, 3.0 MB, every one verified by sha256; outputs/runs/latest points to it\n"
    )
    assert list((local_dir / "outputs/fetching").iterdir()) == []


def test_names_are_kept_and_locks_and_temporary_files_are_left_out(
    sync_connection: Connection, local_dir: Path, run: Path, sync_way: str
) -> None:
    (run / os.fsdecode(b"latin-\xe9")).write_text("bytes")
    for name in NAMES:
        (run / name).write_text(name)
        (run / "logs" / f"{name}.d").mkdir()
        (run / "logs" / f"{name}.d" / name).write_text(name)
    expected = content(run)
    for name in (".lock", "logs/.x.tmp", "checkpoints/.y.tmp/z"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    ours = fetch(sync_connection)
    assert content(ours) == expected
    assert not any(p.name.endswith(".tmp") or p.name == ".lock" for p in ours.rglob("*"))


def test_internal_links_are_fetched_and_others_reported(
    sync_connection: Connection, local_dir: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints/last").symlink_to("../model")
    (run / "logs/abs").symlink_to(run / "model/weights")
    (run / "away").symlink_to("/etc/passwd")
    ours = fetch(sync_connection)
    assert os.readlink(ours / "checkpoints/last") == "../model"
    assert (ours / "logs/abs").resolve() == (ours / "model/weights").resolve()
    assert not os.path.lexists(ours / "away")
    assert (
        "away was not fetched: its target is outside of the run directory (/etc/passwd)" in capsys.readouterr().err
    )
    assert fetch(sync_connection) == ours and os.readlink(ours / "checkpoints/last") == "../model"


def test_a_run_is_found_by_the_id_of_its_job_or_its_own(
    sync_connection: Connection, local_dir: Path, run: Path
) -> None:
    script = f'echo "$PWD/outputs/runs/{ID}" > "$ASSAY_RUN_FILE"'
    job = jobs.start(sync_connection, "train", [jobs.PYTHON, "-c", script], [], {}, None, f"{ID}-abcd")
    until(lambda: jobs.find_job(sync_connection, job["id"])["status"] == "ended")
    assert (
        jobs.find_run(sync_connection, f"{ID}-abcd")["run"]
        == jobs.find_run(sync_connection, ID)["run"]
        == str(run)
    )
    other = jobs.start(sync_connection, "plan", [jobs.PYTHON, "-c", "true"], [], {}, None)
    until(lambda: jobs.find_job(sync_connection, other["id"])["status"] == "ended")
    assert fetch(sync_connection, "latest").name == ID  # the newest with a run directory
    with pytest.raises(RemoteError, match="no run 2027 in"):
        fetch(sync_connection, "2027")


def test_a_run_directory_takes_precedence_over_a_job_id_with_that_prefix(
    sync_connection: Connection, local_dir: Path, run: Path
) -> None:
    job = jobs.start(sync_connection, "train", [jobs.PYTHON, "-c", "true"], [], {}, None, f"{ID}-abcd")
    until(lambda: jobs.find_job(sync_connection, job["id"])["status"] == "ended")
    assert fetch(sync_connection).name == ID


# Refusals


def test_a_run_in_progress_is_refused(sync_connection: Connection, local_dir: Path, run: Path) -> None:
    script = f'echo "$PWD/outputs/runs/{ID}" > "$ASSAY_RUN_FILE"; exec sleep 1000'
    job = jobs.start(sync_connection, "eval", [jobs.PYTHON, "-c", script], [], {}, None, "the-job")
    until(lambda: jobs.find_job(sync_connection, job["id"])["run"])
    with pytest.raises(
        RemoteError, match=rf"run {ID} is still running: process {job['pid']} uses the run directory; .*ssh-stop"
    ):
        fetch(sync_connection)
    jobs.stop(sync_connection, job)
    assert fetch(sync_connection).name == ID


def test_a_run_locked_by_another_process_is_refused(
    sync_connection: Connection, local_dir: Path, run: Path
) -> None:
    with (run / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        with pytest.raises(
            RemoteError, match="is still running: a process on the server has locked the run directory"
        ):
            fetch(sync_connection)
    assert fetch(sync_connection).name == ID


def test_a_run_being_evaluated_outside_of_a_job_is_refused(
    sync_connection: Connection, local_dir: Path, run: Path
) -> None:
    for process in (None, {"host": socket.gethostname()}, {"host": socket.gethostname(), "pid": "1"}):
        manifest(run, evaluation={"status": "running", "process": process})
        assert fetch(sync_connection).name == ID
    manifest(run, evaluation={"status": "running", "process": runs.this_process() | {"boot_id": None}})
    with pytest.raises(RemoteError, match=f"is still running: process {os.getpid()} uses the run directory"):
        fetch(sync_connection)


def test_a_job_without_a_run_directory_is_refused(sync_connection: Connection, local_dir: Path) -> None:
    job = jobs.start(sync_connection, "train", [jobs.PYTHON, "-c", "exit 2"], [], {}, None, "no-run")
    until(lambda: jobs.find_job(sync_connection, job["id"])["status"] == "ended")
    with pytest.raises(
        RemoteError, match=r"run no-run has no run directory \(status: invalid input\); .*make ssh-logs"
    ):
        fetch(sync_connection, "no-run")


def test_a_folder_without_manifest_is_refused(sync_connection: Connection, local_dir: Path, run: Path) -> None:
    (run / "manifest.json").unlink()
    with pytest.raises(RemoteError, match="no runs in"):
        fetch(sync_connection)
    with pytest.raises(RemoteError, match="is not a run directory: it has no manifest"):
        fetching.fetch(sync_connection, {"id": ID, "run": str(run), "status": "ended"})


def test_a_different_run_with_the_same_id_is_left_alone(
    sync_connection: Connection, local_dir: Path, run: Path
) -> None:
    ours = local_dir / "outputs/runs" / ID
    ours.mkdir(parents=True)
    manifest(ours, started="2026-01-02T03:04:06+01:00")
    before = tree(ours)
    with pytest.raises(RunError, match=f"{ID} is a different run with the same id: started at .*; rename"):
        fetch(sync_connection)
    assert {p: d for p, d in tree(ours).items() if p != ".lock"} == before


def test_a_local_run_in_use_is_left_alone(sync_connection: Connection, local_dir: Path, run: Path) -> None:
    ours = fetch(sync_connection)
    script = (
        f"import fcntl, time; f = open({str(ours / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print(1, flush=True); time.sleep(1000)"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert other.stdout and other.stdout.readline()
    with pytest.raises(RunError, match=f"run {ID} is in use locally"):
        fetch(sync_connection)
    other.kill()
    other.wait()
    other.stdout.close()
    fetch(sync_connection)


# A second fetch


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are received from now on."""
    paths: list[str] = []
    real = transfer.receive

    def receive(connection: Connection, names: list[str], *more: Any) -> None:
        paths.extend(names)
        real(connection, names, *more)

    monkeypatch.setattr(transfer, "receive", receive)
    return paths


def test_only_files_that_differ_are_fetched(
    sync_connection: Connection,
    local_dir: Path,
    run: Path,
    sync_way: str,
    requested: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fetch(sync_connection)
    requested.clear()
    assert content(fetch(sync_connection)) == content(run) and requested == []
    (run / "logs/run.log").write_text("log, and more")
    (run / "metrics.json").write_text("{}")
    capsys.readouterr()
    assert content(fetch(sync_connection)) == content(run)
    assert sorted(requested) == ["logs/run.log", "metrics.json"]
    assert capsys.readouterr().err == ""  # fetched files need no backup
    assert not (local_dir / "outputs/replaced").exists()


def test_local_only_files_are_kept_and_different_ones_backed_up(
    sync_connection: Connection, local_dir: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = fetch(sync_connection)
    (ours / "mine").mkdir()
    (ours / "mine/notes.txt").write_text("notes")
    (ours / "logs/run.log").write_text("changed here")
    (ours / "gone").write_text("a file here")
    (run / "gone").mkdir()
    (run / "gone/x").write_text("a folder there")
    fetch(sync_connection)
    assert content(ours) == content(run) | {"mine/notes.txt": b"notes"}
    (folder,) = (local_dir / "outputs/replaced").iterdir()
    assert content(folder) == {"logs/run.log": b"changed here", "gone": b"a file here"}
    message = capsys.readouterr().err
    assert "local-only files kept: mine/notes.txt" in message
    assert f"local copies saved in outputs/replaced/{folder.name}: gone, logs/run.log" in message


# A run that died


def test_a_run_that_died_is_marked_interrupted(
    sync_connection: Connection, local_dir: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest(run, status="running")
    ours = runs.Run(fetch(sync_connection))
    assert ours.status == "interrupted" == ours.manifest["status"]
    assert (
        "is marked as interrupted locally: its process ended while its status was running"
        in capsys.readouterr().err
    )
    assert json.loads((run / "manifest.json").read_text())["status"] == "running"
    manifest(run, evaluation={"status": "running", "process": MANIFEST["process"]})
    fetch(sync_connection)
    assert ours.status_text == "finished, evaluation interrupted"
    assert not (local_dir / "outputs/replaced").exists()  # files that a fetch altered need no backup


# Transfer


def received(local_dir: Path) -> int:
    return sum(p.stat().st_size for p in (local_dir / "outputs/fetching" / ID).rglob("*") if p.is_file())


def test_a_fetch_resumes_after_lost_connections(
    bad_connection: tuple[Connection, Proxy], sshd: Server, local_dir: Path, run: Path, sync_way: str
) -> None:
    connection, between = bad_connection
    job = jobs.find_run(connection, ID)
    between.delay = 0.005

    def cut() -> None:
        for size in (500_000, 1_500_000, 2_500_000):
            until(lambda size=size: received(local_dir) > size)  # type: ignore[misc]
            sshd.cut()

    thread = threading.Thread(target=cut)
    thread.start()
    ours = fetching.fetch(connection, job)
    thread.join()
    assert content(ours) == content(run)
    assert between.count >= 4


def test_a_killed_fetch_makes_no_run_and_the_next_one_resumes_it(
    bad_connection: tuple[Connection, Proxy],
    local_dir: Path,
    run: Path,
    sync_way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection, between = bad_connection
    between.delay = 0.01
    other = subprocess.Popen(
        [sys.executable, "-m", "src.main", "ssh-fetch", ID], env=environment_of(connection), start_new_session=True
    )
    until(lambda: received(local_dir) > 1_000_000)
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    assert runs.all_runs("outputs") == [] and not (local_dir / "outputs/runs").exists()
    between.delay = 0
    sizes: list[int] = []
    real = transfer.receive
    monkeypatch.setattr(transfer, "receive", lambda *given: (sizes.append(given[-1]), real(*given)))
    assert content(fetch(connection)) == content(run)
    assert len(sizes) == 1 and sizes[0] < 2_500_000


def damaging(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Corrupt the first `times` transfers. Returns: the requested paths."""
    requested: list[str] = []
    real = transfer.receive

    def receive(connection: Connection, names: list[str], folder: str, to: Path, *more: Any) -> None:
        real(connection, names, folder, to, *more)
        requested.extend(names)
        if requested.count("model/weights") <= times and "model/weights" in names:
            with (to / "model/weights").open("rb+") as file:
                file.seek(1000)
                file.write(b"damaged")

    monkeypatch.setattr(transfer, "receive", receive)
    return requested


def test_a_file_corrupted_in_transfer_is_fetched_again(
    sync_connection: Connection, local_dir: Path, run: Path, sync_way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = damaging(monkeypatch, times=2)
    assert content(fetch(sync_connection)) == content(run)
    assert requested.count("model/weights") == 3 and requested.count("logs/run.log") == 1


def test_a_partial_local_file_is_resumed_and_verified(
    sync_connection: Connection, local_dir: Path, run: Path, sync_way: str, requested: list[str]
) -> None:
    place = local_dir / "outputs/fetching" / ID / "model"
    place.mkdir(parents=True)
    (place / "weights").write_bytes(os.urandom(1_000_000))
    assert content(fetch(sync_connection)) == content(run)
    assert requested.count("model/weights") == 2  # the rest of it, then all of it


def test_no_file_is_received_far_beyond_its_listed_size(
    sync_connection: Connection, local_dir: Path, run: Path, sync_way: str
) -> None:
    transfer.receive(sync_connection, {"model/weights": 5}, str(run), local_dir, sync_way == "rsync", 5)
    assert 5 <= (local_dir / "model/weights").stat().st_size <= 1024  # the unit of `ulimit -f`


def test_a_file_corrupted_each_time_makes_no_run(
    sync_connection: Connection, local_dir: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaging(monkeypatch, times=3)
    with pytest.raises(RemoteError, match="model/weights: checksum mismatch after 3 attempts"):
        fetch(sync_connection)
    assert not (local_dir / "outputs/runs").exists()
    monkeypatch.undo()
    os.chdir(local_dir)
    assert content(fetch(sync_connection)) == content(run)


def test_a_partial_file_is_never_a_hard_link_of_a_local_run(
    sync_connection: Connection, local_dir: Path, run: Path
) -> None:
    """An unfinished fetch has hard links to the identical files of the local run, which must not be written to."""
    ours = fetch(sync_connection)
    place = local_dir / "outputs/fetching" / ID
    (place / "logs").mkdir(parents=True)
    os.link(ours / "logs/run.log", place / "logs/run.log")
    with (ours / "logs/run.log").open() as held:
        (run / "logs/run.log").write_text("log, and more")
        fetch(sync_connection)
        assert held.read() == "log"
    assert (ours / "logs/run.log").read_text() == "log, and more"


def test_without_local_rsync_sftp_is_used(
    sync_connection: Connection, local_dir: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").symlink_to(str(shutil.which("ssh")))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert content(fetch(sync_connection)) == content(run)


@needs_own_mounts
def test_a_full_local_disk_is_reported(sync_connection: Connection, run: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    script = 'mount -t tmpfs -o size=2m tmpfs "$1"; cd "$1"; shift; exec "$@"'
    command = [sys.executable, "-m", "src.main", "ssh-fetch", ID]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, "sh", small, *command],
        env=environment_of(sync_connection),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "the fetch needs 3.0 MB, but 2.1 MB are free on this machine" in done.stderr, (
        done
    )
