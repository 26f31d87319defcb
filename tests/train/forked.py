"""Workers of a run, forked by torchrun's agent inside the fork server, which has imported what they import.

They are children of the agent and have its environment, as those that it starts from the disk. The tests that
call `start(...)` in `several.py` are about those.
"""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

from tests.fork_server import become


def by_fork() -> None:
    """Have the agent that this process is to be fork."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = Forked


def fail_in_second_process() -> None:
    """Break the second process alone, once it computes a loss."""
    from src.train.fit import AssayTrainer

    whole = AssayTrainer.compute_loss

    def broken(self: Any, *words: Any, **named: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise ValueError("a bolt is loose")
        return whole(self, *words, **named)

    AssayTrainer.compute_loss = broken


class Forked:
    """What the agent needs of subprocess.Popen."""

    def __init__(
        self, args: tuple[str, ...], env: dict[str, str], stdout: Any, stderr: Any, start_new_session: bool
    ) -> None:
        assert args[1:3] == ("-m", "src.main") and start_new_session
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            while os.getpgid(self.pid) != self.pid:  # the agent signals its children as groups
                os.sched_yield()
            return
        os.setsid()

        def prepare() -> None:
            os.environ.clear()
            os.environ.update(env)

        become(list(args[3:]), stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2, prepare)

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code
