"""A run is started exactly once, whatever happens to the connection, the client and the server meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from src.errors import RemoteError
from src.remote import connection as connection_module
from src.remote import jobs
from src.remote.agent import fs
from src.remote.connection import Connection
from src.remote.target import RemoteTarget
from tests.remote.client import Client
from tests.remote.kill_points import KillPoints
from tests.remote.proxy import proxy
from tests.remote.server import Server, needs_ssh, until
from tests.remote.test_jobs import folder_of

pytest_plugins = ["tests.remote.server", "tests.remote.client"]
pytestmark = needs_ssh

RAN = "echo $$ >> ran"  # in REMOTE_DIR: a line for each process that was started


def begin(connection: Connection, id: str, script: str = RAN) -> jobs.Job:
    return jobs.start(connection, "train", ["/bin/sh", "-c", script], [], {}, None, id)


def ran(project: Path) -> int:
    file = project / "ran"
    return len(file.read_text().splitlines()) if file.exists() else 0


class Starts:
    """Starts in sessions with a kill point."""

    def __init__(self, server: Server, connection: Connection, project: Path, folder: Path) -> None:
        self.server, self.connection, self.project = server, connection, project
        self.kill_points = KillPoints(folder, project)

    @contextmanager
    def at(self, who: str, nth: int, act: str) -> Iterator[str]:
        """The id for a start inside; no job has run yet."""
        (self.project / "ran").unlink(missing_ok=True)
        with self.server.session(**self.kill_points.variables(who, nth, act)):
            self.connection.close()  # the next connection begins a new session
            yield f"run-{who}-{nth}-{act}"
            self.connection.close()

    def ended(self, id: str) -> bool:
        return (folder_of(self.project, {"id": id}) / "exit.json").exists()


@pytest.fixture
def starts(sshd: Server, connection: Connection, remote_project: Path, tmp_path: Path) -> Starts:
    return Starts(sshd, connection, remote_project, tmp_path)


@pytest.mark.parametrize("act", ["cut", "kill"])
def test_a_start_interrupted_at_any_point_happens_once(starts: Starts, act: str) -> None:
    nth, reached = 0, True
    while reached:
        nth += 1
        with starts.at("starter", nth, act) as id:
            job = begin(starts.connection, id)  # retries by itself
            again = begin(starts.connection, id)
        until(lambda id=id: starts.ended(id))
        assert ran(starts.project) == 1, f"at kill point {nth}"
        assert again["existed"] and again["pid"] == job["pid"]
        reached = starts.kill_points.reached.exists()
    assert nth > 3  # the last kill point was not reached


def test_a_supervisor_killed_at_any_point_never_runs_a_job_twice(starts: Starts) -> None:
    nth, reached = 0, True
    while reached:
        nth += 1
        with starts.at("supervisor", nth, "kill") as id:
            try:
                begin(starts.connection, id)
            except RemoteError:  # an unexpected error
                assert starts.kill_points.reached.exists()
        job = begin(starts.connection, id)
        job = until(
            lambda id=id: next(
                j for j in jobs.list_jobs(starts.connection) if j["id"] == id and j["status"] != "running"
            )
        )
        assert ran(starts.project) == (1 if job["code"] == 0 else ran(starts.project) & 1), f"at kill point {nth}"
        reached = starts.kill_points.reached.exists()
    assert nth > 3


def test_a_slow_start_that_was_retried_happens_once(sshd: Server, starts: Starts) -> None:
    """The supervisor is slow, its parent process is killed, and the client retries."""
    with starts.at("supervisor", 1, "wait") as id:
        starting = threading.Thread(target=begin, args=(starts.connection, id))
        starting.start()
        until(starts.kill_points.reached.exists)
        slow = next(p for p in sshd.started() if python(p) and python(p.parent()))
        starter = slow.parent()
        assert starter is not None
        starter.kill()
        starting.join()  # retried by itself
        starts.kill_points.release.touch()
        until(lambda: not slow.is_running() or slow.status() == psutil.STATUS_ZOMBIE)
    until(lambda: starts.ended(id))
    assert ran(starts.project) == 1


def python(process: psutil.Process | None) -> bool:
    return process is not None and process.name().startswith("python")


def test_concurrent_starts_with_one_id_start_one_job(user: Client, remote_project: Path) -> None:
    answers: list[jobs.Job] = []

    def one() -> None:
        with Connection(RemoteTarget.from_env(user.environment)) as connection:
            answers.append(begin(connection, "same"))

    at_once = [threading.Thread(target=one) for _ in range(6)]
    for each in at_once:
        each.start()
    for each in at_once:
        each.join()
    until((folder_of(remote_project, {"id": "same"}) / "exit.json").exists)
    assert ran(remote_project) == 1
    assert sorted(answer["existed"] for answer in answers) == [False] + [True] * 5
    assert len({answer["pid"] for answer in answers}) == 1


def test_a_record_is_made_once_with_and_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "as exFAT says")

    for without, name in ((False, "linked"), (True, "not")):
        if without:
            monkeypatch.setattr(os, "link", refuse)
        made = [fs.write_text(str(tmp_path / name), text, exclusive=True) for text in ("first", "second")]
        assert made == [True, False] and (tmp_path / name).read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 2


# From the command line


def test_a_command_repeated_with_its_id_starts_nothing(user: Client, recorded_args: Path) -> None:
    (recorded_args.parent / "wait").touch()
    first = user("ssh-eval", "--detach", "--run=mine")
    again = user("ssh-eval", "--detach", "--run=mine")
    assert "run mine started on " in first.stdout and "run mine was already started on " in again.stdout
    (recorded_args.parent / "wait").unlink()
    assert user("ssh-attach", "mine").returncode == 0
    assert user("ssh-status").stdout.count("finished") == 1


def test_ctrl_c_stops_following_and_not_the_run(user: Client, recorded_args: Path, tmp_path: Path) -> None:
    (recorded_args.parent / "wait").touch()
    following = user.start("ssh-train", "--run=mine", to=tmp_path / "printed")
    until(recorded_args.exists)
    following.send_signal(signal.SIGINT)
    assert following.wait(timeout=60) == 130
    printed = (tmp_path / "printed.err").read_text()
    assert (
        "stopped following run mine, which continues on the server; make ssh-attach RUN=mine" in printed
        and "Traceback" not in printed
    )
    assert "running" in user("ssh-status").stdout
    (recorded_args.parent / "wait").unlink()
    done = user("ssh-attach")
    assert done.returncode == 0 and "run mine: finished" in done.stderr


def test_a_follower_reconnects_after_a_silent_loss(
    sshd: Server, user: Client, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(connection_module, "SILENCE_TIMEOUT_S", 4.0)  # the agent sends a heartbeat every 3 s
    with proxy(sshd.port) as between:
        target = RemoteTarget.from_env(user.environment | {"REMOTE_PORT": str(between.port)})
        user.known_hosts.write_text(sshd.known_hosts().replace(str(sshd.port), str(between.port)))
        with Connection(target) as connection:
            script = "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.2; done; printf end"
            job = begin(connection, "once", script)
            losing = threading.Timer(0.8, between.lose)
            losing.start()
            assert jobs.follow(connection, job["id"])["code"] == 0
            losing.join()
        assert between.count == 2
    assert capfdbinary.readouterr().out == b"1\n2\n3\n4\n5\n6\n7\n8\nend"


def test_any_bytes_are_followed_once_over_many_lost_connections(
    sshd: Server, connection: Connection, remote_project: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9 10; do head -c 400000 /dev/urandom; sleep 0.2; done"
    job = begin(connection, "bytes", script)
    over, cuts = threading.Event(), [0]

    def cut() -> None:
        while cuts[0] < 4 and not over.wait(0.5):
            cuts[0] += bool(sshd.cut())

    cutting = threading.Thread(target=cut)
    cutting.start()
    try:
        assert jobs.follow(connection, job["id"])["code"] == 0
    finally:
        over.set()
        cutting.join()
    assert cuts[0] > 1
    log = (folder_of(remote_project, job) / "log").read_bytes()
    assert capfdbinary.readouterr().out == log.decode("utf-8", "backslashreplace").encode()
