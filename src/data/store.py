"""Rows and tokens on disk: written whole or not at all, found again by what they were made of, read in place.

CACHE/rows/<key>/    rows.jsonl (a usable row a line), places.npy, rejected.jsonl, duplicates.jsonl,
                     contamination.jsonl, about.json
CACHE/tokens/<key>/  ids.bin, learnt.bin, ends.npy, rows.npy, order.npy, data_report.json
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.data.formats import Rejection, Row
from src.errors import RunError
from src.utils.files import atomic_dir, code_hash, read_json, write_json

Array = np.ndarray[Any, np.dtype[Any]]
PACKAGE = Path(__file__).parent
IGNORE_INDEX = -100  # label of a token without loss: ignore_index of torch.nn.CrossEntropyLoss


class Example(NamedTuple):
    """Token ids, and for each whether there is loss on it. Equal lengths."""

    ids: list[int]
    loss_mask: list[bool]

    @property
    def labels(self) -> list[int]:
        """The id where there is loss, IGNORE_INDEX elsewhere."""
        return [i if on else IGNORE_INDEX for i, on in zip(self.ids, self.loss_mask, strict=True)]


class DuplicateMatch(NamedTuple):
    """A row that says what an earlier row, or an evaluation row, says: `kind` is exact, normalised or near."""

    row: int
    kind: str
    similarity: float
    file: str
    line: int

    @property
    def detail(self) -> str:
        like = f"{self.kind} duplicate" if self.kind != "near" else f"near duplicate ({self.similarity:.2f})"
        return f"is the {like} of {self.file}:{self.line}"


def content_key(**made_of: Any) -> str:
    """The name of what is made of `made_of` by the code of this package."""
    text = json.dumps(made_of | {"code": code_hash(PACKAGE)}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Have `make(temporary)` fill `folder` unless it is there whole.

    A folder counts as whole if its list of files and sizes, written last, is met.
    """
    if _whole(folder):
        return
    with atomic_dir(folder) as temporary:
        make(temporary)
        write_json(temporary / "sizes.json", {f.name: f.stat().st_size for f in temporary.iterdir()})


def _whole(folder: Path) -> bool:
    try:
        sizes = read_json(folder / "sizes.json")
    except RunError:
        return False
    return isinstance(sizes, dict) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()
    )


class RowStore:
    """The usable rows of a set of files, and what was found out about the others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = read_json(folder / "about.json")
        self.files = [Path(file["file"]) for file in self.about["files"]]
        self._places: Array = np.load(folder / "places.npy", mmap_mode="r")
        self._rows = (folder / "rows.jsonl").open("rb")

    def __len__(self) -> int:
        return len(self._places) - 1

    def file_indices(self, rows: Array) -> Array:
        """The index of each row's file."""
        return np.searchsorted(self.about["first_rows"], rows, side="right") - 1

    def rejection(self, row: int, reason: str, detail: str) -> Rejection:
        """The place of a usable row that is not used after all."""
        found = self.row(row)
        return Rejection(found.file, found.line, reason, detail)

    def location(self, row: int) -> str:
        """`file:line` of a row."""
        found = self.row(row)
        return f"{found.file}:{found.line}"

    def row(self, row: int) -> Row:
        start, end = int(self._places[row]), int(self._places[row + 1])
        # one call without a shared position: forked processes read the same open file
        file, line, messages, tools = json.loads(os.pread(self._rows.fileno(), end - start, start))
        return Row(self.files[file], line, messages, tools)

    def rejected(self) -> Iterator[Rejection]:
        for file, line, reason, detail in _read_lines(self.folder / "rejected.jsonl"):
            yield Rejection(self.files[file], line, reason, detail)

    def matches(self, what: str) -> Iterator[DuplicateMatch]:
        """What was found of `what`: duplicates or contamination."""
        yield from (DuplicateMatch(*found) for found in _read_lines(self.folder / f"{what}.jsonl"))


class TokenCounts(NamedTuple):
    """Of each example, how many tokens it has, and how many of them are learnt."""

    tokens: Array
    with_loss: Array

    @classmethod
    def of(cls, folder: Path) -> TokenCounts:
        ends = np.load(folder / "ends.npy")
        if not len(ends):
            return cls(ends, ends)
        learnt = np.memmap(folder / "learnt.bin", np.uint8, "r")
        starts = np.concatenate([[0], ends[:-1]])
        return cls(np.diff(ends, prepend=0), np.add.reduceat(learnt, starts, dtype=np.int64))


class TokenStore(Sequence[Example]):
    """Tokenised examples as an epoch sees them, in order and number; read from disk as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report: dict[str, Any] = read_json(folder / "data_report.json")
        self._order: Array = np.load(folder / "order.npy", mmap_mode="r")
        self._ends: Array = np.load(folder / "ends.npy", mmap_mode="r")
        self._rows: Array = np.load(folder / "rows.npy", mmap_mode="r")
        empty = np.zeros(0, dtype=np.int32)
        self._ids: Array = np.memmap(folder / "ids.bin", np.int32, "r") if len(self._ends) else empty
        self._learnt: Array = np.memmap(folder / "learnt.bin", np.bool_, "r") if len(self._ends) else empty

    def __len__(self) -> int:
        return len(self._order)

    @property
    def lengths(self) -> Array:
        """Tokens of each example, (examples,)."""
        return np.diff(self._ends, prepend=0)[self._order]

    def row_of(self, index: int) -> int:
        """The row of the RowStore that an example was made of."""
        return int(self._rows[int(self._order[index])])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = int(self._order[index])
        start, end = int(self._ends[example - 1]) if example else 0, int(self._ends[example])
        return Example(self._ids[start:end].tolist(), self._learnt[start:end].tolist())


def write_lines(path: Path, values: Iterator[Any]) -> None:
    """One JSON value a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
