"""The examples of each batch and their order, as a function of the seed and the epoch alone.

So a run that resumes, or continues on more devices, sees the same examples in the same batches.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..data.store import Array, Example
from ..schema import OptimArgs
from ..utils.process_info import ProcessInfo


class BatchShape(NamedTuple):
    """Examples (with packing: bins) in a batch of one device, and batches in an optimizer step."""

    batch_size: int
    batches: int

    @property
    def size(self) -> int:
        return self.batch_size * self.batches


class BatchSampler:
    """The batches of one device, as lists of example indices.

    Of w devices, device r takes the batches r, r + w, r + 2w ...: w devices that accumulate a batches take the
    same optimizer steps as one device that accumulates a x w. A batch is empty where devices outnumber the
    batches left. In the first epoch the batch with the most tokens comes first, so that an out-of-memory error
    occurs in the first step.
    """

    def __init__(
        self, lengths: Sequence[int] | Array, batch_size: int, seed: int, *, pack_to: int | None = None,
        rank: int = 0, world_size: int = 1, started_with: BatchShape | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            lengths: number of tokens of each example.
            batch_size: examples in a batch or, with `pack_to`, bins of at most `pack_to` tokens.
            started_with: the batches of the run that is resumed, if they were others. Each optimizer step then has
                the examples that it had in that run.
        """
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.bins = pack_bins(self.lengths, pack_to) if pack_to else [[i] for i in range(len(self.lengths))]
        self.started_with = started_with
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this device in an epoch; the same on every device."""
        before = self.started_with
        if before is None:
            return -(-len(self.bins) // (self.batch_size * self.world_size))
        steps = -(-len(self.bins) // (before.size * self.world_size))
        return steps * (before.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.epoch_batches(self.epoch)
        batches += [[]] * (len(self) * self.world_size - len(batches))
        yield from batches[self.rank :: self.world_size]

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, of all devices."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.bins)).tolist()
        size = self.started_with.batch_size if self.started_with else self.batch_size
        chosen = [order[i : i + size] for i in range(0, len(order), size)]
        if epoch == 0:
            longest = max(range(len(chosen)), key=lambda i: self.count_tokens(self._rows(chosen[i])))
            chosen.insert(0, chosen.pop(longest))
        if self.started_with:
            chosen = self._divided(chosen, self.started_with)
        return [self._rows(bins) for bins in chosen]

    def _rows(self, bins: Sequence[int]) -> list[int]:
        return [row for b in bins for row in self.bins[b]]

    def _divided(self, batches: list[list[int]], before: BatchShape) -> list[list[int]]:
        """The bins of each optimizer step of the run as it was started, in batches of `batch_size`."""
        per_step, now = before.batches * self.world_size, before.size * self.world_size // self.batch_size
        found: list[list[int]] = []
        for first in range(0, len(batches), per_step):
            bins = [b for batch in batches[first : first + per_step] for b in batch]
            found += [bins[i : i + self.batch_size] for i in range(0, len(bins), self.batch_size)]
            found += [[]] * (-len(found) % now)  # a step that is not full
        return found

    def count_tokens(self, indices: Sequence[int]) -> int:
        return int(self.lengths[list(indices)].sum())


class Schedule(NamedTuple):
    """Optimizer steps per epoch and of the complete run, which all devices take together."""

    steps_per_epoch: int
    steps: int

    @classmethod
    def from_batches(cls, batches: int, args: OptimArgs) -> Schedule:
        """`batches`: of one device in an epoch."""
        steps_per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        return cls(steps_per_epoch, args.max_steps or math.ceil(args.epochs * steps_per_epoch))


def build_sampler(
    examples: Sequence[Example],
    args: OptimArgs,
    seed: int,
    pack_to: int | None,
    info: ProcessInfo,
    started_with: BatchShape | None = None,
) -> BatchSampler:
    """The sampler of one process. `examples` may have their lengths as an attribute `lengths`."""
    lengths = getattr(examples, "lengths", None)
    lengths = [len(e.ids) for e in examples] if lengths is None else lengths
    return BatchSampler(
        lengths,
        args.batch_size,
        seed,
        pack_to=pack_to,
        rank=info.rank,
        world_size=info.world_size,
        started_with=started_with,
    )


def pack_bins(lengths: Array, size: int) -> list[list[int]]:
    """Group examples into bins of at most `size` tokens, longest first, each into the fullest bin that has room.

    Best-fit decreasing needs at most 11/9 of the minimal number of bins (Johnson 1973).
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        position = bisect_left(free, (length, -1))
        if position == len(free):
            bins.append([index])
            left, bin_index = size - length, len(bins) - 1
        else:
            left, bin_index = free.pop(position)
            bins[bin_index].append(index)
            left -= length
        insort(free, (left, bin_index))
    return bins
