"""Read JSON Lines and JSON files row by row, in bounded memory.

Stricter than Python: a key that an object has twice, NaN and Infinity are refused, and only their own row is lost.
"""

from __future__ import annotations

import codecs
import io
import json
from collections import Counter
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import NoReturn

from src.data.formats import RowError
from src.data.readers.json_text import LONGEST_INT, SPACE
from src.data.readers.text import CHUNK_BYTES, MAX_ROW_BYTES, Values, start_text, too_large


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
    """Bytes of the line that begins with `piece`; reads it to its end and keeps nothing."""
    size = len(piece)
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(CHUNK_BYTES)
        size += len(piece)
    return size


def read_json(file: io.BufferedReader, path: Path) -> Values:
    """The items of one array, or values one after the other. A syntax error ends the reading."""
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
    """A JSON file of which one piece is held: what was taken is let go when more is read.

    Bytes that are not UTF-8 are read as halves of surrogate pairs, so that they spoil only their own row.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._pos = 0
        self._counted = 0  # up to here the line ends are in `line`
        self._let_go = 0  # characters of the line that `_text` begins in
        self._ended = False
        self.line = 1

    def next_character(self) -> str:
        """The next character that is not white space, empty at the end; `line` is the one that it stands on."""
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
        """The value that starts here, or what is wrong with it.

        Raises: RowError if its end cannot be found, so that nothing behind it can be read.
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
                if end + 2 < len(self._text) or not self._more():  # `1` may go on as `1e+5`
                    break
        source, self._pos = self._text[self._pos : end], end
        return _refusal(source) or value

    def wrong(self, what: str, pos: int | None = None) -> RowError:
        """What is not JSON, and where: at `pos`, else here."""
        pos = self._pos if pos is None else pos
        line = self.line + self._text.count("\n", self._counted, pos)
        start = self._text.rfind("\n", 0, pos) + 1
        column = pos - start + 1 + (0 if start else self._let_go)
        return RowError("not_json", f"is not JSON: {what} at line {line}, column {column}")

    def _decode(self) -> tuple[object | RowError, int]:
        try:
            return _STRICT.raw_decode(self._text, self._pos)
        except RowError as error:
            return error, _LENIENT.raw_decode(self._text, self._pos)[1]

    def _more(self) -> bool:
        """Read on, at least as much as is still held; False at the end of the file."""
        if self._ended:
            return False
        kept = self._text[self._pos :]
        line_start = self._text.rfind("\n", 0, self._pos) + 1
        self._let_go = self._pos - line_start + (0 if line_start else self._let_go)
        self.line += self._text.count("\n", self._counted, self._pos)
        piece = self._file.read(max(CHUNK_BYTES, len(kept)))
        self._ended = not piece
        self._text, self._pos, self._counted = kept + self._decoder.decode(piece, self._ended), 0, 0
        return True


def _may_be_cut(error: json.JSONDecodeError) -> bool:
    """Whether the error may come from text that goes on: a string does not end, or something fails at the end."""
    return error.msg.startswith("Unterminated") or error.pos > len(error.doc) - len("-Infinity")


def _refusal(source: str) -> RowError | None:
    """What is wrong with the source of a row that is JSON."""
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
    raise RowError("not_json", f"is not JSON: it has the number {name}, which JSON does not know")


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= LONGEST_INT else Decimal(digits)


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
_LENIENT = json.JSONDecoder(parse_int=len)  # for where a value ends, whatever it holds
