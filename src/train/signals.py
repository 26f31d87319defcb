"""Stopping a training from outside: a signal, or a file, and what is left behind by it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from src.errors import Stopped
from src.utils.logs import log

CHECKPOINT_NOW = "checkpoint-now"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """What was asked of a running training, as a context that listens.

    The first SIGTERM or SIGINT asks to finish the step, save a checkpoint and end; the second ends at once, except
    for a SIGTERM in a job of Slurm.
    A file RUN/checkpoint-now asks for a checkpoint and is removed. Devices agree before each step, so that
    all of them end after the same one.
    """

    def __init__(self, run: Path, several: bool = False) -> None:
        self.file = run / CHECKPOINT_NOW
        self.several = several
        self.by: str | None = None  # the signal that came
        self.agreed = [False, False]  # to stop, to save

    def __enter__(self) -> StopRequest:
        self.before: dict[Any, Any] = {}
        if threading.current_thread() is threading.main_thread():  # signals are the main thread's
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.by is None:
            self.by = signal.Signals(number).name
            if not self.several:  # else once all agree: what ends another process may end this one too
                # not through the log: its streams may be in the middle of a line, which no handler may enter
                os.write(2, f"{self._promise}\n".encode())
            return
        if number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ:
            return  # Slurm sends one signal by several ways, and itself ends what takes too long
        for each, handler in self.before.items():
            signal.signal(each, handler)
        os.kill(os.getpid(), number)  # to whom it was before

    def flags(self) -> list[bool]:
        """What this process was asked, for `agree`: to stop, to save."""
        return [self.by is not None, self.file.exists()]

    def agree(self, flags: list[bool]) -> None:
        """Take what the processes together were asked."""
        if self.several and flags[0] and not self.agreed[0]:
            log.warning(self._promise)
        self.agreed = flags

    @property
    def _promise(self) -> str:
        by = self.by or "another process was stopped"
        return f"{by}: finishing the step and saving a checkpoint; once more stops at once"

    @property
    def to_stop(self) -> bool:
        return self.agreed[0] if self.several else self.by is not None

    @property
    def to_save(self) -> bool:
        return self.to_stop or (self.agreed[1] if self.several else self.file.exists())

    def saved(self) -> None:
        self.file.unlink(missing_ok=True)

    def refuse_if_stopped(self, step: int, steps: int) -> None:
        """Raises: Stopped if the training was ended before its last step."""
        if self.to_stop and step < steps:
            when = f"after step {step} of {steps}, with a checkpoint" if step else "before its first step"
            raise Stopped(
                f"stopped by {self.by or 'another process'} {when}",
                hint="the same command goes on from there",
            )
