"""Parallel map over worker processes, with ordered results and bounded memory."""

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

from ..errors import UserError

In = TypeVar("In")
Out = TypeVar("Out")

GC_THRESHOLD = 100_000  # new objects between two collections: batches of rows consist of many small objects
QUEUED_PER_PROCESS = 3  # items submitted for each process before a result is read
PR_SET_PDEATHSIG = 1  # Linux prctl(2)

_work: Callable[[Any], Any]


def map_ordered(work: Callable[[In], Out], items: Iterable[In], processes: int) -> Iterator[Out]:
    """Yield `work(item)` for each item, in order, with at most QUEUED_PER_PROCESS pending items for each process.

    The processes are forked, so `work` need not be picklable; items and results must be. With one process, the
    caller does the work.
    Raises: any error of `work`; UserError if a process was killed.
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
            "a worker process was killed, probably because memory ran out",
            hint="free some memory or set num_proc=1",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _init_worker(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
    gc.freeze()  # do not scan the parent's objects: that takes time and copies their shared pages
    gc.set_threshold(GC_THRESHOLD)
    for number in (signal.SIGINT, signal.SIGHUP):  # the parent handles them and ends the pool
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent)


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its `parent` exits."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it exited before the call
        os._exit(1)


def _call_work(item: Any) -> Any:
    return _work(item)
