"""Batches: the same for the same seed, each example once per epoch, the longest batch first."""

from __future__ import annotations

import numpy as np
import pytest

from src.train.batch_sampler import BatchSampler, pack_bins

LENGTHS = np.random.default_rng(3).integers(1, 100, 53)


def flat(batches: list[list[int]]) -> list[int]:
    return sorted(row for batch in batches for row in batch)


@pytest.mark.parametrize("pack_to", [None, 100])
def test_every_epoch_takes_every_row_once_in_another_order(pack_to: int | None) -> None:
    batches = BatchSampler(LENGTHS, 4, seed=1, pack_to=pack_to)
    first, second = batches.epoch_batches(0), batches.epoch_batches(1)
    assert flat(first) == flat(second) == list(range(53))
    assert first != second
    assert first == BatchSampler(LENGTHS, 4, seed=1, pack_to=pack_to).epoch_batches(0)
    assert second != BatchSampler(LENGTHS, 4, seed=2, pack_to=pack_to).epoch_batches(1)
    assert len(first) == len(second) == len(batches)


def test_the_longest_batch_comes_first_and_only_in_the_first_epoch_is_anything_moved() -> None:
    batches = BatchSampler(LENGTHS, 4, seed=1)
    first = batches.epoch_batches(0)
    assert batches.count_tokens(first[0]) == max(batches.count_tokens(b) for b in first)
    drawn = np.random.default_rng([1, 1]).permutation(53).tolist()
    assert batches.epoch_batches(1) == [drawn[i : i + 4] for i in range(0, 53, 4)]
    drawn = np.random.default_rng([1, 0]).permutation(53).tolist()
    assert sorted(first) == sorted(drawn[i : i + 4] for i in range(0, 53, 4))


@pytest.mark.parametrize("world", [2, 3, 20])
def test_devices_share_the_batches_of_one_in_turn(world: int) -> None:
    alone = BatchSampler(LENGTHS, 4, seed=1)
    each = [list(BatchSampler(LENGTHS, 4, seed=1, rank=r, world_size=world)) for r in range(world)]
    assert {len(e) for e in each} == {len(BatchSampler(LENGTHS, 4, seed=1, world_size=world))}
    in_turn = [batch for step in zip(*each, strict=True) for batch in step]
    assert [b for b in in_turn if b] == list(alone)
    assert all(not b for b in in_turn[len(alone) :])


def test_an_epoch_is_chosen_by_its_number() -> None:
    batches = BatchSampler(LENGTHS, 4, seed=1)
    batches.set_epoch(5)
    assert list(batches) == batches.epoch_batches(5)


def test_bins_hold_what_fits_and_no_more_than_a_fifth_beyond_the_fewest() -> None:
    bins = pack_bins(LENGTHS, 100)
    assert flat(bins) == list(range(53))
    assert max(int(LENGTHS[b].sum()) for b in bins) <= 100
    assert len(bins) <= np.ceil(11 / 9 * np.ceil(LENGTHS.sum() / 100))
    assert pack_bins(np.array([60, 50, 40]), 100) == [[0, 2], [1]]  # the fullest bin that has room
    assert pack_bins(np.array([100, 100]), 100) == [[0], [1]]
