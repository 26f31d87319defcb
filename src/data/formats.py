"""Row formats: each is a small translation of one row into messages, the one shape inside the house.

To add a format, write a function `row -> messages` and enter it in FORMATS; the example in its docstring
is run as a test, and schema.DataFormat names it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

ROLES = ("system", "user", "assistant", "tool")
TEXT = "text"  # the role of a document, which no chat template is put around
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
TEMPLATE_KEYS = (
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
)  # keys of a turn that chat templates read


class Message(TypedDict):
    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[Any]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    weight: NotRequired[int]


@dataclass(frozen=True)
class Row:
    """One training row: its messages, the tools they may call, and where they stand."""

    file: Path
    line: int
    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Rejection:
    """A row that is not trained on, and why."""

    file: Path
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.detail}"


RawRow = Mapping[str, Any]
Translation = Callable[[RawRow], list[Message]]


class RowError(Exception):
    """Why a row cannot be used: a short name for counting, and a sentence's end, `has no assistant turn`."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(reason, detail)

    def __str__(self) -> str:
        return self.detail


def messages(row: RawRow) -> list[Message]:
    """Turns of a conversation with roles system, user, assistant and tool, passed on as they are.

    A turn may carry `tool_calls`, and an assistant's turn `weight: 0`, which takes the loss from it.

    >>> messages({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]})
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    return [_turn(turn, number) for number, turn in enumerate(turns_of(row, "messages"), 1)]


def prompt_completion(row: RawRow) -> list[Message]:
    """One request and its answer.

    >>> prompt_completion({"prompt": "2+2?", "completion": "4"})
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    return single_turn(text_of(row, "prompt"), text_of(row, "completion"))


def instruction(row: RawRow) -> list[Message]:
    """An instruction, an optional input that follows it after a blank line, and the output.

    >>> instruction({"instruction": "Add.", "input": "2 and 2", "output": "4"})
    [{'role': 'user', 'content': 'Add.\\n\\n2 and 2'}, {'role': 'assistant', 'content': '4'}]
    """
    asked = text_of(row, "instruction")
    given = row.get("input")
    given = "" if given is None else given
    if not isinstance(given, str):
        raise RowError("not_text", "has an input that is not text")
    turns = single_turn(f"{asked}\n\n{given}" if given.strip() else asked, text_of(row, "output"))
    system = row.get("system")
    said = isinstance(system, str) and system.strip()
    return [*([{"role": "system", "content": system}] if said else []), *turns]  # type: ignore[list-item]


