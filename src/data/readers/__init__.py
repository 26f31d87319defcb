"""Data files of every kind, row by row: what a file holds comes out, or a sentence about why it does not.

To add a kind, write a function `(open file, path) -> (place, value) ...` and enter it under its suffix in READERS.
Each reads in bounded memory, and skips nothing but blank lines: a row that cannot be read is a RowError.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from src.data.readers.json_rows import read_json, read_jsonl
from src.data.readers.stream import ARCHIVES, CorruptFile, Values, open_data
from src.data.readers.tables import read_csv, read_parquet, read_tsv
from src.errors import DataError

READERS: dict[str, Callable[[io.BufferedReader, Path], Values]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}


def read_values(path: Path) -> Values:
    """`(place, value)` of each row: the line that it starts on, or in Parquet its number, both from 1.

    A RowError stands for a row that cannot be read.

    Raises: DataError, once values are asked for, if the whole file cannot be used: its kind is unknown, it cannot
    be opened, its header does not name the columns, or it is damaged (then the rows before the damage come first).
    """
    reader, rows = READERS[file_kind(path)], 0
    try:
        with open_data(path) as file:
            for place, value in reader(file, path):
                rows += 1
                yield place, value
    except CorruptFile as error:
        where = f"after row {rows}" if rows else "before its first row"
        problem = f"{path} is cut off or damaged {where}: {error}"
        raise DataError(problem, hint="fetch or make the file again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", hint="check the path") from error


def file_kind(path: Path) -> str:
    """The suffix in READERS that says how a file is read, whatever it is compressed with.

    Raises: DataError if the name tells no known kind.
    """
    packed = path.suffix.lower() in ARCHIVES
    kind = (Path(path.stem) if packed else path).suffix.lower()
    if kind not in READERS:
        known = f"{', '.join(READERS)}, and text also followed by {' or '.join(ARCHIVES)}"
        raise DataError(f"{path} is of no known kind", hint=f"known are {known}")
    if packed and kind == ".parquet":
        raise DataError(f"{path} is packed twice: Parquet compresses by itself", hint=f"unpack it to {path.stem}")
    return kind


def is_data_file(path: Path) -> bool:
    """Whether `read_values` knows files of this name."""
    try:
        return bool(file_kind(path))
    except DataError:
        return False
