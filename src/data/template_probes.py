"""The conversations by which template_profile.py probes a chat template, and what their rendering shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .template_forms import Turn

# Words of the probes, which no template contains
ASKED, ANSWERED, THOUGHT, RESULT, NAME, KEY, VALUE, TOLD, LISTED = (
    "assayasked", "assayanswered", "assaythought", "assayresult", "assaycalled", "assaykey", "assayvalue",
    "assaytold", "assaylisted",
)  # fmt: skip
OPENAI_ID = "call_assayAbCdEfGh0123456789"
PROBE_TOOL: dict[str, Any] = {  # shares no word with the call of a probe
    "type": "function",
    "function": {
        "name": LISTED,
        "description": TOLD,
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": "x"}},
            "required": ["x"],
        },
    },
}


def user_turn() -> Turn:
    return {"role": "user", "content": ASKED}


def answer_turn() -> Turn:
    return {"role": "assistant", "content": ANSWERED}


def calling_turn(arguments: Any, own: str | None) -> Turn:
    call = {"type": "function", "function": {"name": NAME, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": own, **call} if own else call]}


def result_turn(own: str | None) -> Turn:
    return {"role": "tool", "content": RESULT, **({"tool_call_id": own} if own else {})}


def shows(text: str | None, words: Iterable[str]) -> bool:
    """Whether a text holds all words, and no part of content as Python or JSON writes it."""
    return (
        text is not None
        and all(word in text for word in words)
        and not re.search("""['"]type['"]: ['"]t[eh]""", text)
    )


def reads_once(text: str) -> bool:
    """Whether a rendered call holds name, argument and value, not encoded twice nor as Python writes a dict."""
    encoded_twice = f'\\"{KEY}' in text or f"{{'{KEY}'" in text
    return shows(text, [NAME, KEY, VALUE]) and not encoded_twice
