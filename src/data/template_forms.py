"""The forms in which chat templates read calls, thoughts and arguments. template_profile.py chooses among them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from .conversation import Conversation, RowError
from .thoughts import END_THINK, THINK

Turn = dict[str, Any]

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "tool_plan")
TOOL_ROLES = ("tool", "ipython", "function", "observation", "tool_response")


class Adapted(NamedTuple):
    """A conversation in the form that the template reads, and what to put back into the rendered text."""

    conversation: Conversation
    restored: Mapping[str, str]

    def restore(self, text: str) -> str:
        for placeholder, original in self.restored.items():
            text = text.replace(placeholder, original)
        return text


class CallForm(NamedTuple):
    """How a template reads calls.

    arguments: `object`, `text` (JSON), or `as is` if it renders neither without loss.
    ids: a name in IDS. needs_ids: whether a call without an id gets one.
    flat: whether name and arguments stand beside `function` too.
    tool_role: the role of a result. names: whether a result must name its tool.
    """

    arguments: str = "as is"
    ids: str = "any"
    needs_ids: bool = False
    flat: bool = False
    tool_role: str = "tool"
    names: bool = False


class IdForm(NamedTuple):
    """The ids that a template accepts, and how to make one of a call's own id, its name and its number."""

    fits: Callable[[str, str], bool]
    make: Callable[[str, str, int], str]


def _nine(own: str, name: str, number: int) -> str:
    return hashlib.sha256(f"{own} {name} {number}".encode()).hexdigest()[:9]


IDS = {
    "any": IdForm(lambda own, name: bool(own), _nine),
    "functions": IdForm(  # the id holds the name of the tool
        lambda own, name: bool(re.fullmatch(rf"functions\.{re.escape(name)}:\d+", own)),
        lambda own, name, number: f"functions.{name}:{number}",
    ),
    "nine": IdForm(lambda own, name: bool(re.fullmatch("[a-zA-Z0-9]{9}", own)), _nine),
}


# Forms of thoughts: functions of an assistant turn without its thoughts, and the thoughts.


def _under(key: str) -> Callable[[Turn, str], Turn]:
    return lambda turn, thought: {**turn, key: thought}


def _as_part(turn: Turn, thought: str) -> Turn:
    parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": turn["content"]}]
    return {**turn, "content": parts if turn["content"] else parts[:1]}


def _inline(turn: Turn, thought: str) -> Turn:
    return {**turn, "content": f"{THINK}\n{thought}\n{END_THINK}\n\n{turn['content']}"}


INLINE = "inline"
THOUGHT_FORMS: dict[str, Callable[[Turn, str], Turn]] = {
    **{key: _under(key) for key in THOUGHT_KEYS},
    "part": _as_part,
    INLINE: _inline,  # only for templates that know the tags
}


TRUTH = ("true", "false")  # as JSON writes them; Python and some templates write True


def scalars(value: Any, *, names: bool = False) -> Iterator[str]:
    """The scalar values of JSON data, or of its text, as texts; with the `names` of its objects. Null is left out.

    >>> list(scalars({"city": "Bern", "days": [1, True]}, names=True))
    ['city', 'days', 'Bern', '1', 'true']
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value, parse_float=str, parse_int=str)
    if isinstance(value, Mapping):
        yield from map(str, value if names else ())
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from scalars(each, names=names)
    elif isinstance(value, str | int | float):
        yield str(value).lower() if isinstance(value, bool) else str(value)


def arguments_as(function: Mapping[str, Any], wanted: str, restored: dict[str, str]) -> Any:
    """The arguments of a call as an object or as JSON text.

    Raises: RowError if an object is wanted and the text is none.
    """
    given = function.get("arguments")
    if given is None or (isinstance(given, str) and not given.strip()):
        given = {}
    if wanted == "text":
        return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    if isinstance(given, str):
        given = parse_arguments(given, restored)
    if not isinstance(given, Mapping):
        raise RowError(
            "bad_arguments", f"has a call of {function['name']!r} whose arguments are not a JSON object"
        )
    return given


def parse_arguments(text: str, restored: dict[str, str]) -> Any:
    """JSON text as a value; the text itself if it is not JSON.

    A number whose spelling Python would change, such as 1.10 or 1e5, is replaced by a number that stands for it.
    Its spelling is entered in `restored`.
    """

    def number(word: str) -> Any:
        value: int | float = float(word) if set(word) & set(".eE") else int(word)
        if json.dumps(value) == word:
            return value
        placeholder = f"9182736455463728{len(restored):06d}1991"
        restored[placeholder] = word
        return int(placeholder)

    try:
        return json.loads(text, parse_float=number, parse_int=number) or {}
    except (ValueError, RecursionError):
        return text
