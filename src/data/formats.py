"""Row formats: each translates a row into messages, the one shape that the rest of the package uses.

To add a format, write a function `row -> messages` with an example in its docstring, which is run as a test. Enter
it in FORMATS, and add its name to schema.DataFormat.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .conversation import ROLES
from .conversation import TEMPLATE_KEYS as TEMPLATE_KEYS
from .conversation import TEXT as TEXT
from .conversation import Conversation as Conversation
from .conversation import Message as Message
from .conversation import Rejection as Rejection
from .conversation import Row as Row
from .conversation import RowError as RowError

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
RawRow = Mapping[str, Any]
Translation = Callable[[RawRow], list[Message]]


def messages(row: RawRow) -> list[Message]:
    """A conversation of turns with the roles system, user, assistant and tool.

    A turn may have `tool_calls`. An assistant turn with `weight: 0` has no loss.

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
    """An instruction, an optional input, which is appended after an empty line, and the output.

    >>> instruction({"instruction": "Add.", "input": "2 and 2", "output": "4"})
    [{'role': 'user', 'content': 'Add.\\n\\n2 and 2'}, {'role': 'assistant', 'content': '4'}]
    """
    request, context = text_of(row, "instruction"), row.get("input")
    if context is not None and not isinstance(context, str):
        raise RowError("not_text", "has an input that is not text")
    if context and context.strip():
        request = f"{request}\n\n{context}"
    return [*_system_turn(row), *single_turn(request, text_of(row, "output"))]


def conversations(row: RawRow) -> list[Message]:
    """Pairs of input and output, or ShareGPT turns of from and value.

    >>> conversations({"conversations": [{"input": "2+2?", "output": "4"}]})
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    >>> conversations({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]})
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    turns = turns_of(row, "conversations")
    found = _system_turn(row)
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowError("not_an_object", f"has a message {number} that is not an object")
        if "from" in turn or "value" in turn:
            role = turn.get("from")
            if role == "function_call":
                found.append(_call(turn.get("value"), number))
                continue
            known = SHAREGPT_ROLES.get(role) if isinstance(role, str) else None
            found.append(_turn({"role": known or role, "content": turn.get("value")}, number))
        elif "input" in turn or "output" in turn:
            found += single_turn(text_of(turn, "input"), text_of(turn, "output"))
        else:
            found.append(_turn(turn, number))
    return found


def _call(value: object, number: int) -> Message:
    """ShareGPT's function_call: `{"name": ..., "arguments": ...}`, a list of them, or that as JSON text."""
    read: Any = _parsed(value) if isinstance(value, str) else value
    calls = read if isinstance(read, list) else [read]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError("bad_call", f"has a function_call {number} that is no object with a name and arguments")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    wrapped = [{"type": "function", "function": function} for function in functions]
    return _turn({"role": "assistant", "tool_calls": wrapped}, number)


def classification(row: RawRow) -> list[Message]:
    """A text and its label, which is text or an integer.

    >>> classification({"text": "It never arrived.", "label": "negative"})
    [{'role': 'user', 'content': 'It never arrived.'}, {'role': 'assistant', 'content': 'negative'}]
    """
    label = row.get("label")
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not isinstance(label, str):
        raise RowError("no_label", "has no label that is text or a whole number")
    text = text_of(row, "text")
    for name, content in (("prompt", text), ("answer", label)):
        if not content.strip():
            raise RowError(f"empty_{name}", f"has an empty {'text' if content is text else 'label'}")
    return single_turn(text, label)


def text(row: RawRow) -> list[Message]:
    """A document for continued pre-training: no chat template, loss on all tokens.

    >>> text({"text": "Once upon a time."})
    [{'role': 'text', 'content': 'Once upon a time.'}]
    """
    return [{"role": TEXT, "content": text_of(row, "text")}]


class Format(NamedTuple):
    """A translation, and the columns by which `data_format=auto` detects it."""

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
    """The messages of a row of an evaluation file, by its columns: in any format that has an answer.

    >>> evaluation_messages({"instruction": "Add.", "input": "2 and 2", "output": "4"})[0]["content"]
    'Add.\\n\\n2 and 2'
    """
    if "prompt" in row:
        return prompt_completion(row)
    if "label" in row:
        return classification(row)
    found = (each.translate for name, each in FORMATS.items() if name != TEXT and each.columns <= row.keys())
    return next(found, prompt_completion)(row)


def prompt_text(turns: Sequence[Message]) -> str:
    """The turns before an answer as a person reads them: a single one without its role.

    >>> prompt_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}])
    'system: Be brief.\\nuser: 2+2?'
    """
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def count_formats(rows: Iterable[object]) -> Counter[str]:
    """The number of `rows` with the columns of each format. A row counts for the first format that matches."""
    found: Counter[str] = Counter()
    for row in rows:
        columns = row.keys() if isinstance(row, dict) else set()
        found.update([next((name for name, f in FORMATS.items() if f.columns <= columns), "")])
    del found[""]
    return found


def to_messages(row: object, translate: Translation) -> list[Message]:
    """The messages of a row, checked for empty content and the order of roles.

    Raises: RowError if the row cannot be used.
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
    """The tools that a conversation may call, for the chat template; None if there are none.

    Raises: RowError if they are not a list.
    """
    tools = row.get("tools") if isinstance(row, dict) else None
    tools = _parsed(tools) if isinstance(tools, str) and tools.strip() else tools
    if tools in (None, ""):
        return None
    if not isinstance(tools, list):
        raise RowError("bad_tools", "has tools that are not a list")
    return tools or None


FOLLOWS = {  # role -> the roles that it may follow; "" is the start of the conversation
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
        raise RowError("role_order", f"ends with a message of {roles[-1]}, not with an answer")


def _is_unicode(turn: Message) -> bool:
    try:
        turn["content"].encode()
        if len(turn) > 2:
            json.dumps(turn, ensure_ascii=False).encode()
        return True
    except UnicodeEncodeError:
        return False


def turns_of(row: RawRow, key: str) -> list[Any]:
    """The list in column `key`, which a table holds as JSON text.

    Raises: RowError if there is none.
    """
    turns = row.get(key)
    if isinstance(turns, str):
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
        name = role if isinstance(role, str) else type(role).__name__
        raise RowError("unknown_role", f"has the unknown role '{name}' (known: {', '.join(ROLES)})")
    extra = {key: turn[key] for key in TEMPLATE_KEYS if turn.get(key) is not None}
    if content is None and role == "assistant" and extra.get("tool_calls"):
        content = ""
    found: dict[str, Any] = {"role": role, "content": _joined(content, number), **extra}
    if turn.get("weight") is not None:
        if turn["weight"] not in (0, 1):
            raise RowError("bad_weight", f"has a message {number} whose weight is neither 0 nor 1")
        found["weight"] = int(turn["weight"])
    return found  # type: ignore[return-value]


def _joined(content: object, number: int) -> str:
    """The text of a turn. A list of text parts, as in the OpenAI API, is joined."""
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


def single_turn(request: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def _system_turn(row: RawRow) -> list[Message]:
    """The column `system` as a list of one turn; empty if it holds no text."""
    system = row.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
