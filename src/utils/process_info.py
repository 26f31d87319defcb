"""The rank of this process among the workers of a distributed training run."""

from __future__ import annotations

import os
from typing import NamedTuple


class ProcessInfo(NamedTuple):
    """Position of this process in the process group."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launched: bool = False  # by torchrun, or by a launcher that sets the same variables

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes the run directory and logs."""
        return self.rank == 0


def process_info() -> ProcessInfo:
    """Read the variables that torchrun sets; the defaults of a single process where they are missing."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(os.environ.get(name, "").isdigit() for name in names):
        return ProcessInfo()
    rank, world_size, local_rank = (int(os.environ[name]) for name in names)
    return ProcessInfo(rank, world_size, local_rank, True)
