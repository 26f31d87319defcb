"""Open data files, compressed or not, and what their readers share. A truncated archive is always an error."""

from __future__ import annotations

import codecs
import io
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from ...errors import DataError
from ..formats import RowError

# compressed bytes read in one step; zstd expands them up to 130,000 times, in memory
STEP = 1024

MAX_ROW_BYTES = 32 << 20  # of one row in its file
CHUNK_BYTES = 1 << 20  # bytes of a long text that are read at once

Values = Iterator[tuple[int, object | RowError]]

WIDE_TEXT = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # byte order marks of UTF-16 and UTF-32


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
    file = path.open("rb")
    archive = ARCHIVES.get(path.suffix.lower())
    return io.BufferedReader(_Decompressed(file, archive), 1 << 18) if archive else file


class _Decompressed(io.RawIOBase):
    """The content of an archive: all its members, concatenated."""

    def __init__(self, file: io.BufferedReader, archive: Callable[[], Decompressor]) -> None:
        self._file = file
        self._archive = archive
        self._member: Decompressor | None = archive()  # None between two members
        self._packed = b""
        self._ready = memoryview(b"")

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

    def _step(self) -> bool:
        """Decompress one step; False at the end of the archive."""
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


def start_text(file: io.BufferedReader, path: Path) -> None:
    """Skip a byte order mark.

    Raises: DataError if it is that of UTF-16 or UTF-32.
    """
    start = file.peek(4)
    if start.startswith(WIDE_TEXT):
        raise DataError(f"{path} is UTF-16 or UTF-32 text", hint="save it as UTF-8")
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))


def too_large(size: int) -> RowError:
    return RowError("too_large", f"has {size:,} bytes, over {MAX_ROW_BYTES >> 20} MiB")
