"""Trainings in processes of their own, started, waited for and ended by a test."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from src.runs import Run
from tests.fixtures import World

PATIENCE = 300  # seconds until a child that does not come to the point is given up
TWO = ("num_processes=2", "data_workers=1")

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(world: World) -> Iterator[Start]:
    """Starts a training, with a process group of its own; nothing of it outlives the test."""
    children: list[subprocess.Popen[str]] = []

    def begin(*words: str, **variables: str) -> subprocess.Popen[str]:
        children.append(world.start("train", *words, **variables))
        return children[-1]

    yield begin
    for child in children:
        child.kill()
        child.wait()


def ended(child: subprocess.Popen[str]) -> tuple[int, str]:
    said = child.communicate(timeout=PATIENCE)[0]
    return child.returncode, said


def until(child: subprocess.Popen[str], world: World, line: str) -> Run:
    """Wait for a line of the newest run's log."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = [run for run in world.runs if (run.logs / "run.log").is_file()]
        if found and line in (found[0].logs / "run.log").read_text():
            return found[0]
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline, f"{line} never came"
        time.sleep(0.02)


def samples(run: Run) -> list[Any]:
    return [json.loads(line) for line in (run.logs / "samples.jsonl").read_text().splitlines()]
