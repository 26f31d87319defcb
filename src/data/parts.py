"""Content that is a list of parts, as the APIs of vendors have it: texts, thoughts, calls and results of tools.

A vendor's part is one entry in PARTS.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .calls import CALL_KEYS, Note, read_calls
from .conversation import Message, RowError
from .loss_flags import FLAGS, weight_of
from .source_row import has_value, parsed
from .spelled_json import spelled_json

# The `type` of a part, or the key that holds it, and what it is.
# fmt: off
PARTS: dict[str, str] = {
    **dict.fromkeys(("text", "input_text", "output_text", "markdown"), "text"),
    **dict.fromkeys(("thinking", "reasoning", "reasoning_content", "reasoningContent", "think"), "thoughts"),
    **dict.fromkeys(("tool_use", "toolUse", "tool_call", "tool_calls", "function_call", "functionCall"), "call"),
    **dict.fromkeys(("tool_result", "toolResult", "tool_response", "function_call_output"), "result"),
    **dict.fromkeys(("function_response", "functionResponse"), "result"),
    **dict.fromkeys(("image", "image_url", "image_path", "image_base64", "input_image", "img"), "an image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "a video"),
    **dict.fromkeys(("file", "input_file", "document", "inlineData", "inline_data", "fileData"), "a file"),
}
# fmt: on
TEXT_KEYS = ("text", "value", "content", "thinking", "reasoning", "reasoningText", "output", "markdown")
RESULT_KEYS = ("content", "response", "output", "value", "result", "text")
RESULT_IDS = ("tool_use_id", "toolUseId", "tool_call_id", "call_id", "id")
KNOWN_KEYS = {*TEXT_KEYS, *RESULT_KEYS, *RESULT_IDS, "type", "name", "status", "thought", "signature", *FLAGS}


class Content(NamedTuple):
    """What a turn holds. `results` are turns of their own, which come before its text.

    weights: those of its parts, 1 for a part without one; empty if none has one.
    """

    text: str = ""
    thoughts: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    results: tuple[Message, ...] = ()
    weights: frozenset[int] = frozenset()


def read_content(content: object, number: int, note: Note) -> Content:
    """The content of turn `number`: text, or a list of parts.

    Raises: RowError if it is neither, or has a part that is no text (`multimodal`).
    """
    if isinstance(content, str):
        return Content(content)
    if isinstance(content, dict):
        content = content["parts"] if isinstance(content.get("parts"), list) else [content]
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        raise RowError("not_text", f"has a message {number} whose content is not text")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[Message] = []
    for part in content:
        kind, body = _kind(part, number)
        _note_keys(part, note)
        if kind == "call":
            calls += read_calls(body, note)
            continue
        if kind == "result":
            results.append(_result(body, number))
        else:
            (texts if kind == "text" else thoughts).append(_text(body, number))
        if body is not part:
            _note_keys(body, note)
    weights = _weights(content, number)
    return Content("".join(texts), "\n".join(filter(None, thoughts)), tuple(calls), tuple(results), weights)


def _weights(parts: list[dict[str, Any]], number: int) -> frozenset[int]:
    given = [
        [weight_of(each, key) for key, each in part.items() if key in FLAGS and each is not None] for part in parts
    ]
    if any(None in weights for weights in given):
        raise RowError("bad_weight", f"has a message {number} with a part whose weight is neither 0 nor 1")
    found = frozenset(min((w for w in weights if w is not None), default=1) for weights in given)
    return found if any(given) else frozenset()


def _note_keys(part: dict[str, Any], note: Note) -> None:
    for key in part.keys() - KNOWN_KEYS - PARTS.keys() - CALL_KEYS:
        if has_value(part[key]):
            note(f"messages[].content[].{key}")


def _kind(part: dict[str, Any], number: int) -> tuple[str, dict[str, Any]]:
    """What a part is, and the object or text that holds it."""
    named = part.get("type")
    known = isinstance(named, str) and named in PARTS
    key = named if known else next((key for key in part if key in PARTS and part[key] is not None), None)
    if key is None:
        what = f"of the type {named!r}" if isinstance(named, str) else f"with the keys {', '.join(map(str, part))}"
        raise RowError("not_text", f"has a message {number} whose content is not text: it has a part {what}")
    kind = PARTS[key]
    if kind not in ("text", "thoughts", "call", "result"):
        raise RowError("multimodal", f"has a message {number} with {kind}, and text alone can be trained on")
    if kind == "text" and part.get("thought") is True:  # Gemini marks thoughts so
        kind = "thoughts"
    body = part.get(key)
    if kind == "call" and not isinstance(body, dict):
        return kind, parsed(body if has_value(body) else part.get("value") or part)
    return kind, body if isinstance(body, dict) else part


def _text(body: dict[str, Any], number: int) -> str:
    found = next((body[key] for key in TEXT_KEYS if body.get(key) is not None), None)
    if isinstance(found, dict):  # Bedrock: {"reasoningText": {"text": ...}}
        found = found.get("text")
    if not isinstance(found, str):
        raise RowError("not_text", f"has a message {number} whose content is not text")
    return found


def _result(body: dict[str, Any], number: int) -> Message:
    """What a tool returned, as a turn of its own."""
    found: Message = {
        "role": "tool",
        "content": result_text(next((body[k] for k in RESULT_KEYS if k in body), ""), number),
    }
    name = body.get("name")
    if isinstance(name, str):
        found["name"] = name
    identity = next((body[key] for key in RESULT_IDS if has_value(body.get(key))), None)
    if identity is not None:
        found["tool_call_id"] = str(identity)
    return found


def has_results(content: object) -> bool:
    """Whether a content has a part that is the result of a tool, with its id or name."""
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    names = {name for part in parts for name in (*part, part.get("type")) if isinstance(name, str)}
    return any(PARTS.get(name) == "result" for name in names)


def result_text(value: object, number: int) -> str:
    """What a tool returned as text: the texts of its parts, or its value as JSON.

    Raises: RowError if it holds an image, audio or a video.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        known = ("json", *PARTS)
        if all(any(key in part or part.get("type") == key for key in known) for part in value):
            return "".join(_json(part["json"]) if "json" in part else _part_text(part, number) for part in value)
    return _json(value) if value is not None else ""


def _part_text(part: dict[str, Any], number: int) -> str:
    kind, body = _kind(part, number)
    return _text(body, number) if kind in ("text", "thoughts") else _json(part)


def _json(value: object) -> str:
    return value if isinstance(value, str) else spelled_json(value)
