"""CPU time, wall time and memory of a command: one thread, no network."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Cost(NamedTuple):
    """CPU seconds of a process with its children, wall seconds, and the peak of its memory in MB."""

    cpu: float
    wall: float
    rss: float = 0.0


def cost(command: list[str], folder: Path) -> Cost:
    """Run a command and measure it. Raises: SystemExit with its output if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with (folder / "log").open("w") as log:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
    if status:
        raise SystemExit((folder / "log").read_text()[-3000:])
    return Cost(used.ru_utime + used.ru_stime, wall, used.ru_maxrss / 1024)
