"""Read JSON Lines and JSON files row by row in bounded memory.

Stricter than Python's json: duplicate keys, NaN and Infinity are errors that affect only their row.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import Counter
from decimal import Decimal
from itertools import chain, count, islice
from pathlib import Path
from typing import NoReturn

from ..conversation import RowError
from ..spelled_json import spelled
from .stream import CHUNK_BYTES, MAX_ROW_BYTES, REST_OF_FILE, ReadOptions, Values, rest_of_file, too_large

SPACE = re.compile(r"[ \t\r\n]*")
FIRST_KEY = re.compile(r'\{\s*("[^"\\]{1,200}")')  # of an object
FIRST_KEYS = 20
MAX_KEY = 300  # characters between two rows, with the first key of the second
LONGEST_INT = 4000  # digits; Python refuses to parse much longer ones as int


def read_jsonl(file: io.BufferedReader, path: Path, options: ReadOptions) -> Values:
    """One JSON value a line, with or without a comma behind it. A file that holds one array is read as JSON."""
    if _is_array(file.peek(CHUNK_BYTES)):
        yield from read_json(file, path, options)
        return
    for number in count(1):
        raw = file.readline(MAX_ROW_BYTES + 1)
        if not raw:
            return
        if len(raw) > MAX_ROW_BYTES:
            yield number, too_large(_length(file, raw))
        elif row := raw.rstrip(b" \t\r\n"):
            yield number, _parse(row)


def _parse(row: bytes) -> object | RowError:
    try:
        return STRICT.decode(row.decode())
    except RowError as error:
        return error
    except UnicodeDecodeError as error:
        return RowError("not_utf8", f"is not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.doc[error.pos :] == ",":
            return _parse(row[:-1])
        if error.doc.startswith("\ufeff"):
            return RowError("not_json", "is not JSON: it starts with a byte order mark, which only a file may do")
        return RowError("not_json", f"is not JSON: {error.msg} at column {error.pos + 1}")
    except RecursionError:
        return _too_deep()


def _is_array(start: bytes) -> bool:
    """Whether a file that begins so is an array over several lines, or is only one."""
    start = start.lstrip()
    first, _, others = start.partition(b"\n")
    return start.startswith(b"[") and (not others.strip() or isinstance(_parse(first.rstrip()), RowError))


def _length(file: io.BufferedReader, piece: bytes) -> int:
    """The number of bytes of the line that begins with `piece`. The rest is read and discarded."""
    size = len(piece)
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(CHUNK_BYTES)
        size += len(piece)
    return size


def read_json(file: io.BufferedReader, _path: Path, _options: ReadOptions) -> Values:
    """The items of one array, or concatenated values. A syntax error ends the reading.

    The position of a row is its line or, if the first two rows share theirs, its number.
    """
    rows = _by_line(file)
    first = list(islice(rows, 2))
    shared = len(first) == 2 and first[0][0] == first[1][0] and not isinstance(first[1][1], RowError)
    found = chain(first, rows)
    yield from ((number, value) for number, (_, value) in enumerate(found, 1)) if shared else found


def _by_line(file: io.BufferedReader) -> Values:
    text = _JsonText(file)
    try:
        if text.next_character() == "[":
            yield from _items(text)
        while text.next_character():
            yield text.line, text.take()
            if text.next_character() == ",":  # between lines, as of an array without its brackets
                text.step()
    except RowError as error:
        line, rows = text.line, text.count_rest()
        broke_off = text.has_row and not rows  # inside its last row, as a file that is cut off
        reason = REST_OF_FILE if broke_off else error.reason
        yield line, RowError(reason, f"{error.detail}; the rest of the file could not be read")
        if rows:
            yield rest_of_file(line, rows, f"line {line} {error.detail}")


def _items(text: _JsonText) -> Values:
    text.step()
    following = text.next_character()
    while following != "]":
        yield text.line, text.take()
        following = text.next_character()
        if following not in (",", "]"):
            raise text.wrong("Expecting ',' delimiter")
        if following == ",":
            text.step()
            following = text.next_character()  # also of a comma behind the last item
    text.step()
    if text.next_character():
        raise text.wrong("Extra data after the array")


class _JsonText:
    """A parser over a JSON file that holds one chunk: text that was parsed is released when more is read.

    Bytes that are not UTF-8 are decoded to lone surrogates, so that they affect only their own row.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._pos = 0
        self._counted = 0  # `line` counts the line ends up to this position
        self._released = 0  # released characters of the line in which `_text` begins
        self._ended = False
        self._first_keys: dict[str, None] = {}  # of the rows so far, at most FIRST_KEYS
        self.line = 1

    @property
    def has_row(self) -> bool:
        """Whether an object has been read."""
        return bool(self._first_keys)

    def next_character(self) -> str:
        """The next character that is not white space, empty at the end. `line` becomes its line."""
        while True:
            space = SPACE.match(self._text, self._pos)
            self._pos = space.end() if space else self._pos
            if self._pos < len(self._text) or not self._more():
                break
        self.line += self._text.count("\n", self._counted, self._pos)
        self._counted = self._pos
        return self._text[self._pos : self._pos + 1]

    def step(self) -> None:
        self._pos += 1

    def take(self) -> object | RowError:
        """The value at the current position, or the RowError of a bad value.

        Raises: RowError if its end cannot be found, so that nothing after it can be read.
        """
        while True:
            try:
                value, end = self._decode()
            except json.JSONDecodeError as error:
                if not _may_be_cut(error):
                    raise self.wrong(error.msg, error.pos) from None
                if len(self._text) - self._pos > MAX_ROW_BYTES:
                    raise RowError("too_large", f"has over {MAX_ROW_BYTES >> 20} MiB") from None
                if not self._more():
                    raise self.wrong(error.msg, error.pos) from None
            except RecursionError:
                raise _too_deep() from None
            else:
                if end + 2 < len(self._text) or not self._more():  # `1` may continue as `1e+5`
                    break
        source, self._pos = self._text[self._pos : end], end
        if len(self._first_keys) < FIRST_KEYS and (opening := FIRST_KEY.match(source)):
            self._first_keys[opening[1]] = None
        return _refusal(source) or value

    def count_rest(self) -> int:
        """The number of rows after the current position, by the first keys of the rows that could be read."""
        opening = FIRST_KEY.match(self._text, self._pos)
        keys = self._first_keys or ([opening[1]] if opening else [])
        if not keys:
            return 0
        row = re.compile(rf"\}}\s*,?\s*\{{\s*(?:{'|'.join(map(re.escape, keys))})\s*:")
        rows = 0
        while True:
            for found in row.finditer(self._text, self._pos):
                rows, self._pos = rows + 1, found.end()
            self._pos = max(self._pos, len(self._text) - MAX_KEY)
            if not self._more():
                return rows

    def wrong(self, what: str, pos: int | None = None) -> RowError:
        """The error `what` at `pos`, by default the current position."""
        pos = self._pos if pos is None else pos
        line = self.line + self._text.count("\n", self._counted, pos)
        start = self._text.rfind("\n", 0, pos) + 1
        column = pos - start + 1 + (0 if start else self._released)
        return RowError("not_json", f"is not JSON: {what} at line {line}, column {column}")

    def _decode(self) -> tuple[object | RowError, int]:
        try:
            return STRICT.raw_decode(self._text, self._pos)
        except RowError as error:
            return error, _LENIENT.raw_decode(self._text, self._pos)[1]

    def _more(self) -> bool:
        """Read another chunk, at least as long as the unparsed text; False at the end of the file."""
        if self._ended:
            return False
        kept = self._text[self._pos :]
        line_start = self._text.rfind("\n", 0, self._pos) + 1
        self._released = self._pos - line_start + (0 if line_start else self._released)
        self.line += self._text.count("\n", self._counted, self._pos)
        piece = self._file.read(max(CHUNK_BYTES, len(kept)))
        self._ended = not piece
        self._text, self._pos, self._counted = kept + self._decoder.decode(piece, self._ended), 0, 0
        return True


def _may_be_cut(error: json.JSONDecodeError) -> bool:
    """Whether the error may be due to text not read yet: a string is unterminated, or parsing fails at the end."""
    return error.msg.startswith("Unterminated") or error.pos > len(error.doc) - len("-Infinity")


def _refusal(source: str) -> RowError | None:
    """The problem of the source text of a valid JSON row, if there is one."""
    try:
        size = len(source.encode())
    except UnicodeEncodeError:
        return RowError("not_utf8", "has bytes that are not UTF-8")
    return too_large(size) if size > MAX_ROW_BYTES else None


def _too_deep() -> RowError:
    return RowError("not_json", "is not JSON that can be read: nested too deeply")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RowError("duplicate_key", f"has the key {json.dumps(key[:80])} twice")
    return value


def _constant(name: str) -> NoReturn:
    raise RowError("not_json", f"is not JSON: it has the number {name}, which JSON does not allow")


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= LONGEST_INT else Decimal(digits)


STRICT = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=spelled
)
_LENIENT = json.JSONDecoder(parse_int=len)  # finds the end of a value that STRICT rejects
