"""Read and write TensorBoard event files without torch or TensorFlow."""

from __future__ import annotations

import math
import struct
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary import Writer
from tensorboard.summary.writer.record_writer import RecordWriter


class Curves:
    """Writer of scalars to `folder`, for `tensorboard --logdir`."""

    def __init__(self, folder: Path) -> None:
        self._writer = Writer(str(folder))

    def add(self, tag: str, value: float, step: int) -> None:
        if math.isfinite(value):
            self._writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.flush()
        self._writer.close()

    @staticmethod
    def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
        """`{tag: [(step, value), ...]}` of the event files in `folder`; the last of several values for a step."""
        found: dict[str, dict[int, float]] = {}
        for path in sorted(folder.glob("events.out.tfevents.*")):
            for event in map(Event.FromString, _records(path.read_bytes())):
                for value in event.summary.value:
                    if value.tensor.float_val or value.HasField("simple_value"):
                        found.setdefault(value.tag, {})[event.step] = _scalar(value)
        return {tag: sorted(points.items()) for tag, points in found.items()}

    @staticmethod
    def drop_after(folder: Path, step: int, tags: AbstractSet[str]) -> None:
        """Remove the points of `tags` after `step` from the event files: a resumed run rewrites them."""
        for path in folder.glob("events.out.tfevents.*"):
            temporary = folder / ".curves.tmp"  # TensorBoard reads every file with tfevents in its name
            with temporary.open("wb") as file:
                writer = RecordWriter(file)
                for record in _records(path.read_bytes()):
                    event = Event.FromString(record)
                    if event.step <= step or not tags & {value.tag for value in event.summary.value}:
                        writer.write(record)
            temporary.replace(path)


def _scalar(value: Any) -> float:
    """The value of a point, which recent writers store as a tensor with one element."""
    return float(value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value)


def _records(data: bytes) -> list[bytes]:
    """The complete records of an event file: length (8 bytes), its checksum (4), content, its checksum (4)."""
    found, offset = [], 0
    while offset + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, offset)
        end = offset + 12 + length + 4
        if end > len(data):  # a killed process was writing it
            break
        found.append(data[offset + 12 : offset + 12 + length])
        offset = end
    return found
