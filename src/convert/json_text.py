"""JSON texts for `make convert`: the values of a text with their source, and a source on one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from ..data.conversation import RowError
from ..data.readers.json_rows import SPACE, STRICT

TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[ \t\r\n]+|[{}\[\],:]|[^ \t\r\n"{}\[\],:]+')


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


def members(value: JsonValue) -> dict[str, JsonValue]:
    """The values of an object by their keys, each with its source text."""
    text, found = value.source, {}
    pos = _skip(text, 1)
    while not text.startswith("}", pos):
        key, end = _value_at(text, pos)
        start = _skip(text, _skip(text, end) + 1)  # behind the colon
        item, end = _value_at(text, start)
        line = value.line + text.count("\n", 0, start)
        found[str(key)] = JsonValue(line, item, text[start:end])
        pos = _skip(text, end)
        pos = _skip(text, pos + 1) if text.startswith(",", pos) else pos
    return found


def items(value: JsonValue) -> list[JsonValue]:
    """The items of an array, each with its source text."""
    return [item._replace(line=value.line + item.line - 1) for item in read_json_values(value.source)]


def _skip(text: str, pos: int) -> int:
    match = SPACE.match(text, pos)
    return match.end() if match else pos


def _value_at(text: str, pos: int) -> tuple[object, int]:
    try:
        return STRICT.raw_decode(text, pos)
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
