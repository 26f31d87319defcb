"""Turns of a conversation: the keys and role names of all vendors become the messages that chat templates read.

A name of a role is one entry in ROLE_NAMES, a key of a turn one in TURN_KEYS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .calls import read_calls
from .conversation import TEXT, Message, RowError
from .loss_flags import FLAGS, SPAN_KEYS, weight_of
from .media import is_media
from .parts import RESULT_KEYS, has_results, read_content, result_text
from .source_row import SourceRow, as_text, has_value, is_harmless, parsed, unread_name

CALL = "call"  # the role of a turn that is a call of a tool: it belongs to the answer before it, if there is one

# fmt: off
ROLE_NAMES: dict[str, str] = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter", "customer", "client"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "ai", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("claude", "agent"), "assistant"),
    **dict.fromkeys(("tool", "observation", "observations", "function", "ipython", "environment"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "tool_result", "tool_results"), "tool"),
    **dict.fromkeys(("function_call", "function_calls", "tool_call", "tool_calls"), CALL),
}

PLAIN_ROLES = ("user", "assistant", "system")

TURN_KEYS: dict[str, str] = {
    **dict.fromkeys(("role", "from", "speaker", "sender", "author"), "role"),
    **dict.fromkeys(("content", "value", "text", "parts", "message"), "content"),
    **dict.fromkeys(("name", "tool_name"), "name"),
    **dict.fromkeys(("tool_calls", "tool_call", "function_call", "function_calls"), "tool_calls"),
    **dict.fromkeys(("tools", "functions", "tool_definitions", "available_tools"), "tools"),
    "tool_call_id": "tool_call_id",
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought", "thoughts"), "reasoning_content"),
    **dict.fromkeys(FLAGS, "weight"),
}

# A turn that is a complete exchange: the keys of its request and its answer.
PAIRS = (
    ("input", "output"), ("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("human", "bot"),
    ("human", "ai"), ("user", "bot"), ("prompt", "response"), ("prompt", "completion"), ("query", "response"),
    ("question", "answer"), ("instruction", "output"),
)
# fmt: on

# Keys that match in any case, and without underscores: toolCalls is tool_calls.
FOLDED = {key.replace("_", ""): key for key in (*TURN_KEYS, *(key for pair in PAIRS for key in pair))}

FOLLOWS = {  # role -> the roles that it may follow; "" is the start of the conversation
    "system": {""},
    "developer": {"", "system"},
    "user": {"", "system", "developer", "assistant", "tool"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
    TEXT: {""},
}


def read_turns(turns: Sequence[object], row: SourceRow) -> list[Message]:
    """The messages of the turns of a row. Keys that are not read are noted in `row`.

    Raises: RowError if a turn cannot be read.
    """
    found: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowError("not_an_object", f"has a message {number} that is not an object")
        if len(turn) == 2 and turn.get("role") in PLAIN_ROLES and isinstance(turn.get("content"), str):
            found.append({"role": turn["role"], "content": turn["content"]})  # most turns, without a look further
            continue
        turn = _completed(_folded(turn))
        if pair := _pair(turn):
            found += _exchange(turn, pair, number, row)
        else:
            _add(found, turn, number, row)
    return found


def _folded(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with its known keys as they are spelled here."""
    names = {key: FOLDED.get(str(key).strip().lower().replace("_", ""), key) for key in turn}
    return {key if known in turn else known: turn[key] for key, known in names.items()}


