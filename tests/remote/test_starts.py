"""A run is started once: whatever the connection and its two ends do while it is being started."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from src.remote import jobs
from src.remote.link import Link
from src.remote.target import Target
from tests.remote.client import Client
from tests.remote.moments import Moments
from tests.remote.server import Server, needs_ssh
from tests.remote.test_jobs import folder_of, until

pytest_plugins = ["tests.remote.server", "tests.remote.client"]
pytestmark = needs_ssh

RAN = "echo $$ >> ran"  # in REMOTE_DIR: a line for each process that was started


def begin(link: Link, id: str, script: str = RAN) -> jobs.Job:
    return jobs.start(link, "train", ["/bin/sh", "-c", script], [], {}, None, id)


def ran(project: Path) -> int:
    file = project / "ran"
    return len(file.read_text().splitlines()) if file.exists() else 0


class Starts:
    """Starts, in sessions in which a moment comes."""

    def __init__(self, server: Server, link: Link, project: Path, folder: Path) -> None:
        self.server, self.link, self.project = server, link, project
        self.moments = Moments(folder, project)

    @contextmanager
    def at(self, who: str, nth: int, act: str) -> Iterator[str]:
        """The id of a run, for a start inside; nothing has run yet."""
        (self.project / "ran").unlink(missing_ok=True)
        with self.server.session(**self.moments.variables(who, nth, act)):
            self.link.close()  # the next connection is a session of the new kind
            yield f"run-{who}-{nth}-{act}"
            self.link.close()

    def ended(self, id: str) -> bool:
        return (folder_of(self.project, {"id": id}) / "exit.json").exists()


@pytest.fixture
def starts(sshd: Server, link: Link, remote_project: Path, tmp_path: Path) -> Starts:
    return Starts(sshd, link, remote_project, tmp_path)


@pytest.mark.parametrize("act", ["cut", "kill"])
def test_at_whatever_moment_a_start_is_broken_off_it_happens_once(starts: Starts, act: str) -> None:
    nth, came = 0, True
    while came:
        nth += 1
        with starts.at("starter", nth, act) as id:
            job = begin(starts.link, id)  # which tries again by itself
            again = begin(starts.link, id)
        until(lambda id=id: starts.ended(id))
        assert ran(starts.project) == 1, f"at moment {nth}"
        assert again["again"] and again["pid"] == job["pid"]
        came = starts.moments.came.exists()
    assert nth > 3  # the last never came


def test_at_whatever_moment_its_supervisor_is_killed_it_never_runs_twice(starts: Starts) -> None:
    nth, came = 0, True
    while came:
        nth += 1
        with starts.at("supervisor", nth, "kill") as id:
            try:
                begin(starts.link, id)
            except RuntimeError:  # as nobody foresees that
                assert starts.moments.came.exists()
        job = begin(starts.link, id)
        job = until(
            lambda id=id: next(j for j in jobs.known(starts.link) if j["id"] == id and j["status"] != "running")
        )
        assert ran(starts.project) == (1 if job["code"] == 0 else ran(starts.project) & 1), f"at moment {nth}"
        came = starts.moments.came.exists()
    assert nth > 3


def test_a_start_that_goes_on_after_it_was_given_up_is_not_done_twice(sshd: Server, starts: Starts) -> None:
    """Its supervisor is slow to begin, who has started that is gone, and the start is tried again."""
    with starts.at("supervisor", 1, "wait") as id:
        starting = threading.Thread(target=begin, args=(starts.link, id))
        starting.start()
        until(starts.moments.came.exists)
        slow = next(p for p in sshd.started() if python(p) and python(p.parent()))
        starter = slow.parent()
        assert starter is not None
        starter.kill()
        starting.join()  # tried again by itself
        starts.moments.go.touch()
        until(lambda: not slow.is_running() or slow.status() == psutil.STATUS_ZOMBIE)
    until(lambda: starts.ended(id))
    assert ran(starts.project) == 1


def python(process: psutil.Process | None) -> bool:
    return process is not None and process.name().startswith("python")


def test_of_many_who_start_the_same_at_once_one_does(person: Client, remote_project: Path) -> None:
    answers: list[jobs.Job] = []

    def one() -> None:
        with Link(Target.of(person.environment)) as link:
            answers.append(begin(link, "same"))

    at_once = [threading.Thread(target=one) for _ in range(6)]
    for each in at_once:
        each.start()
    for each in at_once:
        each.join()
    until((folder_of(remote_project, {"id": "same"}) / "exit.json").exists)
    assert ran(remote_project) == 1
    assert sorted(answer["again"] for answer in answers) == [False] + [True] * 5
    assert len({answer["pid"] for answer in answers}) == 1
