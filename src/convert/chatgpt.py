"""Read the conversation trees of a ChatGPT export as lists of chat messages.

An export is a list of conversations; each holds its messages as a tree, in `mapping`:
`{node_id: {"parent": id, "children": [ids], "message": {...} or null}}`. An edited prompt or a regenerated
answer is a second child of the same node, so every leaf of the tree ends one version of the conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

Json = Mapping[str, object]
Messages = list[dict[str, str]]

ROLES = {"system", "user", "assistant"}
TOOL_OUTPUT = {"execution_output", "tether_quote", "tether_browsing_display", "system_error"}
THOUGHTS = {"thoughts", "reasoning_recap"}
INSTRUCTIONS = {"user_editable_context", "model_editable_context"}
TEXT = {"text", "multimodal_text"}
PARTS = {  # a word of a part's type -> what it is counted as
    "image": "image",
    "audio": "audio clip",
    "video": "video",
    "tool_use": "tool call",
    "tool_result": "tool message",
    "thinking": "thought",
}
NOT_USED = {"user": "unanswered user message", "assistant": "unprompted answer", "system": "unused system message"}


@dataclass
class ExportRows:
    """The rows of an export.

    rows: a list of `{"role", "content"}` messages for each distinct branch.
    left_out: the number of items of each kind that are in no row. Each message is counted once.
    without_row: `"title": reason` for each conversation without a row.
    """

    rows: list[Messages] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    without_row: list[str] = field(default_factory=list)


@dataclass
class _Message:
    """A visible message. `text` is empty if it holds only images, audio or files."""

    role: str
    text: str


@dataclass
class _Turn:
    role: str
    texts: list[str]
    node_ids: list[str]


def is_conversation(value: object) -> bool:
    """Whether an object is an exported conversation: has a `mapping` of tree nodes."""
    nodes = _mapping(_mapping(value).get("mapping")).values()
    return any(key in _mapping(node) for node in nodes for key in ("message", "parent", "children"))


def chatgpt_conversations(export: Iterable[object]) -> ExportRows:
    """Convert every branch of every conversation of `export` into a list of messages.

    Missing nodes, loops and null fields are tolerated. What becomes part of no row is counted in `left_out` or
    named in `without_row`.
    """
    found = ExportRows()
    for conversation in export:
        title = _mapping(conversation).get("title")
        nodes = {key: _mapping(node) for key, node in _mapping(_mapping(conversation).get("mapping")).items()}
        visible = _visible(nodes, found.left_out)
        rows = _rows(nodes, visible, found.left_out)
        found.rows.extend(rows)
        if not rows:
            name = title if isinstance(title, str) and title.strip() else "(untitled)"
            found.without_row.append(f'"{name}": {_why_no_row(nodes, visible)}')
    return found


def left_out_summary(left_out: Mapping[str, int]) -> str:
    """`3 images, 2 tool messages`, the most frequent kind first; empty if nothing was left out."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {_plural(kind, count)}" for kind, count in ordered)


def _plural(kind: str, count: int) -> str:
    return kind if count == 1 else kind + ("es" if kind.endswith("ch") else "s")


