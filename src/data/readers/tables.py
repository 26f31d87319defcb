"""Read CSV, TSV and Parquet files row by row, in bounded memory.

The first record of a CSV or TSV file names the columns. A record may contain line ends in quotes. One that cannot
be read becomes a RowError, which names the lines that it spans, and reading continues after it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ..formats import RowError
from .stream import CHUNK_BYTES, MAX_ROW_BYTES, CorruptFile, Values, start_text, too_large

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

BATCH_BYTES = 16 << 20  # of rows that are decoded at once
BATCH_ROWS = 1024


def read_csv(file: io.BufferedReader, path: Path) -> Values:
    """Each record after the header as `{column: text}`.

    Fields are separated by commas, or by semicolons (as Excel in much of Europe) if the header has no comma.
    """
    start_text(file, path)
    header = file.peek(CHUNK_BYTES).split(b"\n", 1)[0]
    return _read(file, ";" if b";" in header and b"," not in header else ",", path)


def read_tsv(file: io.BufferedReader, path: Path) -> Values:
    """As read_csv, with tabs between the fields."""
    start_text(file, path)
    return _read(file, "\t", path)


def _read(file: io.BufferedReader, delimiter: str, path: Path) -> Values:
    csv.field_size_limit(MAX_ROW_BYTES)  # global; _Lines limits the size of a record
    records = _records(file, delimiter)
    line, header = next(records, (0, None))
    if header is not None:
        names = _names(header, f"{path}:{line}")
        yield from ((line, _row(names, record)) for line, record in records)


def _names(header: list[str] | RowError, place: str) -> list[str]:
    """Raises: DataError unless the header gives each column a distinct name."""
    if isinstance(header, RowError):
        raise DataError(f"{place} is not a header: it {header.detail}", hint="name each column in the first row")
    twice = sorted({name for name in header if name.strip() and header.count(name) > 1})
    problems = [f"{place} names the column {name!r} twice" for name in twice]
    if not all(name.strip() for name in header):
        problems.append(f"{place} has a column without a name")
    if problems:
        raise DataError(*problems, hint="give each column a distinct name in the first row")
    return header


def _row(names: list[str], record: list[str] | RowError) -> dict[str, str] | RowError:
    if isinstance(record, RowError):
        return record
    if len(record) != len(names):
        fields = "1 field" if len(record) == 1 else f"{len(record)} fields"
        return RowError("wrong_columns", f"has {fields}, the header has {len(names)}")
    return dict(zip(names, record, strict=True))


def _records(file: io.BufferedReader, delimiter: str) -> Iterator[tuple[int, list[str] | RowError]]:
    """`(line, fields)` of each record, with its first line."""
    lines = _Lines(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.start_record()
        try:
            fields = _fields(reader, lines, delimiter)
        except StopIteration:
            return
        except RowError as error:
            lines.problem = error
        yield lines.first, lines.located_problem() or fields


def _fields(reader: Iterator[list[str]], lines: _Lines, delimiter: str) -> list[str]:
    """The next record. After a CSV error, reading continues to where a lenient csv.reader ends the record."""
    try:
        return next(reader)
    except csv.Error as error:
        what = "it opens a quote that is never closed" if lines.ended else str(error).partition(" - ")[0]
        lines.problem = RowError("not_csv", f"is not CSV: {what}")
        again = (line.replace("\r", " ") for line in chain([*lines.record], lines))
        return next(csv.reader(again, delimiter=delimiter), [])


class _Lines:
    """The lines of a file for csv.reader, which takes the lines of one record at a time.

    A problem of a line is kept in `problem` instead of raised, so that csv.reader finds the end of the record.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._size = 0  # of the record so far
        self._line = 0  # the last one read
        self.first = 0  # the line that the record starts on
        self.record: list[str] = []
        self.problem: RowError | None = None
        self.ended = False

    def start_record(self) -> None:
        self._size, self.record, self.problem = 0, [], None

    def located_problem(self) -> RowError | None:
        """The problem, with the lines that are lost if there are several."""
        if not self.problem or self._line == self.first:
            return self.problem
        lines = "the rest of the file" if self.ended else f"lines {self.first} to {self._line}"
        return RowError(self.problem.reason, f"{self.problem.detail}; {lines} could not be read")

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._next_line()
        while not self._size and raw and not raw.strip(b" \r\n"):
            raw = self._next_line()
        if not raw:
            self.ended = True
            raise StopIteration
        self.first = self.first if self._size else self._line
        self._size += len(raw)
        if self._size > MAX_ROW_BYTES:
            raise self._skip(raw)
        self.record.append(self._decode(raw))
        return self.record[-1]

    def _next_line(self) -> bytes:
        raw = self._file.readline(MAX_ROW_BYTES + 1)
        self._line += bool(raw)
        return raw

    def _decode(self, raw: bytes) -> str:
        if b"\0" in raw:
            self.problem = RowError("not_csv", f"is not CSV: it has a NUL character on line {self._line}")
        try:
            return raw.decode().replace("\0", " ")  # csv.reader of Python 3.10 rejects NUL
        except UnicodeDecodeError as error:
            self.problem = RowError("not_utf8", f"is not UTF-8 at byte {error.start + 1} of line {self._line}")
            return raw.decode(errors="replace").replace("\0", " ")

    def _skip(self, piece: bytes) -> RowError:
        """Skip to the end of a record that is too large: a line end after an even number of quotes."""
        quoted = self._line > self.first
        while True:
            quoted ^= bool(piece.count(b'"') % 2)
            if piece.endswith(b"\n") and not quoted:
                return too_large(self._size)
            ended_line = piece.endswith(b"\n")
            piece = self._file.readline(CHUNK_BYTES)
            if not piece:
                self.ended = quoted
                return too_large(self._size)
            self._line += ended_line
            self._size += len(piece)


# Parquet


def read_parquet(file: io.BufferedReader, path: Path) -> Values:
    """Each row as a dict, with its number as position. Lists, structs and nulls become Python objects."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        parquet = ParquetFile(file, buffer_size=CHUNK_BYTES, page_checksum_verification=True)
        _check_names(parquet.schema_arrow.names, path)
        for batch in parquet.iter_batches(batch_size=_batch_rows(parquet)):
            for number, row in enumerate(_rows(batch), number + 1):  # noqa: B020, number continues over batches
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise CorruptFile(str(error).partition("\n")[0]) from error


def _check_names(names: list[str], path: Path) -> None:
    """Raises: DataError if two columns share a name, of which a dict would keep the last only."""
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
