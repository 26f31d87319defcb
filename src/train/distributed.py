"""Process group of a training run: setup, broadcast from the main process, and teardown."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from ..errors import PeerLost
from ..utils.process_info import process_info

T = TypeVar("T")

PREPARE_TIMEOUT = timedelta(days=2)  # how long workers wait while the main process reads and tokenises the data

_broadcast_group: Any = None  # with PREPARE_TIMEOUT


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Connect the processes of the run. Yields the device of this process, such as `cuda:1`.

    Raises: PeerLost in place of the connection's error if another process ends.
    """
    global _broadcast_group
    info = process_info()
    if not info.launched:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{info.local_rank}"
        torch.cuda.set_device(device)
    hook = sys.excepthook
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    sys.excepthook = hook  # torch's own prefixes each line with [rank1]
    _broadcast_group = distributed.new_group(backend="gloo", timeout=PREPARE_TIMEOUT)
    try:
        yield device
    except RuntimeError as error:
        if info.world_size > 1 and _is_connection_error(error):
            raise PeerLost("another process of this training run ended early") from error
        raise
    else:
        distributed.destroy_process_group()


def _is_connection_error(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def broadcast_from_main(value: T | None) -> T:
    """The value of the main process, in every process; it must be picklable if there are several."""
    values = [value]
    if process_info().world_size > 1:
        distributed.broadcast_object_list(values, src=0, group=_broadcast_group)
    return values[0]  # type: ignore[return-value]


@contextmanager
def ignore_sigterm_on_error() -> Iterator[None]:
    """Let a failing process report and record its error, although the launcher is already ending all workers."""
    try:
        yield
    except BaseException:
        if process_info().world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
