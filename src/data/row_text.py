"""What duplicates are compared by: the texts of a row by turns, and all else that is trained or conditions it."""

from __future__ import annotations

import json
from typing import Any

from .conversation import Conversation, Message
from .duplicates import Kind, normalise
from .source_row import parsed

PLAIN_KEYS = {"role", "content", "reasoning_content", "weight"}
PLAIN_ROLES = {"system", "user", "assistant", "text"}


def row_text(conversation: Conversation) -> str:
    """The texts and thoughts of all turns."""
    return "\n".join(_texts(conversation))


def row_structure(conversation: Conversation) -> str:
    """All that is not text: roles, calls, weights, tools and template variables; empty for a plain conversation.

    Rows whose structures differ are no duplicates, however alike their texts are. Ids of calls do not count.
    """
    messages, tools, kwargs = conversation
    if all(map(_is_plain, messages)) and not tools and not kwargs:
        return ""
    turns = [[turn["role"], turn.get("name"), turn.get("weight", 1), _calls(turn)] for turn in messages]
    return json.dumps([turns, tools, kwargs], sort_keys=True, ensure_ascii=False, default=str)


def _is_plain(turn: Message) -> bool:
    return turn.keys() <= PLAIN_KEYS and turn["role"] in PLAIN_ROLES and turn.get("weight") != 0


def have_same_turns(one: Conversation, other: Conversation, kind: Kind) -> bool:
    """Whether texts that are duplicates of `kind` are so turn by turn: "a b", "c" does not repeat "a", "b c"."""
    texts, others = _texts(one), _texts(other)
    if kind == "near":
        return len(texts) == len(others)
    if kind == "normalised":
        texts, others = list(map(normalise, texts)), list(map(normalise, others))
    return texts == others


def _texts(conversation: Conversation) -> list[str]:
    thoughts = ((turn.get("reasoning_content"), turn["content"]) for turn in conversation.messages)
    return [text for pair in thoughts for text in pair if text is not None]


def _calls(turn: Message) -> list[Any]:
    functions = [call["function"] for call in turn.get("tool_calls", [])]
    return [[function["name"], parsed(function["arguments"])] for function in functions]
