"""Which rows make a batch, in which order: a function of the seed and the epoch alone.

So a training that goes on after a crash, or on more devices, sees the same rows in the same batches.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np

from src.data.store import Array


class BatchSampler:
    """The batches of one device, as lists of row numbers. A batch may be empty, where devices outnumber rows.

    Device r of w takes batches r, r + w, r + 2w ...: w devices that accumulate a batches take the steps that
    one device takes with a x w. In the first epoch the longest batch comes first, so that what does not fit
    into memory shows at once.
    """

    def __init__(
        self, lengths: Sequence[int] | Array, batch_size: int, seed: int, *, pack_to: int | None = None,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        """
        Args:
            lengths: tokens of each row.
            batch_size: rows of a batch or, with `pack_to`, bins of at most so many tokens.
        """
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.bins = pack_bins(self.lengths, pack_to) if pack_to else [[i] for i in range(len(self.lengths))]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this device in an epoch; the same on every device."""
        return -(-len(self.bins) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.of_epoch(self.epoch)
        batches += [[]] * (len(self) * self.world - len(batches))
        yield from batches[self.rank :: self.world]

    def of_epoch(self, epoch: int) -> list[list[int]]:
        """Every batch of the epoch, over all devices."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.bins)).tolist()
        chosen = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        batches = [[row for b in bins for row in self.bins[b]] for bins in chosen]
        if epoch == 0:
            batches.insert(0, batches.pop(max(range(len(batches)), key=lambda i: self.tokens(batches[i]))))
        return batches

    def tokens(self, rows: Sequence[int]) -> int:
        """How many tokens the rows have."""
        return int(self.lengths[list(rows)].sum())


def pack_bins(lengths: Array, size: int) -> list[list[int]]:
    """Rows put into bins of at most `size` tokens, each into the fullest bin that has room, longest first.

    Best-fit decreasing: at most 11/9 of the fewest bins possible (Johnson 1973).
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), the least first
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            bins.append([row])
            left, where = size - length, len(bins) - 1
        else:
            left, where = rooms.pop(place)
            bins[where].append(row)
            left -= length
        insort(rooms, (left, where))
    return bins