def _completed(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with the role that LangChain writes as its type, and with the content of a result of another name."""
    meanings = {TURN_KEYS.get(key) for key, value in turn.items() if has_value(value)}
    if "role" not in meanings and str(turn.get("type")).lower() in ROLE_NAMES:
        turn = {**turn, "role": turn["type"]}
    if "content" not in meanings and ROLE_NAMES.get(str(turn.get("role")).lower()) == "tool":
        result = next((key for key in RESULT_KEYS if has_value(turn.get(key))), None)
        rest = {key: value for key, value in turn.items() if TURN_KEYS.get(key) != "content"}
        return turn if result is None else {"content" if key == result else key: v for key, v in rest.items()}
    return turn


def _pair(turn: dict[str, Any]) -> tuple[str, str] | None:
    if "role" in turn or "from" in turn:
        return None
    several = [pair for pair in PAIRS if pair[0] in turn or pair[1] in turn]
    return next((pair for pair in several if pair[0] in turn and pair[1] in turn), next(iter(several), None))


def _exchange(turn: dict[str, Any], pair: tuple[str, str], number: int, row: SourceRow) -> list[Message]:
    texts = [as_text(turn.get(key)) for key in pair]
    for key, text in zip(pair, texts, strict=True):
        if text is None:
            raise RowError(f"no_{key}", f"has no text under {key!r}")
    found: list[Message] = [
        {"role": "user", "content": texts[0] or ""},
        {"role": "assistant", "content": texts[1] or ""},
    ]
    rest = {key: value for key, value in turn.items() if key not in (*pair, "system")}
    _add_keys(found[1], _known_values(rest, number, row), number, row)
    system = as_text(turn.get("system"))
    if has_value(system) and system is not None:
        found.insert(0, {"role": "system", "content": system})
    return found


def _add(found: list[Message], turn: dict[str, Any], number: int, row: SourceRow) -> None:
    """Append the messages of a turn to `found`, or a call to the answer that it belongs to."""
    values = _known_values(turn, number, row)
    role = _role(values.get("role"), number, turn)
    if role == CALL:
        calls = read_calls(values.pop("content", None), row.note_unread)
        if not calls:
            raise RowError("bad_call", f"has a message {number} that is a call of a tool without its name")
        before = found[-1] if found else None
        values["tool_calls"] = calls
        if before and before["role"] == "assistant" and "weight" not in values and "weight" not in before:
            before["tool_calls"] = [*before.get("tool_calls", []), *calls]
            return
        role = "assistant"
    _refuse_unknown(turn, role, number)
    content = values.get("content")
    if role == "tool" and not has_results(content):
        content = result_text(content, number)
    if not has_value(content) and role == "assistant" and has_value(values.get("tool_calls")):
        content = ""
    read = read_content(content, number, row.note_unread)
    if read.weights:
        _add_weight(values, read.weights, role, number)
    found += read.results
    if read.results and not (has_value(read.text) or read.calls or read.thoughts):
        return
    message: Message = {"role": role, "content": read.text}
    if read.thoughts:
        message["reasoning_content"] = read.thoughts
    if read.calls:
        message["tool_calls"] = list(read.calls)
    _add_keys(message, values, number, row)
    if role != "assistant":
        _leave_out(message, ("reasoning_content", "tool_calls"), row)
    found.append(message)


def _add_weight(values: dict[str, Any], weights: frozenset[int], role: str, number: int) -> None:
    """Add the weight that the parts of a content have to the values of their turn."""
    if role == "assistant" and len(weights) > 1 and values.get("weight") != 0:
        raise RowError("bad_weight", f"has a message {number} with loss on some of its parts only")
    values["weight"] = min(*weights, values.get("weight", 1)) if role == "assistant" else max(weights)


def _refuse_unknown(turn: dict[str, Any], role: str, number: int) -> None:
    """Raises: RowError if keys that are not known hold calls or loss of an answer, or the result of a tool."""
    rest = {key: each for key, each in turn.items() if key not in TURN_KEYS and has_value(each)}
    calls = [key for key, each in rest.items() if "call" in key.lower() and isinstance(parsed(each), list | dict)]
    if role == "assistant" and calls:
        raise RowError("bad_call", f"has a message {number} whose {calls[0]} cannot be read as calls of tools")
    if role == "assistant" and not rest.keys().isdisjoint(SPAN_KEYS):
        raise RowError("bad_weight", f"has a message {number} with loss on some of its characters only")
    results = [key for key in rest if not is_harmless(key)]
    if (
        role == "tool"
        and results
        and not any(has_value(turn.get(key)) for key, meaning in TURN_KEYS.items() if meaning == "content")
    ):
        raise RowError("not_text", f"has a message {number} of a tool that has {results[0]} in place of a content")


def _leave_out(message: Message, keys: Sequence[str], row: SourceRow) -> None:
    """Note and remove what only an answer can have."""
    for key in keys:
        if message.pop(key, None):  # type: ignore[misc]
            row.note_unread(f"messages[].{key} of {message['role']}")


def _known_values(turn: dict[str, Any], number: int, row: SourceRow) -> dict[str, Any]:
    """The values of a turn by what they mean. Of two keys with one meaning, that with a value is read."""
    found: dict[str, Any] = {}
    for key, value in turn.items():
        meaning = TURN_KEYS.get(key)
        if meaning is None and is_media(key, value):
            raise RowError("multimodal", f"has a message {number} with {key}, and text alone can be trained on")
        if value is None and meaning != "role":
            continue
        if meaning == "weight":
            weight = _weight(key, value, number)
            if found.setdefault("weight", weight) != weight:
                raise RowError("bad_weight", f"has a message {number} whose {key} contradicts its weight")
        elif meaning is not None and not has_value(found.get(meaning)):
            found[meaning] = value
        elif has_value(value) and (meaning is None or found[meaning] != value):
            row.note_unread(f"messages[].{unread_name(key, value)}")
    row.note_tools(found.pop("tools", None))
    return found


def _role(role: object, number: int, turn: dict[str, Any]) -> str:
    known = ROLE_NAMES.get(role.strip().lower().replace("-", "_")) if isinstance(role, str) else None
    if known is None:
        names = ", ".join(dict.fromkeys(name for name in ROLE_NAMES.values() if name != CALL))
        named = role if isinstance(role, str) else type(role).__name__
        fact = (
            f"a message {number} without a role among its keys {', '.join(map(str, turn))}"
            if role is None
            else f"the unknown role '{named}'"
        )
        raise RowError("unknown_role", f"has {fact} (known: {names})")
    return known


def _add_keys(message: Message, values: dict[str, Any], number: int, row: SourceRow) -> None:
    """Add the values of a turn besides its role and content to its message."""
    for key in ("name", "tool_call_id"):
        if has_value(values.get(key)):
            message[key] = str(values[key])
    thoughts = values.get("reasoning_content")
    if has_value(thoughts):
        if not isinstance(thoughts, str):
            raise RowError("not_text", f"has a message {number} whose thoughts are not text")
        message["reasoning_content"] = thoughts
    if has_value(parsed(values.get("tool_calls"))):
        calls = read_calls(values["tool_calls"], row.note_unread)
        message["tool_calls"] = [*message.get("tool_calls", []), *calls]
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    if "weight" in values and message["role"] == "assistant":
        message["weight"] = values["weight"]
    elif values.get("weight") == 1:
        row.note_unread(f"messages[].weight of {message['role']}")


def _weight(key: str, value: object, number: int) -> int:
    weight = weight_of(value, key)
    if weight is None:
        raise RowError("bad_weight", f"has a message {number} whose {key} is neither 0 nor 1")
    return weight


def check_turns(turns: Sequence[Message]) -> None:
    """Raises: RowError if a turn is empty, or the order of the roles is that of no conversation."""
    for number, turn in enumerate(turns, 1):
        if not turn["content"].strip() and turn["role"] in ("user", TEXT):
            reason = "empty_prompt" if turn["role"] == "user" else "empty_text"
            raise RowError(reason, f"has an empty message {number}")
        if turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise RowError("empty_answer", "has an empty assistant turn")
    roles = [turn["role"] for turn in turns]
    if roles == [TEXT]:
        return
    if "assistant" not in roles:
        raise RowError(
            "no_assistant_turn",
            "has no assistant turn: it is a prompt without an answer, as for reinforcement learning",
        )
    for number, (before, role) in enumerate(zip(["", *roles], roles, strict=False), 1):
        if before not in FOLLOWS[role]:
            where = f"after {before}" if before else "at the beginning"
            raise RowError("role_order", f"has a message {number} of {role} {where}")
    if roles[-1] != "assistant":
        raise RowError("role_order", f"ends with a message of {roles[-1]}, not with an answer")