def conversations(row: RawRow) -> list[Message]:
    """Pairs of input and output, or ShareGPT's turns of from and value.

    >>> conversations({"conversations": [{"input": "2+2?", "output": "4"}]})
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    >>> conversations({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]})
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    turns = turns_of(row, "conversations")
    found: list[Message] = []
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        found.append({"role": "system", "content": system})
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowError("not_an_object", f"has a message {number} that is not an object")
        if "from" in turn or "value" in turn:
            role = turn.get("from")
            known = SHAREGPT_ROLES.get(role) if isinstance(role, str) else None
            found.append(_turn({"role": known or role, "content": turn.get("value")}, number))
        elif "input" in turn or "output" in turn:
            found += single_turn(text_of(turn, "input"), text_of(turn, "output"))
        else:
            found.append(_turn(turn, number))
    return found


def classification(row: RawRow) -> list[Message]:
    """A text and its label, a word or a whole number.

    >>> classification({"text": "It never arrived.", "label": "negative"})
    [{'role': 'user', 'content': 'It never arrived.'}, {'role': 'assistant', 'content': 'negative'}]
    """
    label = row.get("label")
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not isinstance(label, str):
        raise RowError("no_label", "has no label that is text or a whole number")
    return single_turn(text_of(row, "text"), label)


def text(row: RawRow) -> list[Message]:
    """A document for plain continued training: no chat template, loss on all of it.

    >>> text({"text": "Once upon a time."})
    [{'role': 'text', 'content': 'Once upon a time.'}]
    """
    return [{"role": TEXT, "content": text_of(row, "text")}]


class Format(NamedTuple):
    """A translation, and the columns by which `auto` knows it."""

    translate: Translation
    columns: frozenset[str]


FORMATS: dict[str, Format] = {
    "messages": Format(messages, frozenset({"messages"})),
    "prompt_completion": Format(prompt_completion, frozenset({"prompt", "completion"})),
    "instruction": Format(instruction, frozenset({"instruction", "output"})),
    "conversations": Format(conversations, frozenset({"conversations"})),
    "classification": Format(classification, frozenset({"text", "label"})),
    "text": Format(text, frozenset({"text"})),
}


def evaluation_messages(row: RawRow) -> list[Message]:
    """A row of an evaluation file: a prompt and its completion, or a text and its label."""
    return (classification if "label" in row and "prompt" not in row else prompt_completion)(row)


def count_formats(rows: Iterable[object]) -> Counter[str]:
    """How many of `rows` have the columns of each format; a row counts for the first that fits."""
    found: Counter[str] = Counter()
    for row in rows:
        columns = row.keys() if isinstance(row, dict) else set()
        found.update([next((name for name, f in FORMATS.items() if f.columns <= columns), "")])
    del found[""]
    return found


def to_messages(row: object, translate: Translation) -> list[Message]:
    """The messages of a row, checked to be worth training on.

    Raises: RowError.
    """
    if not isinstance(row, dict):
        raise RowError("not_an_object", "is not a JSON object")
    turns = translate(row)
    for number, turn in enumerate(turns, 1):
        if not _is_unicode(turn):
            raise RowError("not_unicode", "has half a surrogate pair, which is no character")
        if not turn["content"].strip() and turn["role"] in ("user", TEXT):
            raise RowError(
                "empty_prompt" if turn["role"] == "user" else "empty_text", f"has an empty message {number}"
            )
        if turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise RowError("empty_answer", "has an empty assistant turn")
    _check_order([turn["role"] for turn in turns])
    return turns


def tools_of(row: object) -> list[Any] | None:
    """The tools that a conversation may call, which chat templates show to the model.

    Raises: RowError if they are no list.
    """
    tools = row.get("tools") if isinstance(row, dict) else None
    tools = _parsed(tools) if isinstance(tools, str) and tools.strip() else tools
    if tools in (None, ""):
        return None
    if not isinstance(tools, list):
        raise RowError("bad_tools", "has tools that are not a list")
    return tools or None


FOLLOWS = {  # role -> the roles that it may follow; "" is the beginning
    "system": {""},
    "user": {"", "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
    TEXT: {""},
}


def _check_order(roles: list[str]) -> None:
    if TEXT in roles and len(roles) == 1:
        return
    if "assistant" not in roles:
        raise RowError("no_assistant_turn", "has no assistant turn")
    for number, (before, role) in enumerate(zip(["", *roles], roles, strict=False), 1):
        if before not in FOLLOWS[role]:
            where = f"after {before}" if before else "at the beginning"
            raise RowError("role_order", f"has a message {number} of {role} {where}")
    if roles[-1] != "assistant":
        raise RowError("role_order", f"ends with a message of {roles[-1]} that nothing answers")


def _is_unicode(turn: Message) -> bool:
    try:
        turn["content"].encode()
        if len(turn) > 2:
            json.dumps(turn, ensure_ascii=False).encode()
        return True
    except UnicodeEncodeError:
        return False


def turns_of(row: RawRow, key: str) -> list[Any]:
    """The list under `key`, in a table's cell as JSON. Raises: RowError if there is none."""
    turns = row.get(key)
    if isinstance(turns, str):  # a table's cell holds a list as JSON
        turns = _parsed(turns)
    if not isinstance(turns, list) or not turns:
        raise RowError(f"no_{key}", f"has no list of {key}")
    return turns


def _parsed(cell: str) -> object:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _turn(turn: object, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RowError("not_an_object", f"has a message {number} that is not an object")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        shown = role if isinstance(role, str) else type(role).__name__
        raise RowError("unknown_role", f"has the unknown role '{shown}' (known: {', '.join(ROLES)})")
    carried = {key: turn[key] for key in TEMPLATE_KEYS if turn.get(key) is not None}
    if content is None and role == "assistant" and carried.get("tool_calls"):
        content = ""
    found: dict[str, Any] = {"role": role, "content": _joined(content, number), **carried}
    if turn.get("weight") is not None:
        if turn["weight"] not in (0, 1):
            raise RowError("bad_weight", f"has a message {number} whose weight is neither 0 nor 1")
        found["weight"] = int(turn["weight"])
    return found  # type: ignore[return-value]


def _joined(content: object, number: int) -> str:
    """The text of a turn; OpenAI's list of text parts is joined."""
    if isinstance(content, list) and content:
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == TEXT else None for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise RowError("not_text", f"has a message {number} whose content is not text")
    return content


def text_of(row: RawRow, key: str) -> str:
    """Raises: RowError if the row has no text under `key`."""
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"no_{key}", f"has no text under {key!r}")
    return value


def single_turn(asked: str, answered: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
