"""The log of a job, as it comes, until the job has ended."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterator
from typing import Any

from src.remote.agent import jobs

POLL = 0.1  # seconds
CHUNK = 1 << 16  # bytes
LASTS = 1.0  # seconds without news after which a follower asks whether the process is still there


def follow(folder: str, id: str, offset: int, wait: bool = True) -> Iterator[dict[str, Any]]:
    """The log from `offset` bytes on: `{"at", "data"}` in base64, and at last `{"end"}` with the job's record.

    With `wait` it goes on until the job has ended.
    """
    place = jobs.place_of(folder, id)
    path = os.path.join(place, "log")
    asked = time.monotonic()
    while True:
        over = not wait or os.path.exists(os.path.join(place, "exit.json"))
        if not over and time.monotonic() - asked > LASTS:
            asked = time.monotonic()
            over = jobs.look(folder, id)["status"] not in ("running", "elsewhere")
        for data in _from(path, offset):
            yield {"at": offset, "data": base64.b64encode(data).decode()}
            offset += len(data)
        if over:  # known before the last of the log was read
            yield {"end": jobs.look(folder, id)}
            return
        time.sleep(POLL)


def _from(path: str, offset: int) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            while True:
                data = file.read(CHUNK)
                if not data:
                    return
                yield data
    except FileNotFoundError:
        return
