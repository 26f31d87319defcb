"""Read data files of every kind, row by row.

To add a kind, write a function `(open file, path) -> iterator of (position, value)` and enter it in READERS by its
suffix. It reads in bounded memory and skips blank lines only: a row that cannot be read is yielded as a RowError.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from ...errors import DataError
from .json_rows import read_json, read_jsonl
from .stream import ARCHIVES, CorruptFile, Values, open_data
from .tables import read_csv, read_parquet, read_tsv

BELONGS_TO = "belongs_to.json"  # says which training files a folder of evaluation files is for; no data

READERS: dict[str, Callable[[io.BufferedReader, Path], Values]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}


def read_values(path: Path) -> Values:
    """`(position, value)` of each row. The position is its first line or, in Parquet, its number, both from 1.

    A RowError as value stands for a row that cannot be read.

    Raises: DataError, on iteration, if the file cannot be used: its kind is unknown, it cannot be opened, its
    header does not name the columns, or it is corrupt (after the rows before the corruption).
    """
    reader, rows = READERS[file_kind(path)], 0
    try:
        with open_data(path) as file:
            for position, value in reader(file, path):
                rows += 1
                yield position, value
    except CorruptFile as error:
        where = f"after row {rows}" if rows else "before its first row"
        problem = f"{path} is truncated or corrupt {where}: {error}"
        raise DataError(problem, hint="fetch or create the file again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", hint="check the path") from error


def file_kind(path: Path) -> str:
    """The suffix in READERS of a file name, without the suffix of a compression.

    Raises: DataError if the suffix is unknown.
    """
    compressed = path.suffix.lower() in ARCHIVES
    kind = (Path(path.stem) if compressed else path).suffix.lower()
    if kind not in READERS:
        known = f"{', '.join(READERS)}, and text files also with {' or '.join(ARCHIVES)}"
        raise DataError(f"{path} has an unsupported extension", hint=f"supported are {known}")
    if compressed and kind == ".parquet":
        raise DataError(
            f"{path} is compressed twice: Parquet is compressed already", hint=f"unpack it to {path.stem}"
        )
    return kind


def is_data_file(path: Path) -> bool:
    """Whether a file of this name has a reader, and is data."""
    try:
        return bool(file_kind(path)) and path.name != BELONGS_TO
    except DataError:
        return False
