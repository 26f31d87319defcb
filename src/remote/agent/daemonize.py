"""What goes on when the connection is gone: a process of its own, which loads what was sent here."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from src.remote.agent.protocol import BOOTSTRAP, PYTHON_OPTIONS, AgentError, send


def call(function: str, inherited: Sequence[int] = (), **given: Any) -> None:
    """Call `module:function` in a process that no connection ends; back once it has sent its first frame.

    The process has the descriptors of `inherited` open until its end.
    """
    here: Any = sys.modules["src.remote.agent"]
    other = subprocess.Popen(
        [sys.executable, *PYTHON_OPTIONS, "-c", BOOTSTRAP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
        pass_fds=inherited,
    )
    request = {"boot": here.boot, "sources": here.sources, "mark": "-", "beat": False, "given": given}
    request["call"] = function
    assert other.stdin and other.stdout and other.stderr
    other.stdin.write(json.dumps(request).encode() + b"\n")
    other.stdin.flush()
    for line in other.stdout:
        if b'"frame"' in line:
            return
        if b'"refused"' in line:
            told = json.loads(line.decode())
            raise AgentError(told["refused"], told.get("hint", ""))
    raise RuntimeError(other.stderr.read().decode())


def alone() -> None:
    """Tell who waits in `call` that this process goes on by itself, and hold no end of any connection."""
    with contextlib.suppress(OSError):  # who waited is gone: the connection was cut just now
        send(frame={})
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
