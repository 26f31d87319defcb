"""Row formats: each translates a row into messages, the one shape that the rest of the package uses.

To add a format, write a function `row -> messages` with an example in its docstring, which is run as a test. Enter
it in FORMATS, and add its name to schema.DataFormat. The names of columns are in columns.py, those of roles and
turns in turns.py, the parts of a content in parts.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, NamedTuple

from .calls import refuse_unread_tools, tools_of
from .columns import (
    ANSWERS,
    CONTEXTS,
    DOCUMENTS,
    REQUESTS,
    THOUGHTS,
    TURNS,
    apply_weights,
    history_of,
    single_turn,
    system_turn,
    template_kwargs_of,
    turns_in,
    turns_of,
)  # fmt: skip
from .conversation import TEMPLATE_KEYS as TEMPLATE_KEYS
from .conversation import TEXT as TEXT
from .conversation import Conversation as Conversation
from .conversation import Message as Message
from .conversation import Rejection as Rejection
from .conversation import Row as Row
from .conversation import RowError as RowError
from .refusals import refuse_media, refuse_unsupported
from .source_row import SourceRow, as_text, has_value, text_of, unread_name
from .turns import check_turns, read_turns

Translation = Callable[[SourceRow], list[Message]]


def messages(row: SourceRow) -> list[Message]:
    """A conversation of turns with the roles system, developer, user, assistant and tool.

    A turn may have `tool_calls` and `reasoning_content`. An assistant turn with `weight: 0` has no loss.

    >>> row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    >>> to_messages(row, messages)
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    return _with_label(read_turns(turns_of(row, *TURNS), row), row)


def conversations(row: SourceRow) -> list[Message]:
    """Turns of ShareGPT's from and value, or of a request and its answer.

    >>> to_messages({"conversations": [{"input": "2+2?", "output": "4"}]}, conversations)
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    >>> row = {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
    >>> to_messages(row, conversations)
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    return _with_label(read_turns(turns_of(row, "conversations", *TURNS), row), row)


def prompt_completion(row: SourceRow) -> list[Message]:
    """One request and its answer, each a text or a list of turns.

    >>> to_messages({"prompt": "2+2?", "completion": "4"}, prompt_completion)
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    >>> row = {"prompt": [{"role": "user", "content": "2+2?"}], "completion": "4"}
    >>> to_messages(row, prompt_completion)
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    asked = row.find(*REQUESTS)
    if has_value(row.get(row.find("instruction") or "")) and (asked is None or asked.strip().lower() in CONTEXTS):
        return instruction(row)
    request, answer = turns_in(row.get(asked or "")), turns_in(row.get(row.find(*ANSWERS) or ""))
    if request is not None:
        return read_turns([*turns_of(row, *REQUESTS), *_answer_turns(row)], row)
    if row.find(*ANSWERS) is None:
        raise RowError("no_completion", "has no text under 'completion' or another name of an answer")
    if answer and all(isinstance(turn, dict) for turn in answer):
        return read_turns([{"role": "user", "content": text_of(row, *REQUESTS)}, *_answer_turns(row)], row)
    return _exchange(row, text_of(row, *REQUESTS), text_of(row, *ANSWERS), CONTEXTS[1:])


def instruction(row: SourceRow) -> list[Message]:
    """An instruction, an optional input or context, which is appended after an empty line, and the output.

    >>> to_messages({"instruction": "Add.", "input": "2 and 2", "output": "4"}, instruction)
    [{'role': 'user', 'content': 'Add.\\n\\n2 and 2'}, {'role': 'assistant', 'content': '4'}]
    """
    return _exchange(row, text_of(row, "instruction"), text_of(row, "output", *ANSWERS), CONTEXTS)


def classification(row: SourceRow) -> list[Message]:
    """A text and its label, which is text or an integer.

    >>> to_messages({"text": "It never arrived.", "label": "negative"}, classification)
    [{'role': 'user', 'content': 'It never arrived.'}, {'role': 'assistant', 'content': 'negative'}]
    """
    label = _label(row.take("label"))
    if label is None:
        raise RowError("no_label", "has no label that is text or a whole number")
    text = text_of(row, "text")
    for name, content in (("prompt", text), ("answer", label)):
        if not content.strip():
            raise RowError(f"empty_{name}", f"has an empty {'text' if content is text else 'label'}")
    return single_turn(text, label)


