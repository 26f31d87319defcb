"""What the readers of text share: how large a row may be, and what a text that is not UTF-8 is told."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

from src.data.formats import RowError
from src.errors import DataError

MAX_ROW_BYTES = 32 << 20  # of one row as it stands in its file
CHUNK_BYTES = 1 << 20  # bytes of a longer text that are read at once

Values = Iterator[tuple[int, object | RowError]]

WIDE_TEXT = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # byte order marks of UTF-16 and UTF-32


def start_text(file: io.BufferedReader, path: Path) -> None:
    """Step over a byte order mark.

    Raises: DataError if it says that the text is not UTF-8.
    """
    start = file.peek(4)
    if start.startswith(WIDE_TEXT):
        raise DataError(f"{path} is UTF-16 or UTF-32 text", hint="save it as UTF-8")
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))


def too_large(size: int) -> RowError:
    return RowError("too_large", f"has {size:,} bytes, over {MAX_ROW_BYTES >> 20} MiB")
