"""Ctrl-C ends a training, even where something on its way swallows the exception."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from src.runs import Run
from src.train.callbacks import RunRecorder


def test_an_interrupt_that_was_swallowed_is_raised_again_at_the_next_step(tmp_path: Path) -> None:
    recorder = RunRecorder(Run(tmp_path))
    before = signal.getsignal(signal.SIGINT)
    with recorder.heeding_interrupts():
        recorder.on_step_begin(None, None, None)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            recorder.on_step_begin(None, None, None)
    assert signal.getsignal(signal.SIGINT) is before
