"""Read Parquet files row by row, in bounded memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.data.formats import RowError
from src.data.readers.compressed import CorruptFile
from src.data.readers.text import CHUNK_BYTES, Values
from src.errors import DataError

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

BATCH_BYTES = 16 << 20  # of the rows that are decoded at once
BATCH_ROWS = 1024


def read_parquet(file: io.BufferedReader, path: Path) -> Values:
    """Each row as a dict; its place is its number. Lists, structs and nulls become Python's."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        parquet = ParquetFile(file, buffer_size=CHUNK_BYTES, page_checksum_verification=True)
        _check_names(parquet.schema_arrow.names, path)
        for batch in parquet.iter_batches(batch_size=_batch_rows(parquet)):
            for number, row in enumerate(_rows(batch), number + 1):  # noqa: B020, number goes on counting
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise CorruptFile(str(error).partition("\n")[0]) from error


def _check_names(names: list[str], path: Path) -> None:
    """Raises: DataError if two columns have one name: a dict holds only the last."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(*(f"{path} names the column {name!r} twice" for name in twice), hint="rename one of them")


def _batch_rows(parquet: ParquetFile) -> int:
    groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))


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
