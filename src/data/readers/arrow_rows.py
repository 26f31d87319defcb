"""Read Parquet and Arrow files row by row, in bounded memory.

The position of a row is its number. Lists and structs become Python objects. A null in a struct is left out:
all structs of a column have the same fields, and Arrow fills in those that a row lacks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ..conversation import RowError
from .stream import CHUNK_BYTES, CorruptFile, ReadOptions, Values

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch
    from pyarrow.parquet import ParquetFile

BATCH_BYTES = 16 << 20  # of rows that are decoded at once
BATCH_ROWS = 1024
FILE_FORMAT = b"ARROW1"  # how Arrow's file format (Feather) begins; its stream format has no such mark


def read_parquet(file: io.BufferedReader, path: Path, _options: ReadOptions) -> Values:
    """Each row of a Parquet file as a dict."""
    from pyarrow.parquet import ParquetFile

    with _corrupt_if_refused():
        parquet = ParquetFile(file, buffer_size=CHUNK_BYTES, page_checksum_verification=True)
        _check_names(parquet.schema_arrow.names, path)
        yield from _numbered(parquet.iter_batches(batch_size=_batch_rows(parquet)))


def read_arrow(file: io.BufferedReader, path: Path, _options: ReadOptions) -> Values:
    """Each row of an Arrow file as a dict, in the stream format, which `datasets` writes, or the file format."""
    from pyarrow import ipc

    with _corrupt_if_refused():
        if file.peek(len(FILE_FORMAT)).startswith(FILE_FORMAT):
            opened = ipc.open_file(file)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            opened = ipc.open_stream(file)
            batches = iter(opened)
        _check_names(opened.schema.names, path)
        yield from _numbered(part for batch in batches for part in _pieces(batch))


@contextmanager
def _corrupt_if_refused() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise CorruptFile(str(error).partition("\n")[0]) from error


def _numbered(batches: Iterator[RecordBatch]) -> Values:
    number = 0
    for batch in batches:
        cleaners = _cleaners(batch)
        for row in _rows(batch):
            number += 1
            if not isinstance(row, RowError):
                row.update((name, clean(row[name])) for name, clean in cleaners.items())
            yield number, row


def _cleaners(batch: RecordBatch) -> dict[str, Callable[[Any], Any]]:
    """For the columns that need it, a function that makes of a cell what JSON would hold."""
    found = {field.name: _cleaner(field.type) for field in batch.schema}
    return {name: clean for name, clean in found.items() if clean}


def _cleaner(kind: DataType) -> Callable[[Any], Any] | None:
    import pyarrow.types as types

    if types.is_struct(kind):
        inner = {field.name: _cleaner(field.type) for field in kind}
        return lambda cell: (
            cell
            and {
                name: clean(value) if (clean := inner[name]) else value
                for name, value in cell.items()
                if value is not None
            }
        )
    if types.is_map(kind):
        of_value = _cleaner(kind.item_type)
        return lambda cell: cell and {name: of_value(value) if of_value else value for name, value in cell}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        of_item = _cleaner(kind.value_type)
        return of_item and (lambda cell: cell and [of_item(item) for item in cell])
    return next((as_text for is_kind, as_text in TEXTS.items() if getattr(types, is_kind)(kind)), None)


def _time(cell: Any) -> str | None:
    """As in a workbook: a date, and the time unless it is midnight."""
    return cell and str(cell).removesuffix(" 00:00:00")


TEXTS: dict[str, Callable[[Any], Any]] = {  # a test of pyarrow.types -> the text of such a cell
    "is_decimal": lambda cell: cell if cell is None else format(cell, "f"),
    "is_timestamp": _time,
    "is_date": _time,
    "is_time": lambda cell: cell if cell is None else str(cell),
}


def _pieces(batch: RecordBatch) -> Iterator[RecordBatch]:
    """A batch in pieces of about BATCH_BYTES."""
    rows = _rows_at_once(batch.nbytes // max(1, batch.num_rows))
    return (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _check_names(names: list[str], path: Path) -> None:
    """Raises: DataError if two columns share a name, of which a dict would keep the last only."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(*(f"{path} names the column {name!r} twice" for name in twice), hint="rename one of them")


def _batch_rows(parquet: ParquetFile) -> int:
    groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
    return _rows_at_once(max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0))


def _rows_at_once(row_bytes: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))


def _rows(batch: RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [row for i in range(batch.num_rows) for row in _single_row(batch.slice(i, 1))]


def _single_row(batch: RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [RowError("not_utf8", "has text that is not UTF-8")]
    except (ValueError, OverflowError) as error:
        return [RowError("not_python", f"has a value that cannot be read: {error}")]
