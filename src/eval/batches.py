"""Batch by batch through a part of the evaluation: kept as it comes, in smaller batches if memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from src.errors import OutOfMemory
from src.eval.batching import batch_indices
from src.eval.partial_results import Part
from src.utils.logs import log

Ask = Callable[[list[int], int], Sequence[Mapping[str, Any]]]  # places of examples, number of the batch -> rows


def run_batched(
    ask: Ask, lengths: Sequence[int], size: int, part: Part, *, unpadded: bool = False
) -> tuple[list[dict[str, Any]], int]:
    """A row for each of `lengths`, in their order, from `part` where it is there already.

    A batch that does not fit the memory starts the part anew with half the size, so that all of it has one layout.
    Returns: the rows, and the batch size that they were made with.
    Raises: OutOfMemory if a single example does not fit.
    """
    size = part.size or size
    while True:
        try:
            _through(ask, lengths, size, part, unpadded)
            return [part.rows[i] for i in range(len(lengths))], size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise OutOfMemory(
                    f"out of memory with one prompt at a time, in {part.name}",
                    hint="lower max_new_tokens, or use a smaller model or a larger machine",
                ) from error
        gc.collect()  # the error is gone by now, and with it the frames that held the batch
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
        log.warning("out of memory: %s starts anew with %d at once", part.name, size)
        part.restart(size)


def _through(ask: Ask, lengths: Sequence[int], size: int, part: Part, unpadded: bool) -> None:
    with tqdm(total=len(lengths), initial=len(part.rows), desc=part.name, unit="row", disable=None) as bar:
        for number, places in enumerate(batch_indices(lengths, size, unpadded=unpadded)):
            if part.rows.keys() >= set(places):
                continue
            part.add({i: dict(row) for i, row in zip(places, ask(places, number), strict=True)})
            bar.update(len(places))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is an allocator's error, of a GPU or of the CPU."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
