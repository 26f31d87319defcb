"""Translate the conversations of a Claude export into trees of messages, as chatgpt.py reads them.

An exported conversation has the keys `name` and `chat_messages`. A message has `uuid`, `parent_message_uuid`,
`sender`, `content`, `text`, `attachments` and `files`. Older exports name no parents: each message follows the one
before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROLES = {"human": "user", "assistant": "assistant"}


def is_conversation(value: object) -> bool:
    """Whether an object is a conversation of a Claude export."""
    messages = value.get("chat_messages") if isinstance(value, dict) else None
    return isinstance(messages, list) and all(isinstance(m, dict) and "sender" in m for m in messages)


def as_tree(conversation: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation of a Claude export as one of a ChatGPT export."""
    messages: list[Mapping[str, Any]] = conversation["chat_messages"]
    names = [str(message.get("uuid") or number) for number, message in enumerate(messages)]
    known = any(message.get("parent_message_uuid") in names for message in messages)
    parents = [m.get("parent_message_uuid") for m in messages] if known else [None, *names[:-1]]
    mapping = {
        name: {"parent": parent, "message": _message(message)}
        for name, parent, message in zip(names, parents, messages, strict=True)
    }
    return {"title": conversation.get("name"), "mapping": mapping}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    sender = message.get("sender")
    attachments = [a for a in message.get("attachments") or [] if isinstance(a, dict)]
    pasted = [a["extracted_content"] for a in attachments if a.get("extracted_content")]
    other = [a for a in attachments if not a.get("extracted_content")]
    return {
        "author": {"role": ROLES.get(str(sender), sender)},
        "content": {"content_type": "text", "parts": [*_parts(message), *pasted]},
        "metadata": {"attachments": [*other, *(message.get("files") or [])]},
    }


def _parts(message: Mapping[str, Any]) -> list[Any]:
    """The parts of a message. `text` repeats their text, and is all that old exports have."""
    content = [part for part in message.get("content") or [] if isinstance(part, dict)]
    if not content:
        return [message.get("text") or ""]
    return [
        part.get("text") if part.get("type") == "text" else {"content_type": part.get("type")} for part in content
    ]
