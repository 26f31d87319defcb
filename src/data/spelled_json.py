"""Numbers of JSON with their spelling: 1.50 and 1e5 stay what they are where a value becomes JSON text again."""

from __future__ import annotations

import json
from typing import Any


class SpelledFloat(float):
    """A number that Python would spell in another way."""

    spelling: str


def spelled(digits: str) -> float:
    """The number of a JSON text, for `parse_float` of a decoder.

    >>> spelled_json({"price": spelled("1.50")})
    '{"price": 1.50}'
    """
    value = float(digits)
    if repr(value) == digits:
        return value
    found = SpelledFloat(value)
    found.spelling = digits
    return found


def has_spelled(value: Any) -> bool:
    """Whether a number inside of `value` would lose its spelling in `json.dumps`."""
    if isinstance(value, dict):
        return any(map(has_spelled, value.values()))
    if isinstance(value, list):
        return any(map(has_spelled, value))
    return isinstance(value, SpelledFloat)


def spelled_json(value: Any) -> str:
    """`json.dumps(value, ensure_ascii=False)`, with each number as the file spells it."""
    if not has_spelled(value):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, SpelledFloat):
        return value.spelling
    if isinstance(value, list):
        return f"[{', '.join(map(spelled_json, value))}]"
    return "{" + ", ".join(f"{spelled_json(key)}: {spelled_json(inner)}" for key, inner in value.items()) + "}"
