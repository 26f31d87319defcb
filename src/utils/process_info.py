"""Which of the processes that train together this one is."""

from __future__ import annotations

import os
from typing import NamedTuple


class Here(NamedTuple):
    """This process among those that train together."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    joined: bool = False  # started by torchrun, or by a launcher like it

    @property
    def first(self) -> bool:
        """Whether this process writes the run directory and speaks."""
        return self.rank == 0


def here() -> Here:
    """From what torchrun puts into the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(os.environ.get(name, "").isdigit() for name in names):
        return Here()
    rank, world, local = (int(os.environ[name]) for name in names)
    return Here(rank, world, local, True)
