"""Row formats: each is a small translation of one row into messages, the one shape inside the house.

To add a format, write a function `row -> messages` and enter it in FORMATS; the example in its docstring
is run as a test, and config.DataArgs.data_format names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    role: str
    content: str


Row = Mapping[str, Any]


class RowError(Exception):
    """Why a row cannot be used: a short name for counting, and a sentence's end, `has no assistant turn`."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(detail)


def messages(row: Row) -> list[Message]:
    """Turns of a conversation, passed on as they are.

    >>> messages({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]})
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise RowError("no_messages", "has no list of messages")
    return [_turn(turn, number) for number, turn in enumerate(turns, 1)]


def prompt_completion(row: Row) -> list[Message]:
    """One request and its answer.

    >>> prompt_completion({"prompt": "2+2?", "completion": "4"})
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    return _pair(_text(row, "prompt"), _text(row, "completion"))


def instruction(row: Row) -> list[Message]:
    """An instruction, an optional input that follows it after a blank line, and the output.

    >>> instruction({"instruction": "Add.", "input": "2 and 2", "output": "4"})
    [{'role': 'user', 'content': 'Add.\\n\\n2 and 2'}, {'role': 'assistant', 'content': '4'}]
    """
    asked = _text(row, "instruction")
    given = row.get("input")
    given = "" if given is None else given
    if not isinstance(given, str):
        raise RowError("not_text", "has an input that is not text")
    return _pair(f"{asked}\n\n{given}" if given.strip() else asked, _text(row, "output"))


FORMATS: dict[str, Callable[[Row], list[Message]]] = {
    "messages": messages,
    "prompt_completion": prompt_completion,
    "instruction": instruction,
}


def translate(row: object, data_format: str) -> list[Message]:
    """The messages of a row in `data_format`, checked to be worth training on.

    Raises: RowError.
    """
    if not isinstance(row, dict):
        raise RowError("not_an_object", "is not a JSON object")
    turns = FORMATS[data_format](row)
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise RowError("no_assistant_turn", "has no assistant turn")
    if any(not turn["content"].strip() for turn in answers):
        raise RowError("empty_answer", "has an empty assistant turn")
    if any(not _is_unicode(turn["content"]) for turn in turns):
        raise RowError("not_unicode", "has half a surrogate pair, which is no character")
    return turns


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def _turn(turn: object, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RowError("not_an_object", f"has a message {number} that is not an object")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        shown = role if isinstance(role, str) else type(role).__name__
        raise RowError("unknown_role", f"has the unknown role '{shown}' (known: {', '.join(ROLES)})")
    if not isinstance(content, str):
        raise RowError("not_text", f"has a message {number} whose content is not text")
    return {"role": str(role), "content": content}


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"no_{key}", f"has no text under {key!r}")
    return value


def _pair(asked: str, answered: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
