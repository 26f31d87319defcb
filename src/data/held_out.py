"""Hold rows out of the training data: `eval_split` makes an evaluation split of them.

Rows with equal requests, normalised, form a group that is held out or trained on as a whole. Which groups are held
out depends on the seed and on the requests alone, not on the order of files and rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from ..schema import RowArgs, Task
from ..utils.secrets import redact_secrets
from ..utils.units import count
from ..utils.workers import cores, map_ordered
from .contamination import HeldOutRows, request_text
from .duplicates import normalise
from .formats import TEXT, Row
from .store import Array, DuplicateMatch, RowStore, build_once, content_key, read_lines, write_lines

BATCH = 500  # rows that a process receives at once
SMALL = 4_000  # with fewer rows, further processes cost more than they save
NO_GROUP = 0  # the key of a row that cannot be held out


class HeldOut(NamedTuple):
    """The rows that are held out, and the other rows that match one of them."""

    rows: Array  # (held out rows,), indices in the row store, ascending
    matches: Sequence[DuplicateMatch] = ()
    identity: str = ""  # of the choice, for cache keys; empty if no row is held out
    problem: DataError | None = None  # why no row can be held out


NOTHING = HeldOut(np.zeros(0, np.int64))


def hold_out(store: RowStore, excluded: set[int], args: RowArgs, *, task: Task, cache: Path, seed: int) -> HeldOut:
    """Choose the rows that `eval_split` holds out, and find the other rows that match one of them.

    A row can be held out if it has a request and ends with an answer that is a text with loss. Groups are chosen
    in random order; one that is larger than what is left to choose is skipped. The rows of each label of a
    classification are split separately, and one of them at least is trained on.

    Args:
        excluded: rows that are neither held out nor trained on.
    """
    if args.eval_split is None:
        return NOTHING
    key = content_key(
        rows=store.folder.name, split=args.eval_split, duplicates=args.on_duplicate, task=task, seed=seed,
        near=args.dedup_threshold,
    )  # fmt: skip
    folder = cache / "held_out" / key
    processes = 1 if len(store) < SMALL else args.num_proc or cores()

    def build(temporary: Path) -> None:
        groups, labels = _read_groups(store, processes)
        groups[sorted(excluded)] = NO_GROUP
        if task != "classification":
            labels[:] = 0
        rows = choose_rows(groups, labels, args.eval_split or 0, seed)
        np.save(temporary / "rows.npy", rows)
        others = np.setdiff1d(np.arange(len(store)), [*rows.tolist(), *excluded])
        matches = _matches(store, rows, others, args.dedup_threshold, processes)
        write_lines(temporary / "matches.jsonl", (redact_secrets(list(match)) for match in matches))

    try:
        build_once(folder, build)
    except DataError as error:  # raised after what is wrong with the rows
        return NOTHING._replace(problem=error)
    rows = np.load(folder / "rows.npy")
    matches = [DuplicateMatch(*found) for found in read_lines(folder / "matches.jsonl")]
    return HeldOut(rows, matches, key)


def choose_rows(groups: Array, labels: Array, eval_split: float, seed: int) -> Array:
    """The indices of the rows that are held out, ascending.

    Args:
        groups: (rows,) uint64, equal for rows that belong together; NO_GROUP for a row that cannot be held out.
        labels: (rows,) uint64; each label is split separately.
        eval_split: a share of the rows, or their number from 1.
    Raises: DataError if `eval_split` leaves no row to train on, or none to hold out.
    """
    able = np.flatnonzero(groups != NO_GROUP)
    wanted = int(eval_split) if eval_split >= 1 else round(eval_split * len(able))
    setting = f"eval_split={eval_split:g}"
    if not len(able):
        raise DataError(
            f"{setting}: no row has a request and an answer to hold out",
            hint="leave eval_split out; for documents, set eval_path and dev_split to have an evaluation loss",
        )
    rows = count(len(able), "row")
    if wanted >= len(able):
        fact = f"{setting} of {rows} that can be held out leaves none to train on"
        raise DataError(fact, hint="set eval_split to a smaller share or number, or add rows")
    if wanted < 1:
        fact = f"{setting} of {rows} that can be held out is less than one row"
        raise DataError(fact, hint="set eval_split to a number of rows from 1, or add rows")
    _, first, inverse, sizes = np.unique(groups[able], return_index=True, return_inverse=True, return_counts=True)
    ranks = _mix(groups[able][first] ^ _mix(np.array([seed], np.uint64)))
    chosen = _choose_groups(ranks, sizes, labels[able][first], wanted)
    if not chosen.any() and (np.unique(labels[able], return_counts=True)[1] == 1).all():
        fact = f"{setting}: each label has one row, which is trained on"
        raise DataError(fact, hint="add rows, or set eval_path to a file of other rows")
    if not chosen.any():
        raise DataError(
            f"{setting}: rows with the same request are not separated, and every group of them has more than "
            f"{count(wanted, 'row')}",
            hint="set a larger eval_split, or eval_path to a file of other questions",
        )
    held: Array = able[chosen[inverse.ravel()]]
    return held


def _choose_groups(ranks: Array, sizes: Array, labels: Array, wanted: int) -> Array:
    """(groups,) bool: groups in the order of `ranks`, each label up to its share of `wanted` rows."""
    names, of_label = np.unique(labels, return_inverse=True)
    total = np.bincount(of_label, weights=sizes).astype(np.int64)
    share = wanted * total / total.sum()
    budget = np.floor(share).astype(np.int64)
    for label in np.argsort(budget - share, kind="stable")[: wanted - int(budget.sum())]:  # the largest remainders
        budget[label] += 1
    if len(names) > 1:
        budget = np.minimum(budget, total - 1)
    chosen = np.zeros(len(sizes), bool)
    for group in np.argsort(ranks, kind="stable").tolist():
        if sizes[group] <= budget[of_label[group]]:
            budget[of_label[group]] -= sizes[group]
            chosen[group] = True
    return chosen


def write_held_out(path: Path, rows: Iterator[Row]) -> None:
    """Write rows as an evaluation file: their conversations, as they were read from any format."""
    write_lines(path, map(_as_messages, rows))


def _as_messages(row: Row) -> dict[str, Any]:
    beside = {"tools": row.tools, "chat_template_kwargs": row.template_kwargs}
    return {"messages": row.messages} | {key: value for key, value in beside.items() if value}


def _read_groups(store: RowStore, processes: int) -> tuple[Array, Array]:
    """(rows,) twice: a hash of the normalised request of each row, or NO_GROUP; and a hash of its answer."""

    def work(batch: Array) -> Array:
        return np.array([_group(store.row(int(number))) for number in batch], np.uint64)

    found = [np.zeros((0, 2), np.uint64), *map_ordered(work, _batches(np.arange(len(store))), processes)]
    both = np.concatenate(found)
    return both[:, 0].copy(), both[:, 1].copy()


def _group(row: Row) -> tuple[int, int]:
    last = row.messages[-1]
    if row.messages[0]["role"] == TEXT or not last["content"].strip() or last.get("weight") == 0:
        return NO_GROUP, 0
    return _hash(normalise(request_text(row.messages))), _hash(last["content"].strip())


def _matches(
    store: RowStore, held_out: Array, others: Array, threshold: float, processes: int
) -> Iterator[DuplicateMatch]:
    """The rows of `others` that match a row that is held out, ordered by row."""
    held = (store.row(number) for number in held_out.tolist())
    index = HeldOutRows(((str(row.file), row.line, row.messages) for row in held), threshold)

    def work(batch: Array) -> list[DuplicateMatch]:
        found = index.matches([store.row(int(number)).messages for number in batch], {})
        pairs = zip(batch.tolist(), found, strict=True)
        return [DuplicateMatch(number, m.kind, m.similarity, m.file, m.line) for number, m in pairs if m]

    for found in map_ordered(work, _batches(others), processes):
        yield from found


def _batches(rows: Array) -> Iterator[Array]:
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def _hash(text: str) -> int:
    """A 64-bit hash from 1."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def _mix(values: Array) -> Array:
    """A bijection of 64-bit numbers without structure (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = values ^ (values >> np.uint64(31))
    return mixed
