"""Rows and tokenized examples on disk: written atomically, cached under a hash of their inputs, read in place.

CACHE/rows/<key>/    rows.jsonl (one usable row a line), places.npy, rejected.jsonl, duplicates.jsonl,
                     contamination.jsonl, about.json
CACHE/held_out/<key>/  rows.npy, matches.jsonl: the choice of `eval_split`
CACHE/tokens/<key>/  ids.bin, loss_mask.bin, ends.npy, rows.npy, order.npy, data_report.json, held_out.jsonl
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import RunError
from ..utils.files import atomic_dir, code_hash, read_json, write_json
from .formats import Rejection, Row

Array = np.ndarray[Any, np.dtype[Any]]
PACKAGE = Path(__file__).parent
IGNORE_INDEX = -100  # label of a token without loss: ignore_index of torch.nn.CrossEntropyLoss


class Example(NamedTuple):
    """Token ids, and for each token whether it carries loss. Equal lengths."""

    ids: list[int]
    loss_mask: list[bool]

    @property
    def labels(self) -> list[int]:
        """The token id where there is loss, IGNORE_INDEX elsewhere."""
        return [i if on else IGNORE_INDEX for i, on in zip(self.ids, self.loss_mask, strict=True)]


class DuplicateMatch(NamedTuple):
    """A row that duplicates the earlier row, or the evaluation row, at file:line. `kind` is one of KINDS."""

    row: int
    kind: str
    similarity: float
    file: str
    line: int

    @property
    def detail(self) -> str:
        kind = f"{self.kind} duplicate" if self.kind != "near" else f"near duplicate ({self.similarity:.2f})"
        return f"is the {kind} of {self.file}:{self.line}"


def content_key(**inputs: Any) -> str:
    """A cache key: a hash of `inputs` and of the code of this package."""
    text = json.dumps(inputs | {"code": code_hash(PACKAGE)}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Have `build(temporary folder)` fill `folder`, unless `folder` is complete.

    A folder is complete if its files have the sizes that sizes.json lists. That file is written last.
    """
    if _is_complete(folder):
        return
    with atomic_dir(folder) as temporary:
        build(temporary)
        write_json(temporary / "sizes.json", {f.name: f.stat().st_size for f in temporary.iterdir()})


def _is_complete(folder: Path) -> bool:
    try:
        sizes = read_json(folder / "sizes.json")
    except RunError:
        return False
    return isinstance(sizes, dict) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()
    )


class RowStore:
    """The usable rows of a set of files, the rejected ones, and the duplicates and contamination found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = read_json(folder / "about.json")
        self.files = [Path(file["file"]) for file in self.about["files"]]
        self._offsets: Array = np.load(folder / "places.npy", mmap_mode="r")
        self._rows = (folder / "rows.jsonl").open("rb")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def file_indices(self, rows: Array) -> Array:
        """The index of each row's file."""
        return np.searchsorted(self.about["first_rows"], rows, side="right") - 1

    def rejection(self, row: int, reason: str, detail: str) -> Rejection:
        """The rejection of a row that can be read but is not trained on."""
        found = self.row(row)
        return Rejection(found.file, found.line, reason, detail)

    def location(self, row: int) -> str:
        """`file:line` of a row."""
        found = self.row(row)
        return f"{found.file}:{found.line}"

    def row(self, row: int) -> Row:
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        # pread, since forked processes share the position of the file
        file, *rest = json.loads(os.pread(self._rows.fileno(), end - start, start))
        return Row(self.files[file], *rest)

    def rejected(self) -> Iterator[Rejection]:
        for file, line, reason, rows, detail in read_lines(self.folder / "rejected.jsonl"):
            yield Rejection(self.files[file], line, reason, detail, rows)

    def matches(self, what: str) -> Iterator[DuplicateMatch]:
        """The matches of a kind: `duplicates` or `contamination`."""
        yield from (DuplicateMatch(*found) for found in read_lines(self.folder / f"{what}.jsonl"))


class TokenCounts(NamedTuple):
    """The number of tokens of each example, and of those with loss, (examples,) each."""

    tokens: Array
    with_loss: Array

    @classmethod
    def of(cls, folder: Path) -> TokenCounts:
        ends = np.load(folder / "ends.npy")
        if not len(ends):
            return cls(ends, ends)
        mask = np.memmap(folder / "loss_mask.bin", np.uint8, "r")
        starts = np.concatenate([[0], ends[:-1]])
        return cls(np.diff(ends, prepend=0), np.add.reduceat(mask, starts, dtype=np.int64))


class TokenStore(Sequence[Example]):
    """The tokenized examples of an epoch, in order and with repeats, read from disk on access."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report: dict[str, Any] = read_json(folder / "data_report.json")
        self._order: Array = np.load(folder / "order.npy", mmap_mode="r")
        self._ends: Array = np.load(folder / "ends.npy", mmap_mode="r")
        self._rows: Array = np.load(folder / "rows.npy", mmap_mode="r")
        empty = np.zeros(0, dtype=np.int32)
        self._ids: Array = np.memmap(folder / "ids.bin", np.int32, "r") if len(self._ends) else empty
        self._loss_mask: Array = np.memmap(folder / "loss_mask.bin", np.bool_, "r") if len(self._ends) else empty

    def __len__(self) -> int:
        return len(self._order)

    @property
    def lengths(self) -> Array:
        """The number of tokens of each example, (examples,)."""
        return np.diff(self._ends, prepend=0)[self._order]

    @property
    def row_indices(self) -> Array:
        """The rows with an example, by their index in the RowStore, ascending."""
        return np.unique(self._rows)

    def row_of(self, index: int) -> int:
        """The index in the RowStore of the row of an example."""
        return int(self._rows[int(self._order[index])])

    def tokens_beyond(self, rows: int) -> tuple[int, int, int] | None:
        """`(row, token id, number of such rows)` of the first token with an id of `rows` or more; None without."""
        found = np.flatnonzero(self._ids >= rows)
        if not len(found):
            return None
        owners = self._rows[np.searchsorted(self._ends, found, side="right")]
        return int(owners[0]), int(self._ids[found[0]]), len(np.unique(owners))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = int(self._order[index])
        start, end = int(self._ends[example - 1]) if example else 0, int(self._ends[example])
        return Example(self._ids[start:end].tolist(), self._loss_mask[start:end].tolist())


def write_lines(path: Path, values: Iterator[Any]) -> None:
    """Write one JSON value a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def read_lines(path: Path) -> Iterator[Any]:
    """The JSON value of each line."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
