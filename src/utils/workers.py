"""Work spread over processes, its results in the order of its input and its memory bounded."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, TypeVar

from src.errors import UserError

In = TypeVar("In")
Out = TypeVar("Out")

GC_THRESHOLD = 100_000  # objects made between two: batches of rows are many small objects
QUEUED_PER_PROCESS = 3  # items a process is given before its first result is taken
PR_SET_PDEATHSIG = 1  # Linux prctl(2)

_work: Callable[[Any], Any]


def map_ordered(work: Callable[[In], Out], items: Iterable[In], processes: int) -> Iterator[Out]:
    """`work(item)` of each item, in order; at most AHEAD items a process wait or are under way.

    The processes are forked, so that `work` may hold what cannot be pickled; items and results are pickled.
    With one process nothing is forked.
    Raises: what `work` raises; UserError if a process was killed.
    """
    if processes <= 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, initializer=_init_worker, initargs=(work, os.getpid()))
    waiting: deque[Future[Out]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call_work, item))
            if len(waiting) >= QUEUED_PER_PROCESS * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a process that reads data was killed, perhaps for want of memory",
            hint="free some memory or set num_proc=1",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _init_worker(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core; threads would fight for it
    gc.freeze()  # what the parent had made is not walked through again and again, and its pages stay shared
    gc.set_threshold(GC_THRESHOLD)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted and ends the pool
    die_with_parent(parent)


def die_with_parent(parent: int) -> None:
    """Have this process killed when `parent`, which started it, ends."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that was set
        os._exit(1)


def _call_work(item: Any) -> Any:
    return _work(item)
