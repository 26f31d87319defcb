"""Progress of long work: a bar with the time left on a terminal, elsewhere a line of the log now and then.

with progress("test", 100, "row") as bar:
    bar.add(8)
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .logs import log, shows_bars
from .units import count, format_duration, format_size

LINE_EVERY_S = 30.0
BAR_AFTER_S = 0.5  # work that takes less shows no bar
POLL_EVERY_S = 0.5
BYTES = "B"


class Progress:
    """The part of `total` that is done. The bar is removed at the end; the log keeps its lines."""

    def __init__(self, what: str, total: int, unit: str, done: int) -> None:
        self.what, self.total, self.unit, self.done, self.before = what, total, unit, done, done
        self.started = self.last_line = time.monotonic()
        self.bar = tqdm(
            total=total, initial=done, desc=what, unit=unit, unit_scale=unit == BYTES, delay=BAR_AFTER_S,
            dynamic_ncols=True, leave=False, file=sys.stderr, disable=not shows_bars(),
        )  # fmt: skip

    def add(self, amount: int) -> None:
        self.done += amount
        self.bar.update(amount)
        now = time.monotonic()
        if now - self.last_line >= LINE_EVERY_S and self.done < self.total:
            self.last_line = now
            log.info("%s", self._line(now), extra={"bar": True})

    def _line(self, now: float) -> str:
        rate = (self.done - self.before) / (now - self.started)
        left = f", {format_duration((self.total - self.done) / rate)} left" if rate > 0 else ""
        if self.unit == BYTES:
            return f"{self.what}: {format_size(self.done)} of {format_size(self.total)}{left}"
        return f"{self.what}: {self.done:,} of {count(self.total, self.unit)}{left}"


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show the progress of the body; `unit` is one of `total`, such as `row`, or BYTES."""
    shown = Progress(what, total, unit, done)
    try:
        yield shown
    finally:
        shown.bar.close()


@contextmanager
def watched(what: str, total: int, measure: Callable[[], int]) -> Iterator[None]:
    """Show the progress of the body in bytes, which `measure` counts in another thread."""
    ended = threading.Event()

    def poll(shown: Progress) -> None:
        while not ended.wait(POLL_EVERY_S):
            shown.add(max(0, min(measure(), total) - shown.done))

    with progress(what, total, BYTES) as shown:
        thread = threading.Thread(target=poll, args=(shown,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
