"""What shape the rows of a file have: for `data_format=auto`, and for saying why none of them could be used."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from src.data.column_mapping import strategy_of
from src.data.formats import FORMATS, Rejection, RowError, count_formats
from src.data.readers import read_values
from src.errors import DataError
from src.schema import ColumnArgs, DataFormat
from src.utils.logs import log

LOOKED_AT = 100  # rows of a file
GZIP = b"\x1f\x8b"
BY_COLUMN = "name the columns with question_key and answer_key, or set data_format"


def resolve_format(path: Path, asked: DataFormat, columns: ColumnArgs) -> str:
    """The format asked for, or the one that most of the first rows have; columns go before both.

    Raises: DataError if none has one.
    """
    if strategy_of(columns):
        return str(strategy_of(columns))
    if asked != "auto":
        return asked
    rows = _first_values(path)
    found = count_formats(rows)
    if not found:
        told = f"data_format=auto knows none of its first {len(rows)} rows: {_columns(rows)}"
        raise DataError(f"{path}: {told}", hint=BY_COLUMN)
    name, count = found.most_common(1)[0]
    log.info("%s: data_format=auto found %s (%d of the first %d rows)", path, name, count, len(rows))
    return name


def explain_misfit(first: Rejection, rows_in: int, asked: str) -> str:
    """Why no row of a file can be used, and what to do about it: one sentence for all of them.

    Args:
        first: the first row of the file, as it was rejected.
        asked: the format that the rows were taken for, or the strategy.
    """
    rows = _first_values(first.file)
    found = count_formats(rows).most_common(1)
    fact, remedy = f"line {first.line} {first.detail}", "fix the rows"
    if all(isinstance(row, RowError) for row in rows):
        remedy = _other_file(first.file) or remedy
    elif asked not in FORMATS:
        fact, remedy = f"{fact}; {_columns(rows)}", "name others with question_key and answer_key"
    elif found and found[0][0] != asked:
        fact, remedy = f"{fact}; its rows look like {found[0][0]}", f"set data_format={found[0][0]}"
    elif not found:
        fact, remedy = f"{fact}; {_columns(rows)}", BY_COLUMN
    return f"{first.file}: none of its {rows_in:,} rows can be used as {asked}: {fact}; {remedy}"


def _first_values(path: Path) -> list[object]:
    return [value for _, value in islice(read_values(path), LOOKED_AT)]


def _columns(rows: list[object]) -> str:
    keys = sorted({str(key) for row in rows if isinstance(row, dict) for key in row})
    return f"its rows have {', '.join(keys[:12])}" if keys else "it has no row with columns"


def _other_file(path: Path) -> str:
    """What to do with a file that is not what its name says."""
    with path.open("rb") as file:
        begin = file.read(4096).lstrip()
    if begin.startswith(GZIP):
        return f"it is packed with gzip: name it {path.name}.gz"
    return "make convert turns JSON of many lines into a row a line" if begin[:1] in (b"[", b"{") else ""
