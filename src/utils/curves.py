"""TensorBoard event files, written without torch or TensorFlow."""

from __future__ import annotations

import math
from pathlib import Path

from tensorboard.summary import Writer


class Curves:
    """Scalars under `folder`, for `tensorboard --logdir`."""

    def __init__(self, folder: Path) -> None:
        self._writer = Writer(str(folder))

    def add(self, tag: str, value: float, step: int) -> None:
        if math.isfinite(value):
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.flush()
        self._writer.close()
