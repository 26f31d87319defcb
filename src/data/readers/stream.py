"""Open data files, compressed or not, in any encoding, and what their readers share.

A truncated archive, and text that is not of the encoding that is set, is always an error.
"""

from __future__ import annotations

import codecs
import io
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from ...errors import DataError
from ...utils.units import count
from ..conversation import RowError

# compressed bytes read in one step; zstd expands them up to 130,000 times, in memory
STEP = 1024

MAX_ROW_BYTES = 32 << 20  # of one row in its file
CHUNK_BYTES = 1 << 20  # bytes of a long text that are read at once
BUFFER_BYTES = 1 << 18

Values = Iterator[tuple[int, object | RowError]]

MARKS = {  # byte order mark -> encoding; the first that matches
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
OTHER_KINDS = {  # how files begin whose names say something else -> the remedy
    b"\x1f\x8b": "it is compressed with gzip: name it {name}.gz",
    b"PAR1": "it is a Parquet file: name it {stem}.parquet",
    b"ARROW1": "it is an Arrow file: name it {stem}.arrow",
    b"PK\3\4": "it is an Excel workbook or another ZIP archive: name it {stem}.xlsx, or unpack it",
}
BINARY = (".parquet", ".arrow", ".feather", ".xlsx", ".gz")  # their names say what they are
REST_OF_FILE = "rest_of_file"  # reason of the rows behind the place where a file breaks off


class ReadOptions(NamedTuple):
    """How text files are read.

    delimiter: the character between the fields of CSV files; empty: found by their first rows.
    encoding: of files that are not UTF-8; empty: they are not read.
    """

    delimiter: str = ""
    encoding: str = ""


DEFAULTS = ReadOptions()


class CorruptFile(Exception):
    """The bytes of a file do not match its kind: it is truncated or corrupt."""


class Decompressor(Protocol):
    """The common interface of zlib and zstandard. Each object reads one member, or frame, of an archive."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def gzip() -> Decompressor:
    return zlib.decompressobj(wbits=31)  # with the header and checksum of gzip, not zlib


def zstd() -> Decompressor:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


ARCHIVES: dict[str, Callable[[], Decompressor]] = {".gz": gzip, ".zst": zstd}


def open_data(path: Path) -> io.BufferedReader:
    """The bytes of a data file, decompressed if its name ends in one of ARCHIVES.

    Raises: DataError if it is not a regular file; OSError. Reading raises CorruptFile if an archive is truncated
    or corrupt.
    """
    mode = path.stat().st_mode  # before opening, since opening a named pipe blocks
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise DataError(f"{path} is {kind}", hint="give a data file")
    file = path.open("rb", 0)
    archive = ARCHIVES.get(path.suffix.lower())
    return io.BufferedReader(_Decompressed(file, archive) if archive else file, BUFFER_BYTES)


def open_text(path: Path, encoding: str = "") -> io.BufferedReader:
    """The text of a data file as UTF-8, without a byte order mark.

    Args:
        encoding: of text that is neither UTF-8, nor UTF-16 or UTF-32 with a byte order mark. Empty: such bytes are
            passed on, so that only their rows cannot be read.
    Raises: as open_data. Reading raises DataError if the text is not of its encoding.
    """
    file = open_data(path)
    found = _encoding(file, path, encoding)
    if found == "utf-8-sig":
        file.read(len(codecs.BOM_UTF8))
        return file
    return io.BufferedReader(_Recoded(file, path, found), BUFFER_BYTES) if found else file


def other_encoding(path: Path, encoding: str) -> str:
    """The encoding that open_text reads a file in where it is not UTF-8; empty if it is."""
    with open_data(path) as file:
        return _encoding(file, path, encoding).removeprefix("utf-8-sig")


def _encoding(file: io.BufferedReader, path: Path, encoding: str) -> str:
    start = file.peek(4)
    marked = next((name for mark, name in MARKS.items() if start.startswith(mark)), "")
    return marked or (encoding if encoding and not _is_utf8(path, encoding) else "")


def _is_utf8(path: Path, encoding: str) -> bool:
    """Whether a text is UTF-8 although `encoding` is set. Text in another encoding hardly ever happens to be that.

    False for encodings that are no superset of ASCII: their text can consist of bytes that are UTF-8 too.
    """
    if "a".encode(encoding) != b"a":
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_data(path) as file:
        try:
            while piece := file.read(CHUNK_BYTES):
                decoder.decode(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


class _Stepwise(io.RawIOBase):
    """Bytes that `_step` makes of those of another file, a step at a time."""

    def __init__(self, file: io.RawIOBase | io.BufferedReader) -> None:
        self._file = file
        self._ready = memoryview(b"")

    def _step(self) -> bool:
        """Set `_ready` to the next bytes, possibly none; False at the end."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` completely, except at the end of the content."""
        filled = 0
        while filled < len(buffer) and (self._ready or self._step()):
            piece = self._ready[: len(buffer) - filled]
            buffer[filled : filled + len(piece)] = piece
            self._ready = self._ready[len(piece) :]
            filled += len(piece)
        return filled

    def close(self) -> None:
        self._file.close()
        super().close()


class _Decompressed(_Stepwise):
    """The content of an archive: all its members, concatenated."""

    def __init__(self, file: io.RawIOBase, archive: Callable[[], Decompressor]) -> None:
        super().__init__(file)
        self._archive = archive
        self._member: Decompressor | None = archive()  # None between two members
        self._packed = b""

    def _step(self) -> bool:
        packed = self._packed or self._file.read(STEP)
        if not packed and self._member:
            raise CorruptFile("the archive is truncated")
        if packed:
            self._unpack(packed, self._member or self._archive())
        return bool(packed)

    def _unpack(self, packed: bytes, member: Decompressor) -> None:
        try:
            self._ready = memoryview(member.decompress(packed))
        except Exception as error:  # zstandard, which has its own error class, may not be imported
            raise CorruptFile(str(error)) from error
        self._packed = member.unused_data if member.eof else b""
        self._member = None if member.eof else member


class _Recoded(_Stepwise):
    """Text of another encoding as UTF-8."""

    def __init__(self, file: io.BufferedReader, path: Path, encoding: str) -> None:
        super().__init__(file)
        self._path, self._encoding = path, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._line = 1
        self._ended = False

    def _step(self) -> bool:
        if self._ended:
            return False
        packed = self._file.read(BUFFER_BYTES)
        self._ended = not packed
        try:
            text = self._decoder.decode(packed, self._ended)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode(self._encoding, "replace")
            place = f"on line {self._line + before.count(chr(10))}"
            raise DataError(
                f"{self._path} is not {self._encoding} text {place}", hint="correct encoding, or the file"
            ) from None
        self._line += text.count("\n")
        self._ready = memoryview(text.encode())
        return True


def too_large(size: int) -> RowError:
    return RowError("too_large", f"has {size:,} bytes, over {MAX_ROW_BYTES >> 20} MiB")


def other_file(start: bytes, path: Path) -> str:
    """The remedy for a file that begins like one of another kind than its name says; empty for others."""
    other = next((remedy for mark, remedy in OTHER_KINDS.items() if start.startswith(mark)), "")
    return "" if path.suffix.lower() in BINARY else other.format(name=path.name, stem=path.stem)


def rest_of_file(line: int, rows: int, why: str) -> tuple[int, RowError]:
    """The `rows` from `line` on, which could not be read, in place of their values.

    >>> print(rest_of_file(5, 2, "line 4 opens a quote that is never closed")[1])
    and the rest of the file (2 rows) could not be read: line 4 opens a quote that is never closed
    """
    detail = f"and the rest of the file ({count(rows, 'row')}) could not be read: {why}"
    return line, RowError(REST_OF_FILE, detail, rows)
