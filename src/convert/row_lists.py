"""Find the rows in a JSON file that holds them inside one object: `{"version": 1, "data": [{...}, ...]}`."""

from __future__ import annotations

from typing import Any

from ..data.conversation import TEXT
from ..data.formats import count_formats
from .json_text import JsonValue, items, members

# Keys under which programs and people put the rows of a file.
WRAPPERS = {
    *("data", "dataset", "datasets", "rows", "items", "records", "examples", "instances", "samples", "entries"),
    *("results", "train", "training", "test", "validation", "dev"),
}


def wrapped_rows(value: JsonValue) -> tuple[dict[str, list[JsonValue]], list[str]]:
    """The lists of rows in an object by their keys, and its other keys. No lists if the object is a row itself.

    A list is one of rows if its key is in WRAPPERS or its items have the columns of a row format.
    """
    if not isinstance(value.value, dict):
        return {}, []
    is_row = bool(count_formats([value.value]))
    holds = _holds_conversations if is_row else _holds_rows
    lists = {key: each for key, each in members(value).items() if _is_list(each.value) and holds(key, each.value)}
    return {key: _rows(each) for key, each in lists.items()}, [key for key in value.value if key not in lists]


def _is_list(value: object) -> bool:
    """Whether a value is a list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _holds_rows(key: str, value: Any) -> bool:
    return key.lower() in WRAPPERS or _are_rows(value)


def _holds_conversations(_key: str, value: Any) -> bool:
    """Whether the objects of a list have turns and are none: `{"conversations": [{"messages": [...]}]}`."""
    return _are_rows(value) and all(any(map(_is_list, item.values())) for item in value)


def _are_rows(value: list[Any]) -> bool:
    """Whether most objects of a list have the columns of a row with an answer."""
    found = count_formats(value)
    return found.total() - found[TEXT] > len(value) / 2


def _rows(value: JsonValue) -> list[JsonValue]:
    """The items of a list or, if each has only its number around a `row` (the Hub's viewer), these rows."""
    found = items(value)
    if all(isinstance(item.value, dict) and {"row", "row_idx"} <= item.value.keys() for item in found):
        return [members(item)["row"] for item in found]
    return found
