"""Runs in separate processes, which a test starts, waits for and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from src.runs import Run
from tests.fixtures import World
from tests.fork_server import TIMEOUT_S, ForkServer

TWO = ("num_processes=2", "num_proc=1")


class ForkedCommand:
    """A command in the fork_server, to be treated as the Popen of one."""

    def __init__(self, fork_server: ForkServer, pid: int) -> None:
        self.fork_server, self.pid = fork_server, pid
        self.returncode: int | None = None
        self.said = ""

    def poll(self) -> int | None:
        if self.returncode is None and self.fork_server.has_ended():
            self.communicate()
        return self.returncode

    def communicate(self, timeout: float = 0) -> tuple[str, None]:
        """`timeout` is ignored: the fork server has its own."""
        if self.returncode is None:
            self.returncode, self.said = self.fork_server.end()
        return self.said, None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            self.communicate()


Child = ForkedCommand | subprocess.Popen[str]
Start = Callable[..., Child]


@pytest.fixture
def start(world: World) -> Iterator[Start]:
    """Start a run in a separate process group, which ends with the test."""
    children: list[subprocess.Popen[str]] = []

    def begin(*words: str, **variables: str) -> subprocess.Popen[str]:
        children.append(world.start("train", *words, **variables))
        return children[-1]

    yield begin
    for child in children:
        child.kill()
        child.wait()


@pytest.fixture
def fork(world: World, fork_server: ForkServer) -> Iterator[Start]:
    """Start a run in the fork server, whose workers are forked as well: one run at a time, but quickly."""
    children: list[ForkedCommand] = []

    def begin(*words: str, calls: tuple[str, ...] = (), **variables: str) -> ForkedCommand:
        if children:
            children[-1].communicate()
        calls = ("tests.train.forked:by_fork", *calls)
        pid = fork_server.start("train", *world.settings("train"), *words, calls=calls, **variables)
        children.append(ForkedCommand(fork_server, pid))
        return children[-1]

    yield begin
    for child in children:
        child.end()


def ended(child: Child) -> tuple[int, str]:
    said = child.communicate(timeout=TIMEOUT_S)[0]
    assert child.returncode is not None
    return child.returncode, said


def until(child: Child, world: World, line: str) -> Run:
    """Wait for a line of the newest run's log."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        found = [run for run in world.runs if (run.logs / "run.log").is_file()]
        if found and line in (found[0].logs / "run.log").read_text():
            return found[0]
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline, f"{line} never came"
        time.sleep(0.02)


def samples(run: Run) -> list[Any]:
    return [json.loads(line) for line in (run.logs / "samples.jsonl").read_text().splitlines()]
