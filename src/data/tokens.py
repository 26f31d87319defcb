"""Tokenize rows into a token store: one pass, on every core, in bounded memory, with the loss mask verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..utils.progress import progress
from ..utils.workers import cores, map_ordered
from .chat import ChatTokenizer
from .content_check import DroppedContent
from .encode import EncodedRow, EncodingOptions
from .formats import Row, RowError
from .mask_check import MaskVerifier
from .store import Array, RowStore
from .task_encoding import TASK_ENCODINGS

BATCH = 250  # rows that a process receives at once
# Rows whose mask is verified: the first, and a share of the rest. A wrong mask follows from the template and the
# shape of a row: among 5,000 rows is a shape that one row in a thousand has, with a probability of 99 %.
VERIFIED_FIRST, VERIFIED_SHARE = 5_000, 0.01
SMALL = 4_000  # with fewer rows, further processes cost more than they save


class Dropped(NamedTuple):
    """A row and why it is dropped, or what was cut from it."""

    row: int
    reason: str
    detail: str


class Tally(NamedTuple):
    """A number of rows, how many of them are rejected, and the first."""

    rows: int
    rejected: int
    first: int

    def plus(self, other: Tally) -> Tally:
        return Tally(self.rows + other.rows, self.rejected + other.rejected, min(self.first, other.first))


def add_tally(tallies: dict[str, Tally], what: str, tally: Tally) -> None:
    tallies[what] = tallies[what].plus(tally) if what in tallies else tally


@dataclass
class TokenizeStats:
    """What became of the rows. `mask` counts checks: `agrees`, `disagrees`, or why one was not possible."""

    rejected: list[Dropped] = field(default_factory=list)
    cut: list[Dropped] = field(default_factory=list)
    mask: Counter[str] = field(default_factory=Counter)
    no_end_of_turn: int = 0
    with_thoughts: int = 0  # rows whose trained answers have thoughts
    dropped: dict[str, Tally] = field(default_factory=dict)  # by kind of what a template leaves out
    changed: dict[str, Tally] = field(default_factory=dict)  # by what a template gets in another form

    def add(self, other: TokenizeStats) -> None:
        self.rejected += other.rejected
        self.cut += other.cut
        self.mask += other.mask
        self.no_end_of_turn += other.no_end_of_turn
        self.with_thoughts += other.with_thoughts
        for tallies, more in ((self.dropped, other.dropped), (self.changed, other.changed)):
            for what, tally in more.items():
                add_tally(tallies, what, tally)

    def count(self, row: int, encoded: EncodedRow | RowError) -> None:
        """Count what the template leaves out of a row, or gets in another form."""
        if isinstance(encoded, DroppedContent):
            for what in encoded.kinds:
                add_tally(self.dropped, what, Tally(1, 1, row))
        if isinstance(encoded, EncodedRow):
            for tallies, kinds in ((self.dropped, encoded.dropped), (self.changed, encoded.changed)):
                for what in kinds:
                    add_tally(tallies, what, Tally(1, 0, row))


class TokenBatch(NamedTuple):
    """The examples of a batch, concatenated: (tokens,) ids and loss mask, (examples,) length and row of each."""

    ids: Array
    loss_mask: Array
    lengths: Array
    rows: Array
    stats: TokenizeStats


def write_tokens(
    folder: Path,
    store: RowStore,
    kept: Array,
    chat: ChatTokenizer,
    options: EncodingOptions,
    verified: Array,
    workers: int | None,
) -> tuple[TokenizeStats, Array]:
    """Tokenize the rows with the indices `kept` into ids.bin, loss_mask.bin, ends.npy and rows.npy.

    Args:
        verified: (rows of the store,), whether the mask of each row is to be verified.
    Returns: the statistics, and (examples,), the row of each example.
    """
    verifier = MaskVerifier(chat)

    def work(batch: Array) -> TokenBatch:
        return _tokenize_batch(batch, store, chat, options, verifier, verified)

    stats = TokenizeStats()
    lengths, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    processes = 1 if len(kept) < SMALL else workers or cores()
    with ExitStack() as stack:
        ids = stack.enter_context((folder / "ids.bin").open("wb"))
        mask = stack.enter_context((folder / "loss_mask.bin").open("wb"))
        bar = stack.enter_context(progress("tokenizing", len(kept), "row"))
        for batch, found in zip(_batches(kept), map_ordered(work, _batches(kept), processes), strict=True):
            ids.write(found.ids.tobytes())
            mask.write(found.loss_mask.tobytes())
            lengths.append(found.lengths)
            rows.append(found.rows)
            stats.add(found.stats)
            bar.add(len(batch))
    np.save(folder / "ends.npy", np.cumsum(np.concatenate(lengths)))
    np.save(folder / "rows.npy", np.concatenate(rows))
    return stats, np.concatenate(rows)


def check_rows(
    store: RowStore, rows: Array, chat: ChatTokenizer, options: EncodingOptions, workers: int | None
) -> tuple[Array, list[Dropped]]:
    """The indices `rows` that can be encoded, in order, and why the others cannot."""
    if not len(rows):
        return rows, []

    def work(batch: Array) -> list[Dropped]:
        encoded = TASK_ENCODINGS[options.task].encode([store.row(int(number)) for number in batch], chat, options)
        failed = [(n, e) for n, e in zip(batch.tolist(), encoded, strict=True) if isinstance(e, RowError)]
        return [Dropped(number, error.reason, error.detail) for number, error in failed]

    processes = 1 if len(rows) < SMALL else workers or cores()
    failed = [row for found in map_ordered(work, _batches(rows), processes) for row in found]
    return np.setdiff1d(rows, [row.row for row in failed]), failed


def rows_to_verify(rows: int, every: bool, seed: int) -> Array:
    """(rows,): whether the mask of each row is to be verified."""
    if every:
        return np.ones(rows, bool)
    chosen = np.random.default_rng(seed).random(rows) < VERIFIED_SHARE
    chosen[:VERIFIED_FIRST] = True
    return chosen


def _batches(kept: Array) -> Iterator[Array]:
    for start in range(0, len(kept), BATCH):
        yield kept[start : start + BATCH]


def _tokenize_batch(
    batch: Array,
    store: RowStore,
    chat: ChatTokenizer,
    options: EncodingOptions,
    verifier: MaskVerifier,
    verified: Array,
) -> TokenBatch:
    rows = [store.row(int(number)) for number in batch]
    stats = TokenizeStats()
    ids: list[int] = []
    loss_mask: list[bool] = []
    lengths: list[int] = []
    owners: list[int] = []
    encoded_rows = TASK_ENCODINGS[options.task].encode(rows, chat, options)
    _verify(rows, encoded_rows, verified[batch], verifier, stats.mask, options.on_disputed_mask)
    for number, encoded in zip(batch.tolist(), encoded_rows, strict=True):
        stats.count(number, encoded)
        if isinstance(encoded, RowError):
            stats.rejected.append(Dropped(number, encoded.reason, encoded.detail))
            continue
        if encoded.note:
            stats.cut.append(Dropped(number, "cut", encoded.note))
        stats.no_end_of_turn += not encoded.ends_turns
        stats.with_thoughts += encoded.with_thoughts
        for example in encoded.examples:
            ids += example.ids
            loss_mask += example.loss_mask
            lengths.append(len(example.ids))
            owners.append(number)
    return TokenBatch(
        np.array(ids, np.int32),
        np.array(loss_mask, bool),
        np.array(lengths, np.int64),
        np.array(owners, np.int64),
        stats,
    )


def _verify(
    rows: Sequence[Row],
    encoded_rows: list[EncodedRow | RowError],
    chosen: Array,
    verifier: MaskVerifier,
    counts: Counter[str],
    on_dispute: str,
) -> None:
    """Verify the `chosen` rows, (rows,), and replace those whose mask is in doubt by the reason."""
    found = [(i, e) for i, e in enumerate(encoded_rows) if isinstance(e, EncodedRow) and chosen[i]]
    texts = [(i, *pair) for i, e in found for pair in zip(e.texts, e.full_examples, strict=True)]
    checks = verifier.verify_all([(rows[i].conversation, text, example) for i, text, example in texts])
    for (i, *_), (agrees, detail) in zip(texts, checks, strict=True):
        if isinstance(encoded_rows[i], RowError):  # one text in doubt is enough
            continue
        counts["agrees" if agrees else "disagrees" if agrees is False else detail] += 1
        if agrees is False and on_dispute == "reject":
            encoded_rows[i] = RowError("disputed_mask", detail)
