"""Read JSON Lines and JSON files row by row in bounded memory, and JSON texts for `make convert`.

Stricter than Python's json: duplicate keys, NaN and Infinity are errors that affect only their row.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..formats import RowError
from .stream import CHUNK_BYTES, MAX_ROW_BYTES, Values, start_text, too_large

SPACE = re.compile(r"[ \t\r\n]*")
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[ \t\r\n]+|[{}\[\],:]|[^ \t\r\n"{}\[\],:]+')
LONGEST_INT = 4000  # digits; Python refuses to parse much longer ones as int


def read_jsonl(file: io.BufferedReader, path: Path) -> Values:
    """One JSON value a line."""
    start_text(file, path)
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
        return _STRICT.decode(row.decode())
    except RowError as error:
        return error
    except UnicodeDecodeError as error:
        return RowError("not_utf8", f"is not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        if error.doc.startswith("\ufeff"):
            return RowError("not_json", "is not JSON: it starts with a byte order mark, which only a file may do")
        return RowError("not_json", f"is not JSON: {error.msg} at column {error.pos + 1}")
    except RecursionError:
        return _too_deep()


def _length(file: io.BufferedReader, piece: bytes) -> int:
    """The number of bytes of the line that begins with `piece`. The rest is read and discarded."""
    size = len(piece)
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(CHUNK_BYTES)
        size += len(piece)
    return size


def read_json(file: io.BufferedReader, path: Path) -> Values:
    """The items of one array, or concatenated values. A syntax error ends the reading."""
    start_text(file, path)
    text = _JsonText(file)
    try:
        if text.next_character() == "[":
            yield from _items(text)
        while text.next_character():
            yield text.line, text.take()
    except RowError as error:
        yield text.line, RowError(error.reason, f"{error.detail}; the rest of the file could not be read")


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
            text.next_character()
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
        self.line = 1

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
        return _refusal(source) or value

    def wrong(self, what: str, pos: int | None = None) -> RowError:
        """The error `what` at `pos`, by default the current position."""
        pos = self._pos if pos is None else pos
        line = self.line + self._text.count("\n", self._counted, pos)
        start = self._text.rfind("\n", 0, pos) + 1
        column = pos - start + 1 + (0 if start else self._released)
        return RowError("not_json", f"is not JSON: {what} at line {line}, column {column}")

    def _decode(self) -> tuple[object | RowError, int]:
        try:
            return _STRICT.raw_decode(self._text, self._pos)
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


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
_LENIENT = json.JSONDecoder(parse_int=len)  # finds the end of a value that _STRICT rejects


# JSON texts, for `make convert`


class JsonValue(NamedTuple):
    """A value, its first line (from 1) and its source text."""

    line: int
    value: object
    source: str


def read_json_values(text: str) -> Iterator[JsonValue]:
    """The values of `text`: the items of one array, or concatenated values.

    Raises: json.JSONDecodeError with line and column, also for NaN, Infinity, duplicate keys and too deep nesting.
    """
    line, counted = 1, 0
    for start, end, value in _spans(text):
        line += text.count("\n", counted, start)
        counted = start
        yield JsonValue(line, value, text[start:end])


def one_line(source: str) -> str:
    """The JSON text `source` on one line, formatted as by `json.dumps(ensure_ascii=False)`.

    Numbers keep their text. A row with a lone surrogate, which UTF-8 cannot encode, is written in ASCII.
    """
    line = _reformat(source, ensure_ascii=False)
    return line if fits_utf8(line) else _reformat(source, ensure_ascii=True)


def _reformat(source: str, *, ensure_ascii: bool) -> str:
    def reformat(token: re.Match[str]) -> str:
        part = token[0]
        if part[0] == '"':
            return json.dumps(json.loads(part), ensure_ascii=ensure_ascii)
        return {",": ", ", ":": ": "}.get(part, part.strip())

    return TOKEN.sub(reformat, source)


def fits_utf8(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _spans(text: str) -> Iterator[tuple[int, int, object]]:
    """(start, end, value) of each value, or of each item if the text is one array."""
    pos = _skip(text, 0)
    if text.startswith("[", pos):
        yield from _array_items(text, pos)
        return
    while pos < len(text):
        value, end = _value_at(text, pos)
        yield pos, end, value
        pos = _skip(text, end)


def _array_items(text: str, start: int) -> Iterator[tuple[int, int, object]]:
    pos = _skip(text, start + 1)
    more = not text.startswith("]", pos)
    while more:
        value, end = _value_at(text, pos)
        yield pos, end, value
        pos = _skip(text, end)
        more = text.startswith(",", pos)
        if more:
            pos = _skip(text, pos + 1)
        elif not text.startswith("]", pos):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, pos)
    rest = _skip(text, pos + 1)
    if rest < len(text):
        raise json.JSONDecodeError("Extra data after the array", text, rest)


def _skip(text: str, pos: int) -> int:
    match = SPACE.match(text, pos)
    return match.end() if match else pos


def _value_at(text: str, pos: int) -> tuple[object, int]:
    try:
        return _STRICT.raw_decode(text, pos)
    except RowError as error:
        raise json.JSONDecodeError(f"the value {error.detail}", text, _error_position(text, pos)) from None
    except RecursionError:
        raise json.JSONDecodeError("Nested too deeply", text, pos) from None


def _error_position(text: str, start: int) -> int:
    """The position of the first duplicate key, NaN or Infinity from `start` on."""
    keys: list[set[str]] = [set()]
    for token in TOKEN.finditer(text, start):
        part = token[0]
        if part in "{[":
            keys.append(set())
        elif part in "}]":
            keys.pop()
        elif part in ("NaN", "Infinity", "-Infinity"):
            return token.start()
        elif part[0] == '"' and text.startswith(":", _skip(text, token.end())):
            key = json.loads(part)
            if key in keys[-1]:
                return token.start()
            keys[-1].add(key)
    return start
