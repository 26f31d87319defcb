"""Read plain text files: documents for continued pre-training, as `{"text": ...}`.

A document is a line or, in a file with empty lines between its paragraphs, a paragraph.
"""

from __future__ import annotations

import io
import re
from itertools import count
from pathlib import Path

from ...errors import DataError
from ..conversation import RowError
from .stream import CHUNK_BYTES, MAX_ROW_BYTES, ReadOptions, Values, too_large

PARAGRAPHS = re.compile(rb"\S[^\n]*\n[^\n]*\S[^\n]*\r?\n[ \t]*\r?\n")  # two lines of text, then an empty one
JSON_LINE = re.compile(rb'\s*[\[{]\s*["{]')
# Names of columns: a first line with two of them is the header of a table.
COLUMNS = {
    *("prompt", "completion", "instruction", "input", "output", "question", "answer", "query", "response"),
    *("text", "label"),
}


def read_txt(file: io.BufferedReader, path: Path, _options: ReadOptions) -> Values:
    """Each document of a text file, at its first line."""
    paragraphs = _has_paragraphs(file, path)
    lines: list[bytes] = []
    first = 1
    for number in count(1):
        raw = file.readline(MAX_ROW_BYTES + 1)
        if raw.strip():
            first = first if lines else number
            lines.append(raw)
        if lines and (not paragraphs or not raw.strip()):
            yield first, _document(lines)
            lines = []
        if not raw:
            return


def describe_txt(file: io.BufferedReader, path: Path, _options: ReadOptions) -> str:
    """What a row of the file is."""
    return f"one row a {'paragraph' if _has_paragraphs(file, path) else 'line'}"


def _has_paragraphs(file: io.BufferedReader, path: Path) -> bool:
    """Whether the first part of the file has paragraphs of several lines.

    Raises: DataError if it is JSON or a table, whose text would be trained as it is written.
    """
    start = file.peek(CHUNK_BYTES)
    if JSON_LINE.match(start):
        raise DataError(f"{path} holds JSON", hint=f"name it {path.stem}.jsonl")
    header = start.lstrip().partition(b"\n")[0].decode(errors="replace").lower()
    if len(COLUMNS & {name.strip(' \r"') for name in re.split(r"[,;\t|]", header)}) > 1:
        raise DataError(f"{path} holds a table", hint=f"name it {path.stem}.csv")
    return PARAGRAPHS.search(start) is not None


def _document(lines: list[bytes]) -> object:
    raw = b"".join(lines)
    if len(raw) > MAX_ROW_BYTES:
        return too_large(len(raw))
    try:
        return {"text": raw.decode().strip("\r\n")}
    except UnicodeDecodeError as error:
        return RowError("not_utf8", f"is not UTF-8 at byte {error.start + 1}")
