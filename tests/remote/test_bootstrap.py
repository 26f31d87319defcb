"""The agent's bootstrap, run on this machine: its answers, and operations that outlive the client."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from src.remote.agent.bootstrap import BOOTSTRAP
from src.remote.connection import AGENT_DIR

WORK = """
import time
from contextlib import nullcontext
from src.remote.agent.bootstrap import uninterrupted

def work(path, locked):
    with uninterrupted if locked else nullcontext():
        open(path + ".begun", "w").close()
        time.sleep(1)
        open(path, "w").close()
"""


def served(**args: object) -> subprocess.Popen[bytes]:
    """The bootstrap with a fast heartbeat and a request for `work:work`."""
    bootstrap = (AGENT_DIR / "bootstrap.py").read_text().replace("HEARTBEAT_S = 3.0", "HEARTBEAT_S = 0.01")
    sources = {"bootstrap": bootstrap, "work": WORK}
    request = {"sources": sources, "mark": "MARK", "call": "work:work", "args": args}
    process = subprocess.Popen([sys.executable, "-c", BOOTSTRAP], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    return process


def test_the_answer_follows_the_mark_and_heartbeats(tmp_path: Path) -> None:
    out, _ = served(path=str(tmp_path / "done"), locked=True).communicate(timeout=60)
    mark, *frames = out.strip().splitlines()
    assert mark == b"MARK"
    assert [json.loads(f) for f in frames[:-1]] == [{"alive": True}] * (len(frames) - 1) and len(frames) > 5
    assert json.loads(frames[-1]) == {"answer": None}


@pytest.mark.parametrize("locked", [True, False])
def test_an_uninterrupted_operation_completes_after_the_client_disconnects(tmp_path: Path, locked: bool) -> None:
    done = tmp_path / "done"
    process = served(path=str(done), locked=locked)
    assert process.stdout
    while not done.with_suffix(".begun").exists():
        process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=60)
    assert done.exists() is locked
