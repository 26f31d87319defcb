"""From rows to a store of tokens: in one pass, on every core, in bounded memory; the mask proven on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.data.chat import ChatTokenizer
from src.data.encode import EncodedRow, EncodingOptions
from src.data.formats import Row, RowError
from src.data.mask_check import MaskVerifier
from src.data.store import Array, RowStore
from src.data.task_encoding import TASK_ENCODINGS
from src.utils.workers import cores, map_ordered

BATCH = 250  # rows that a process is given at once
VERIFIED_FIRST, VERIFIED_SHARE = 10_000, 0.01  # rows whose mask is proven: the first, and a sample of the rest
SMALL = 4_000  # rows below which further processes cost more than they save


class Dropped(NamedTuple):
    """A row and why it is left out, or what was cut from it."""

    row: int
    reason: str
    detail: str


@dataclass
class TokenizeStats:
    """What became of rows. `mask` counts texts that agree, that disagree, and why others have no second way."""

    rejected: list[Dropped] = field(default_factory=list)
    cut: list[Dropped] = field(default_factory=list)
    mask: Counter[str] = field(default_factory=Counter)
    no_end_of_turn: int = 0

    def add(self, other: TokenizeStats) -> None:
        self.rejected += other.rejected
        self.cut += other.cut
        self.mask += other.mask
        self.no_end_of_turn += other.no_end_of_turn


class TokenBatch(NamedTuple):
    """Examples of a batch, end to end: ids, whether each is learnt, and each example's length and row."""

    ids: Array
    loss_mask: Array
    lengths: Array
    rows: Array
    outcome: TokenizeStats


def write_tokens(
    folder: Path,
    store: RowStore,
    kept: Array,
    chat: ChatTokenizer,
    rules: EncodingOptions,
    proven: Array,
    workers: int | None,
) -> tuple[TokenizeStats, Array]:
    """Tokenise the rows numbered `kept` into ids.bin, learnt.bin, ends.npy and rows.npy.

    Args:
        proven: for each row of the store, whether its mask is proven.
    Returns: what became of the rows, and the row of each example.
    """
    prover = MaskVerifier(chat)

    def work(batch: Array) -> TokenBatch:
        return _tokens(batch, store, chat, rules, prover, proven)

    outcome = TokenizeStats()
    lengths, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    processes = 1 if len(kept) < SMALL else workers or cores()
    with ExitStack() as stack:
        ids = stack.enter_context((folder / "ids.bin").open("wb"))
        learnt = stack.enter_context((folder / "learnt.bin").open("wb"))
        for found in map_ordered(work, _batches(kept), processes):
            ids.write(found.ids.tobytes())
            learnt.write(found.loss_mask.tobytes())
            lengths.append(found.lengths)
            rows.append(found.rows)
            outcome.add(found.outcome)
    np.save(folder / "ends.npy", np.cumsum(np.concatenate(lengths)))
    np.save(folder / "rows.npy", np.concatenate(rows))
    return outcome, np.concatenate(rows)


def rows_to_verify(rows: int, every: bool, seed: int) -> Array:
    """For each row whether its mask is proven."""
    if every:
        return np.ones(rows, bool)
    chosen = np.random.default_rng(seed).random(rows) < VERIFIED_SHARE
    chosen[:VERIFIED_FIRST] = True
    return chosen


def _batches(kept: Array) -> Iterator[Array]:
    for start in range(0, len(kept), BATCH):
        yield kept[start : start + BATCH]


def _tokens(
    batch: Array, store: RowStore, chat: ChatTokenizer, rules: EncodingOptions, prover: MaskVerifier, proven: Array
) -> TokenBatch:
    rows = [store.row(int(number)) for number in batch]
    outcome = TokenizeStats()
    ids: list[int] = []
    learnt: list[bool] = []
    lengths: list[int] = []
    owners: list[int] = []
    encoded_rows = TASK_ENCODINGS[rules.task].encode(rows, chat, rules)
    for number, row, encoded in zip(batch.tolist(), rows, encoded_rows, strict=True):
        if isinstance(encoded, EncodedRow) and proven[number]:
            encoded = _proven(row, encoded, prover, outcome.mask)
        if isinstance(encoded, RowError):
            outcome.rejected.append(Dropped(number, encoded.reason, encoded.detail))
            continue
        if encoded.note:
            outcome.cut.append(Dropped(number, "cut", encoded.note))
        outcome.no_end_of_turn += not encoded.ends_turns
        for example in encoded.examples:
            ids += example.ids
            learnt += example.loss_mask
            lengths.append(len(example.ids))
            owners.append(number)
    return TokenBatch(
        np.array(ids, np.int32),
        np.array(learnt, bool),
        np.array(lengths, np.int64),
        np.array(owners, np.int64),
        outcome,
    )


def _proven(row: Row, encoded: EncodedRow, prover: MaskVerifier, counts: Counter[str]) -> EncodedRow | RowError:
    """`encoded`, or why its mask cannot be believed."""
    for text, example in zip(encoded.texts, encoded.full_examples, strict=True):
        agrees, detail = prover.verify(row.messages, row.tools, text, example)
        counts["agrees" if agrees else "disagrees" if agrees is False else detail] += 1
        if agrees is False:
            return RowError("disputed_mask", detail)
    return encoded
