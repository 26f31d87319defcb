"""Read JSON text value by value, and write each value on one line without parsing its numbers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import NamedTuple, NoReturn

SPACE = re.compile(r"[ \t\r\n]*")
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[ \t\r\n]+|[{}\[\],:]|[^ \t\r\n"{}\[\],:]+')
LONGEST_INT = 4000  # digits; Python refuses to parse much longer ones as int


class JsonValue(NamedTuple):
    """A value, the line it starts on (from 1) and its text in the file."""

    line: int
    value: object
    source: str


class _NotJson(Exception):
    """Raised inside the parser for what Python accepts but JSON does not allow."""


def read_json_values(text: str) -> Iterator[JsonValue]:
    """Yield the values of `text`: the items of one array, or values one after the other.

    Raises json.JSONDecodeError with the place, also for NaN, Infinity, duplicate keys and too deep nesting.
    """
    line, counted = 1, 0
    for start, end, value in _spans(text):
        line += text.count("\n", counted, start)
        counted = start
        yield JsonValue(line, value, text[start:end])


def one_line(source: str) -> str:
    """The JSON text `source` on one line, as `json.dumps(ensure_ascii=False)` lays it out.

    Numbers keep their text. A row with a lone surrogate, which UTF-8 cannot hold, is written in ASCII.
    """
    line = _relaid(source, ensure_ascii=False)
    return line if fits_utf8(line) else _relaid(source, ensure_ascii=True)


def _relaid(source: str, *, ensure_ascii: bool) -> str:
    def relay(token: re.Match[str]) -> str:
        part = token[0]
        if part[0] == '"':
            return json.dumps(json.loads(part), ensure_ascii=ensure_ascii)
        return {",": ", ", ":": ": "}.get(part, part.strip())

    return TOKEN.sub(relay, source)


def fits_utf8(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _spans(text: str) -> Iterator[tuple[int, int, object]]:
    """(start, end, value) of each value; the items of the array when the text is one array."""
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
        return _DECODER.raw_decode(text, pos)
    except _NotJson as error:
        raise json.JSONDecodeError(str(error), text, _place(text, pos)) from None
    except RecursionError:
        raise json.JSONDecodeError("Nested too deeply", text, pos) from None


def _place(text: str, start: int) -> int:
    """Where the first duplicate key, NaN or Infinity stands, from `start` on."""
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


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise _NotJson(f"Duplicate key {json.dumps(twice)} in one object")
    return value


def _constant(name: str) -> NoReturn:
    raise _NotJson(f"{name} is not a JSON value")


def _integer(text: str) -> int | Decimal:
    return int(text) if len(text) <= LONGEST_INT else Decimal(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
