"""Limits of time and memory for programs of others, such as the chat template of a downloaded model.

A template can loop without ever yielding, and one operation of it can take all memory. `refuse_endless` tries it
in a forked child process, which the kernel ends. `limited` watches each later call from within the process, by a
timer that costs nothing while calls are short.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import ModelError

CPU_S = 5  # CPU seconds of one call
MEMORY_BYTES = 1 << 30  # that one call allocates
WALL_S = 120  # after which a child process that computes nothing is given up, with no finding
TICK_S = 0.05
TIME, MEMORY = f"takes more than {CPU_S} s of computing", f"takes more than {MEMORY_BYTES >> 30} GB of memory"
OUT_OF_MEMORY = 3  # exit code of the child process


class LimitExceeded(ModelError):
    """A call took too much time or memory."""


def refuse_endless(work: Callable[[], object], what: str, hint: str) -> None:
    """Run `work` in a forked child process, whose errors and results are dropped.

    Raises: LimitExceeded if it takes more CPU time than CPU_S or more memory than MEMORY_BYTES.
    """
    if not hasattr(os, "fork") or sys.platform == "darwin":  # where the limits are not enforced
        return
    configured = "TOKENIZERS_PARALLELISM" in os.environ
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else the library warns of the fork
    pid = os.fork()
    if pid == 0:
        _work_and_exit(work)
    if not configured:
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
    code = _exit_code(pid)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        raise LimitExceeded(f"{what} {TIME}", hint=hint)
    if code:
        raise LimitExceeded(f"{what} {MEMORY}", hint=hint)


def _work_and_exit(work: Callable[[], object]) -> None:
    code = 0
    try:
        for number in (signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
        if size := _bytes_used(0):
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
        work()
    except MemoryError:
        code = OUT_OF_MEMORY
    except BaseException:  # each call in this process raises it again
        code = 0
    finally:
        os._exit(code)


def _exit_code(pid: int) -> int:
    """The exit code of a child process, negative for a signal; 0 if it is given up."""
    began, pause = time.monotonic(), 0.001
    with suppress(ChildProcessError):  # another part of the program has waited for it
        while time.monotonic() - began < WALL_S:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return 0


class _Watch:
    """The call that is being watched in this process. Signals interrupt Python code in the main thread only."""

    def __init__(self) -> None:
        self.what = ""  # of the call that runs; empty between calls
        self.number = self.seen = 0  # of the newest call, and of the one at the last tick
        self.armed = False
        self.cpu = self.bytes = 0.0  # when the call was first seen

    def arm(self) -> None:
        self.armed = True  # also where the timer cannot be had, which is tried once
        with suppress(ValueError):  # not in the main thread
            if signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, self.tick):
                signal.signal(signal.SIGALRM, self.tick)
                signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)

    def disarm(self) -> None:
        if self.armed and signal.getsignal(signal.SIGALRM) == self.tick:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.armed = False

    def tick(self, *_: object) -> None:
        if not self.what:  # the next call starts the timer again
            self.disarm()
        elif self.number != self.seen:
            self.seen, self.cpu, self.bytes = self.number, time.thread_time(), _bytes_used(1)
        elif time.thread_time() - self.cpu > CPU_S:
            raise LimitExceeded(f"{self.what} {TIME}", hint=HINT)
        elif _bytes_used(1) - self.bytes > MEMORY_BYTES:
            raise LimitExceeded(f"{self.what} {MEMORY}", hint=HINT)


HINT = "review it, or choose another one"
_watch = _Watch()
atexit.register(_watch.disarm)  # Python gives up its handlers as it ends: a later tick would kill the process


def _forget_timer() -> None:
    _watch.armed, _watch.what = False, ""  # a forked process inherits no timer


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_timer)


def limited(what: str, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """`call(*args, **named)`. Raises: LimitExceeded if it takes more than CPU_S or MEMORY_BYTES; its errors."""
    watch = _watch
    watch.number += 1
    watch.what = what
    if not watch.armed:
        watch.arm()
    try:
        return call(*args, **named)
    finally:
        watch.what = ""


def _bytes_used(column: int) -> int:
    """Bytes of this process by /proc/self/statm: column 0 is virtual memory, 1 resident. 0 where there is none."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()
    except (OSError, ValueError):
        return 0
