"""Stop and checkpoint requests: stop after a signal, save a checkpoint when a file appears."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import Stopped
from ..utils.logs import log

CHECKPOINT_NOW = "checkpoint-now"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A context manager that handles SIGTERM, SIGINT, SIGHUP and the file RUN/checkpoint-now.

    The first signal requests that the run ends after the current step and a checkpoint. The second ends the
    process at once, except for SIGHUP, and for SIGTERM in a Slurm job. A SIGHUP that is ignored, as under nohup,
    stays ignored. The file requests a checkpoint, which removes the file.
    The processes of a distributed run agree on the requests before each step, so that all end after the same one.
    """

    def __init__(self, run: Path, distributed: bool = False) -> None:
        self.file = run / CHECKPOINT_NOW
        self.distributed = distributed
        self.signal_name: str | None = None
        self.agreed = [False, False]  # to stop, to save

    def __enter__(self) -> StopRequest:
        self.handlers_before: dict[Any, Any] = {}
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            numbers = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self.handlers_before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            if not self.distributed:  # else `agree` logs it: the signal of one process may reach the others, too
                # os.write and not the log: a signal handler must not enter a stream that is writing a line
                with suppress(OSError):  # the terminal may be gone
                    os.write(2, f"{self._announcement}\n".encode())
            return
        if number == signal.SIGHUP or (number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ):
            return  # delivered in several ways: SIGHUP by shell and kernel; Slurm kills a job that takes too long
        for each, handler in self.handlers_before.items():
            signal.signal(each, handler)
        os.kill(os.getpid(), number)  # handled by the previous handler

    def local_flags(self) -> list[bool]:
        """The requests to this process, for `agree`: to stop, to save."""
        return [self.signal_name is not None, self.file.exists()]

    def agree(self, flags: list[bool]) -> None:
        """Accept the requests to all processes together."""
        if self.distributed and flags[0] and not self.agreed[0]:
            log.warning(self._announcement)
        self.agreed = flags

    @property
    def _announcement(self) -> str:
        cause = self.signal_name or "another process was stopped"
        return f"{cause}: finishing the step and saving a checkpoint; a second signal stops at once"

    @property
    def stop_requested(self) -> bool:
        return self.agreed[0] if self.distributed else self.signal_name is not None

    @property
    def save_requested(self) -> bool:
        return self.stop_requested or (self.agreed[1] if self.distributed else self.file.exists())

    def on_saved(self) -> None:
        self.file.unlink(missing_ok=True)

    def raise_if_stopped(self, step: int, steps: int) -> None:
        """Raises: Stopped if the run was stopped before its last step."""
        if self.stop_requested and step < steps:
            when = f"after step {step} of {steps}, with a checkpoint" if step else "before its first step"
            raise Stopped(
                f"stopped by {self.signal_name or 'another process'} {when}",
                hint="the same command resumes from there",
            )
