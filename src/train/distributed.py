"""What the processes of a training do as one: they meet, wait for the first of them, and part."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from src.errors import PeerLost
from src.utils.process_info import process_info

T = TypeVar("T")

PREPARE_TIMEOUT = timedelta(days=2)  # how long the others wait while the first reads and tokenises

_prepare_group: Any = None  # the process group that waits


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """The processes together, connected inside. Yields the device of this one, as `cuda:1`.

    Raises: PeerLost in place of the connection's error if another process ends.
    """
    global _prepare_group
    now = process_info()
    if not now.launched:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{now.local_rank}"
        torch.cuda.set_device(device)
    hook = sys.excepthook
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    sys.excepthook = hook  # torch's own writes [rank1] before each line
    _waiting = distributed.new_group(backend="gloo", timeout=PREPARE_TIMEOUT)
    try:
        yield device
    except RuntimeError as error:
        if now.world_size > 1 and _is_connection_error(error):
            raise PeerLost("another process of this training ended before its time") from error
        raise
    else:
        distributed.destroy_process_group()


def _is_connection_error(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def broadcast_from_main(value: T | None) -> T:
    """What the first process has, given to all, once it has it. It must be picklable where there are several."""
    given = [value]
    if process_info().world_size > 1:
        distributed.broadcast_object_list(given, src=0, group=_prepare_group)
    return given[0]  # type: ignore[return-value]


@contextmanager
def ignore_sigterm_on_error() -> Iterator[None]:
    """Let the first process say and write why it ended, though its launcher is already ending all of them."""
    try:
        yield
    except BaseException:
        if process_info().world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
