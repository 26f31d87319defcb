"""Read CSV and TSV files row by row, in bounded memory.

The first record names the columns. A record may contain line ends in quotes. One that cannot be read becomes a
RowError, which names the lines that it spans, and reading continues after it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...errors import DataError
from ..conversation import RowError
from .columns import Columns
from .stream import CHUNK_BYTES, MAX_ROW_BYTES, ReadOptions, Values, other_file, rest_of_file, too_large

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}  # the earlier one wins a draw
SNIFF_RECORDS = 50
SEP = b"sep="  # Excel's own first line: it names the delimiter


class Dialect(NamedTuple):
    """How the fields of a file are separated. sep_line: whether its first line says so, and is no header."""

    delimiter: str
    sep_line: bool = False


def read_csv(file: io.BufferedReader, path: Path, options: ReadOptions) -> Values:
    """Each record after the header as `{column: text}`. The delimiter is set, or found by the first records."""
    return _read(file, dialect(file, options.delimiter), path)


def read_tsv(file: io.BufferedReader, path: Path, options: ReadOptions) -> Values:
    """As read_csv, with tabs between the fields unless a delimiter is set or the header has no tab."""
    return _read(file, _tsv_dialect(file, options), path)


def describe_csv(file: io.BufferedReader, path: Path, options: ReadOptions) -> str:
    """How a CSV file is read, where it is not plain: `csv_delimiter=semicolon`."""
    return _describe(file, dialect(file, options.delimiter), ",", path)


def _describe(file: io.BufferedReader, found: Dialect, usual: str, path: Path) -> str:
    is_usual = found.delimiter == usual
    said = "" if is_usual else f"csv_delimiter={DELIMITERS.get(found.delimiter, found.delimiter)}"
    return ", ".join(filter(None, (said, _describe_columns(file, found, path))))


def describe_tsv(file: io.BufferedReader, path: Path, options: ReadOptions) -> str:
    """As describe_csv."""
    return _describe(file, _tsv_dialect(file, options), "\t", path)


def _tsv_dialect(file: io.BufferedReader, options: ReadOptions) -> Dialect:
    header = file.peek(CHUNK_BYTES).lstrip(b"\r\n ").split(b"\n", 1)[0]
    found = dialect(file, options.delimiter)
    return Dialect("\t") if b"\t" in header and not options.delimiter else found


def _describe_columns(file: io.BufferedReader, found: Dialect, path: Path) -> str:
    csv.field_size_limit(MAX_ROW_BYTES)
    line, header = next(_records(file, found), (0, None))
    return "" if header is None else Columns(header, f"{path}:{line}").left_out()


def dialect(file: io.BufferedReader, delimiter: str = "") -> Dialect:
    """The dialect of a file, by its first bytes, which are not consumed.

    The delimiter is that under which most of the first records have as many fields as the header: a comma inside a
    text does not outvote semicolons.
    """
    start = file.peek(CHUNK_BYTES)
    first = start.split(b"\n", 1)[0].rstrip(b"\r").strip(b'"')
    if first[:4].lower() == SEP and len(first) == 5:
        return Dialect(delimiter or first[4:].decode("latin-1"), sep_line=True)
    text = start.decode(errors="replace").replace("\0", " ").replace("\r\n", "\n").replace("\r", " ")
    return Dialect(delimiter or max(DELIMITERS, key=lambda each: _agreement(text, each)))


def _agreement(text: str, delimiter: str) -> tuple[float, bool]:
    """The share of the first records that have as many fields as the header, if that has several; else 0.

    Of equal shares, the one counts more under which every quote is where CSV allows it.
    """
    strict, lenient = (_widths(text, delimiter, strict=strict) for strict in (True, False))
    widths = strict or lenient
    return widths.count(widths[0]) / len(widths) if widths and widths[0] > 1 else 0, bool(strict)


def _widths(text: str, delimiter: str, *, strict: bool) -> list[int]:
    """The number of fields of the first records; none if one is not CSV."""
    records = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=strict)
    try:
        return [len(record) for record in islice(filter(None, records), SNIFF_RECORDS)]
    except csv.Error:
        return []


def _read(file: io.BufferedReader, found: Dialect, path: Path) -> Values:
    if other := other_file(file.peek(CHUNK_BYTES), path):
        raise DataError(f"{path} is not CSV", hint=other)
    csv.field_size_limit(MAX_ROW_BYTES)  # global; _Lines limits the size of a record
    records = _records(file, found)
    line, header = next(records, (0, None))
    if header is not None:
        columns = Columns(header, f"{path}:{line}")
        for line, record in records:
            if isinstance(record, RowError):
                yield line, record
            elif len(record) == 1 or any(field.strip() for field in record):  # Excel writes empty rows as `,,`
                yield line, columns.row(record)


def _records(file: io.BufferedReader, found: Dialect) -> Iterator[tuple[int, list[str] | RowError]]:
    """`(line, fields)` of each record, with its first line."""
    lines = _Lines(io.BufferedReader(_MacLines(file)) if _ends_lines_with_cr(file) else file)
    if found.sep_line:
        lines.skip_line()
    reader = csv.reader(lines, delimiter=found.delimiter, strict=True)
    while True:
        lines.start_record()
        try:
            fields = _fields(reader, lines, found.delimiter)
        except StopIteration:
            return
        except RowError as error:
            lines.problem = error
        yield lines.first, lines.located_problem() or fields
        if lines.problem and lines.ended and lines.rows > 1:
            why = f"line {lines.first} {lines.problem.detail}"
            yield rest_of_file(lines.first + 1, lines.rows - 1, why)


def _fields(reader: Iterator[list[str]], lines: _Lines, delimiter: str) -> list[str]:
    """The next record. After a CSV error, reading continues to where a lenient csv.reader ends the record."""
    try:
        return next(reader)
    except csv.Error as error:
        what = "it opens a quote that is never closed" if lines.ended else str(error).partition(" - ")[0]
        if "new-line character" in what:
            what = "a line ends with CR alone; save it as CSV UTF-8"
        lines.problem = RowError("not_csv", f"is not CSV: {what}")
        again = (line.replace("\r", " ") for line in chain([*lines.record], lines))
        return next(csv.reader(again, delimiter=delimiter), [])


def _ends_lines_with_cr(file: io.BufferedReader) -> bool:
    """Whether CR alone ends the lines, as in "CSV (Macintosh)" of Excel."""
    start = file.peek(CHUNK_BYTES)
    return b"\r" in start[:-1] and b"\n" not in start


class _MacLines(io.RawIOBase):
    """A file with LF in place of CR."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, target: Buffer) -> int:
        view = memoryview(target)
        piece = self._file.read(len(view)).replace(b"\r", b"\n")
        view[: len(piece)] = piece
        return len(piece)


class _Lines:
    """The lines of a file for csv.reader, which takes the lines of one record at a time.

    A problem of a line is kept in `problem` instead of raised, so that csv.reader finds the end of the record.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._size = 0  # of the record so far
        self._line = 0  # the last one read
        self.rows = 0  # lines of the record, without blank ones
        self.first = 0  # the line that the record starts on
        self.record: list[str] = []
        self.problem: RowError | None = None
        self.ended = False

    def start_record(self) -> None:
        self._size, self.rows, self.record, self.problem = 0, 0, [], None

    def skip_line(self) -> None:
        self._next_line()

    def located_problem(self) -> RowError | None:
        """The problem, with the lines that are lost if there are several."""
        if not self.problem or self._line == self.first:
            return self.problem
        if self.ended:
            return RowError(self.problem.reason, f"{self.problem.detail}; the rest of the file could not be read")
        rows = self.rows if self.problem.reason == "not_csv" else 1  # the quotes of the others are right
        detail = f"{self.problem.detail}; lines {self.first} to {self._line} could not be read"
        return RowError(self.problem.reason, detail, rows)

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
        self.rows += bool(raw.strip())
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
            self.rows += ended_line and bool(piece.strip())
            self._size += len(piece)