def message_tree(row: SourceRow) -> list[Message]:
    """A tree of messages with replies, as OASST exports it: the path of the best ranked replies.

    >>> replies = [{"role": "assistant", "text": "5", "rank": 1}, {"role": "assistant", "text": "4", "rank": 0}]
    >>> row = {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "2+2?", "replies": replies}}
    >>> to_messages(row, message_tree)
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    turn, path = row.take("prompt"), []
    while isinstance(turn, dict):
        path.append({"role": turn.get("role"), "content": turn.get("text")})
        replies = [reply for reply in turn.get("replies") or [] if isinstance(reply, dict)]
        if len(replies) > 1:
            row.note_unread("prompt.replies[] below the best rank")
        ranked = [reply for reply in replies if isinstance(reply.get("rank"), int)] or replies
        turn = min(ranked, key=lambda reply: reply.get("rank") or 0, default=None)
    if not path:
        raise RowError("no_prompt", "has no tree of messages under 'prompt'")
    turns = read_turns(path, row)
    while len(turns) > 1 and turns[-1]["role"] == "user":  # a request that nobody answered
        turns.pop()
    return turns


def text(row: SourceRow) -> list[Message]:
    """A document for continued pre-training: no chat template, loss on all tokens.

    >>> to_messages({"text": "Once upon a time."}, text)
    [{'role': 'text', 'content': 'Once upon a time.'}]
    """
    alone = () if row.find("instruction", *REQUESTS) else ANSWERS  # an answer without a request is a text
    return [{"role": TEXT, "content": text_of(row, *DOCUMENTS, *alone)}]


class Format(NamedTuple):
    """A translation, and the columns by which `data_format=auto` detects it: one of each group, in any case."""

    translate: Translation
    columns: tuple[tuple[str, ...], ...]

    def matches(self, columns: Iterable[object]) -> bool:
        names = {str(name).strip().lower() for name in columns}
        return all(any(name.lower() in names for name in group) for group in self.columns)


def _supported(translate: Translation) -> Translation:
    @wraps(translate)
    def translate_supported(row: SourceRow) -> list[Message]:
        refuse_unsupported(row)
        return translate(row)

    return translate_supported


# In the order in which they are tried.
FORMATS: dict[str, Format] = {
    "messages": Format(_supported(messages), (("messages",),)),
    "conversations": Format(_supported(conversations), (TURNS[1:],)),
    "message_tree": Format(_supported(message_tree), (("message_tree_id",), ("prompt",))),
    "instruction": Format(_supported(instruction), (("instruction",), ("output", *ANSWERS))),
    "prompt_completion": Format(_supported(prompt_completion), (REQUESTS, ANSWERS)),
    "classification": Format(_supported(classification), (("text",), ("label",))),
    "text": Format(_supported(text), (("text",),)),
}


class ParsedRow(NamedTuple):
    """A usable row. `unread` names the columns and keys that hold a value and are not read."""

    messages: list[Message]
    tools: list[Any] | None
    template_kwargs: dict[str, Any] | None
    unread: set[str]


def parse_row(row: object, translate: Translation) -> ParsedRow:
    """A row by its format, with what stands beside its turns: system text, tools, loss mask, template variables.

    Raises: RowError if the row cannot be used.
    """
    if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise RowError("not_an_object", "is not a JSON object")
    source = SourceRow(row)
    turns = translate(source)
    if not source.is_read:
        system = system_turn(source, turns)
        turns = [*system, *(turns[1:] if system and turns[0]["role"] == "system" else turns)]
        apply_weights(source, turns)
    refuse_media(turns)
    if not all(map(_is_unicode, turns)):
        raise RowError("not_unicode", "has half a surrogate pair, which is no character")
    check_turns(turns)
    plain = source.is_read and source.turn_tools is None
    tools, kwargs = (None, None) if plain else (tools_of(source), template_kwargs_of(source))
    if tools is None and not plain and any("tool_calls" in turn for turn in turns):
        refuse_unread_tools(source)
    return ParsedRow(turns, tools, kwargs, _unread(source, turns))


def _unread(row: SourceRow, turns: Sequence[Message]) -> set[str]:
    """What of a row is not read, without columns that repeat a turn, such as the prompt beside its messages."""
    unread = row.unread
    repeated = {turn["content"].strip() for turn in turns} if unread else set()
    kept = (key for key in unread if (as_text(row.get(key)) or "").strip() not in repeated - {""})
    return {unread_name(key, row.get(key)) for key in kept}


def to_messages(row: object, translate: Translation) -> list[Message]:
    """The messages of a row, checked for empty content and the order of roles.

    Raises: RowError if the row cannot be used.
    """
    return parse_row(row, translate).messages


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
        columns = [name for name, value in row.items() if value is not None] if isinstance(row, dict) else []
        columns = ["messages"] if isinstance(row, list) and row and isinstance(row[0], dict) else columns
        found.update([next((name for name, each in FORMATS.items() if each.matches(columns)), "")])
    del found[""]
    return found


def _exchange(row: SourceRow, request: str, answer: str, contexts: tuple[str, ...]) -> list[Message]:
    """The history of a row, its request with the contexts that it has, and its answer."""
    for name in contexts:
        value = row.take(name) if row.find(name) != row.find(*REQUESTS) or row.find("instruction") else None
        context = as_text(value)
        if value is not None and context is None and has_value(value):
            raise RowError(
                "not_text",
                f"has an {name} that is not text" if name == "input" else f"has a {name} that is not text",
            )
        if context and context.strip():
            request = f"{request}\n\n{context}"
    turns = [*history_of(row), *single_turn(request, answer)]
    thoughts = row.get(row.find(*THOUGHTS) or "")
    if isinstance(thoughts, str) and has_value(thoughts):
        turns[-1]["reasoning_content"] = str(row.take(*THOUGHTS))
    return turns


def _label(value: object) -> str | None:
    """A label as text; None if it is neither text nor a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _with_label(turns: list[Message], row: SourceRow) -> list[Message]:
    """Turns that end with a request, and as its answer the label beside them."""
    label = _label(row.get(row.find("label") or ""))
    if label is None or turns[-1]["role"] != "user":
        return turns
    row.take("label")
    return [*turns, {"role": "assistant", "content": label}]


def _answer_turns(row: SourceRow) -> list[Any]:
    """The completion of a request that is a list of turns."""
    name = row.find("completion", "response", "output")
    value = row.take(name) if name else None
    turns = turns_in(value)
    if isinstance(value, str) and turns is None and has_value(value):
        return [{"role": "assistant", "content": value}]
    if not turns:
        raise RowError(
            "no_completion",
            "has a list of turns as prompt and no completion: a prompt, as for reinforcement learning",
        )
    return turns


def _is_unicode(turn: Message) -> bool:
    try:
        turn["content"].encode()
        if len(turn) > 2:
            json.dumps(turn, ensure_ascii=False).encode()
        return True
    except UnicodeEncodeError:
        return False