def _mapping(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _visible(nodes: Mapping[str, Json], left_out: Counter[str]) -> dict[str, _Message]:
    """The visible messages by node id. All other messages are counted in `left_out`."""
    visible = {}
    for node_id, node in nodes.items():
        message = _mapping(node.get("message"))
        if not message:
            continue
        role, kind = _role(message), _kind_left_out(message)
        text, extras = ("", Counter[str]()) if kind else _text(message)
        if not text and not extras:
            extras[kind or "empty message"] += 1
        left_out.update(extras)
        if text or (role == "user" and kind != "custom instruction"):
            visible[node_id] = _Message(role, text)
    return visible


def _role(message: Json) -> str:
    role = _mapping(message.get("author")).get("role")
    return role if isinstance(role, str) else ""


def _kind_left_out(message: Json) -> str | None:
    """Why a message is left out; None if it is a visible message of the chat."""
    role, kind = _role(message), _mapping(message.get("content")).get("content_type")
    if role == "tool" or kind in TOOL_OUTPUT:
        return "tool message"
    if role == "assistant" and message.get("recipient") not in (None, "", "all"):
        return "tool call"
    if kind in THOUGHTS or message.get("channel") == "analysis":
        return "thought"
    if kind in INSTRUCTIONS:
        return "custom instruction"
    metadata = _mapping(message.get("metadata"))
    if message.get("weight") == 0 or metadata.get("is_visually_hidden_from_conversation") is True:
        return "hidden message"
    if role not in ROLES:
        return "message with another role"
    return None if kind in TEXT or kind is None else f"{kind} message"


def _text(message: Json) -> tuple[str, Counter[str]]:
    """The text of a visible message, its parts joined by an empty line, and counts of the other parts."""
    extras = Counter[str]()
    content = message.get("content")
    parts = _mapping(content).get("parts", content)
    if not isinstance(parts, list):
        parts = [parts if isinstance(parts, str) else _mapping(content).get("text")]
    texts = [text for part in parts if (text := _part_text(part, extras)).strip()]
    for attachment in _list(_mapping(message.get("metadata")).get("attachments")):
        mime = _mapping(attachment).get("mime_type") or _mapping(attachment).get("mimeType")
        if not str(mime).startswith(("image/", "audio/")):
            extras["attached file"] += 1
    return "\n\n".join(texts), extras


def _part_text(part: object, extras: Counter[str]) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return ""
    text, kind = part.get("text"), str(part.get("content_type"))
    if isinstance(text, str):
        return text
    extras[next((name for word, name in PARTS.items() if word in kind), "other content part")] += 1
    return ""


def _rows(nodes: Mapping[str, Json], visible: Mapping[str, _Message], left_out: Counter[str]) -> list[Messages]:
    """One row for each distinct branch. Duplicates, and visible messages in no row, are counted in `left_out`."""
    rows: dict[tuple[tuple[str, str], ...], None] = {}
    used: set[str] = set()
    on_a_path: set[str] = set()
    for path in _paths(nodes):
        on_a_path.update(path)
        turns = _turns(path, visible)
        used.update(node_id for turn in turns for node_id in turn.node_ids)
        row = tuple((turn.role, "\n\n".join(turn.texts)) for turn in turns)
        left_out["duplicate branch"] += bool(row) and row in rows
        if row:
            rows[row] = None
    for node_id, message in visible.items():
        if message.text and node_id not in used:
            left_out[NOT_USED[message.role] if node_id in on_a_path else "message in a loop"] += 1
    _drop_zeros(left_out)
    return [[{"role": role, "content": text} for role, text in row] for row in rows]


def _drop_zeros(counts: Counter[str]) -> None:
    for kind in [kind for kind, count in counts.items() if not count]:
        del counts[kind]


def _paths(nodes: Mapping[str, Json]) -> Iterator[list[str]]:
    """The node ids from root to leaf, for each leaf. A loop in the parent links ends the path."""
    parents = _parents(nodes)
    inner = set(parents.values())
    for leaf in nodes:
        if leaf in inner:
            continue
        path: dict[str, None] = {}
        node_id: str | None = leaf
        while node_id is not None and node_id not in path:
            path[node_id] = None
            node_id = parents[node_id]
        yield list(reversed(path))


def _parents(nodes: Mapping[str, Json]) -> dict[str, str | None]:
    """The parent of each node: the one that it names, else the one that lists it as a child, else None."""
    listed_by: dict[object, str] = {}
    for node_id, node in nodes.items():
        for child in _list(node.get("children")):
            if isinstance(child, str) and child != node_id:
                listed_by.setdefault(child, node_id)
    parents: dict[str, str | None] = {}
    for node_id, node in nodes.items():
        named = node.get("parent")
        known = isinstance(named, str) and named in nodes and named != node_id
        parents[node_id] = str(named) if known else listed_by.get(node_id)
    return parents


def _turns(path: Iterable[str], visible: Mapping[str, _Message]) -> list[_Turn]:
    """The turns of a branch up to its last answer. Consecutive messages of one role are joined.

    Answers to a user message without text are left out: the answer to an image would otherwise appear to answer
    the question before it.
    """
    turns: list[_Turn] = []
    has_request = False
    for node_id in path:
        message = visible.get(node_id)
        if message is None:
            continue
        if message.role == "user":
            has_request = bool(message.text)
        if not message.text or (message.role == "assistant" and not has_request):
            continue
        if not turns or turns[-1].role != message.role:
            turns.append(_Turn(message.role, [], []))
        turns[-1].texts.append(message.text)
        turns[-1].node_ids.append(node_id)
    while turns and turns[-1].role != "assistant":
        turns.pop()
    return turns


def _why_no_row(nodes: Mapping[str, Json], visible: Mapping[str, _Message]) -> str:
    speaking = {message.role for message in visible.values() if message.text}
    if not any(_mapping(node.get("message")) for node in nodes.values()):
        return "it has no messages"
    if "user" not in speaking:
        return "no visible text from the user"
    if "assistant" not in speaking:
        return "no visible text from the assistant"
    return "no user message is followed by an answer"
