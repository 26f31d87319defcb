"""The tokens that end an answer, by which generation stops: found by rendering answers with a chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from .formats import Conversation, Message, RowError

MARK = "\ue000"  # a private-use character, which templates neither contain nor strip
NAME = "lookup"
_TOOL = {"name": NAME, "description": MARK, "parameters": {"type": "object", "properties": {}}}
TOOLS: list[Any] = [{"type": "function", "function": _TOOL}]


def stop_tokens(
    render: Callable[[Conversation], str], special: re.Pattern[str], eos: str | None, end_of_turn: str
) -> list[str]:
    """The end-of-sequence token, the template's end of turn, and its end of a turn that calls tools.

    Args:
        render: the text of a conversation. Raises: RowError if the template rejects it.
        special: matches the tokenizer's special tokens.
        end_of_turn: what the template writes after an answer.
    """
    last = special.findall(end_of_turn)[-1:]
    return list(dict.fromkeys(filter(None, [eos, *last, *_end_of_calls(render, special)])))


def _end_of_calls(render: Callable[[Conversation], str], special: re.Pattern[str]) -> list[str]:
    """The token that ends a turn of tool calls; none where each call ends with it, so that another may follow."""
    try:
        one, two = (special.findall(_answer(render, calls)) for calls in (1, 2))
    except RowError:
        return []
    return one[-1:] if one and two.count(one[-1]) == one.count(one[-1]) else []


def _answer(render: Callable[[Conversation], str], calls: int) -> str:
    """The end of a conversation from its first call on; empty if the template omits calls.

    Raises: RowError if the template renders no calls.
    """
    turns: Sequence[Message] = [
        {"role": "user", "content": "."},
        {"role": "assistant", "content": "", "tool_calls": [_call(number) for number in range(calls)]},
    ]
    return render(Conversation(turns, TOOLS)).partition(MARK * 2)[2].rstrip()


def _call(number: int) -> dict[str, Any]:
    function = {"name": NAME, "arguments": {"key": MARK * 2}}
    return {"type": "function", "id": f"callcall{number}", "function": function}
