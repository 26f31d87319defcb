"""The text of one answer as a model meets it at inference: the prompt, then what the model has to write.

Most templates render a conversation up to an answer as the beginning of the conversation with it, so that cutting
gives the answer. Others write the prompt and the conversation differently: the prompt opens a think block, earlier
turns change, the last system turn moves. For these the text is composed of the prompt and the answer as the
template renders it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from .conversation import Conversation, Message, RowError
from .thoughts import EMPTY_THOUGHT, OPEN_THOUGHT, closing_tag, find_thought
from .turn_markup import TurnMarkup, shared

THINKING: tuple[dict[str, Any], ...] = (  # variables with which templates switch thoughts on
    {"enable_thinking": True, "thinking": True, "skip_think": False},
    {"reasoning_effort": "high"},
)
MARKER = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")
THINKING_OFF = (
    "has thoughts, and its prompt ends with an empty think block, since thinking is switched off: switch it on "
    "with chat_template_kwargs, or leave the thoughts out"
)
SHOWN = 60  # characters of two texts that differ, in a message


class CharSpan(NamedTuple):
    """Characters `start:end` of a text."""

    start: int
    end: int


class AnswerText(NamedTuple):
    """The conversation `text` through the answer with message index `turn`, which is at `span`.

    prompt: what the template renders before the answer; `text` begins with it.
    """

    turn: int
    text: str
    span: CharSpan
    prompt: str

    def locate_in(self, text: str) -> CharSpan | None:
        """The span of the answer in the longer rendering `text`; None if `text` renders it differently."""
        return self.span if text.startswith(self.text[: self.span.end]) else None


class Renderer(Protocol):
    """A chat template: renders conversations, and knows what it writes around their answers."""

    template_kwargs: dict[str, Any]

    @property
    def markup(self) -> TurnMarkup: ...

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str: ...


def answer_text(
    chat: Renderer, conversation: Conversation, turn: int, *, train_empty_thoughts: bool
) -> AnswerText:
    """The text of the answer `turn` with all that comes before it.

    An answer with thoughts is rendered with thinking switched on where the template loses them otherwise. The
    empty think block that a template writes before an answer without thoughts belongs to the prompt, unless
    `train_empty_thoughts`.

    Raises: RowError if the template rejects the turns, or does not render the answer after its prompt.
    """
    thought = chat.markup.thought_of(conversation.messages[turn])
    if not thought or not thought.strip():
        return _without_thoughts(chat, conversation, turn, train_empty_thoughts)
    try:
        found = _answer_text(chat, conversation, turn)
    except RowError:
        thinking = _with_thinking(chat, conversation, turn, thought)
        if thinking is None:
            raise
        return thinking
    return found if _says(found, thought) else _with_thinking(chat, conversation, turn, thought) or found


def _without_thoughts(chat: Renderer, conversation: Conversation, turn: int, train_empty: bool) -> AnswerText:
    """The text of an answer without thoughts. An empty think block that is in the row carries loss.

    Where the text before the answer has closed a block, a second one would follow: there it is left out.
    """
    message = conversation.messages[turn]
    found = _answer_text(chat, conversation, turn)
    own = find_thought(message["content"], source=message["content"])  # whether the template knows the tags or not
    holds_empty = own is not None and not own.text
    before = found.text[: found.span.start]
    if own and holds_empty and any(block.end() == len(before) for block in EMPTY_THOUGHT.finditer(before)):
        bare: Message = {**message, "content": message["content"][own.end :].lstrip("\n")}
        return _answer_text(chat, conversation._replace(messages=[*conversation.messages[:turn], bare]), turn)
    return found if holds_empty or train_empty else _without_empty_thought(found)


def _with_thinking(chat: Renderer, conversation: Conversation, turn: int, thought: str) -> AnswerText | None:
    """The text with thinking switched on, if the template knows how, and then renders the thought."""
    chosen = chat.template_kwargs | dict(conversation.template_kwargs or {})
    for switch in THINKING:
        thinking = conversation._replace(template_kwargs=switch | chosen)
        try:
            found = _answer_text(chat, thinking, turn)
        except RowError:
            continue
        if not _says(found, thought):
            found = _with_thought(found, thought, chat.render(conversation.upto(turn), prompt=True))
        if _says(found, thought) and switch | chosen != chosen:
            return found
    return None


def _with_thought(found: AnswerText, thought: str, closed: str) -> AnswerText:
    """The answer after its thoughts, which the template leaves out.

    Args:
        closed: the prompt without thinking. If it ends with an empty think block, that shows the tags.
    """
    start, end = found.span
    closes = EMPTY_THOUGHT.match(found.text, start, end)
    if OPEN_THOUGHT.search(found.prompt):  # the template closes an empty block that the prompt opens
        written = thought.strip() if closes and not closes["open"] else ""
    else:
        written = _block_after(closed, thought) if closed != found.prompt else ""
    text = found.text[:start] + written + found.text[start:]
    return found._replace(text=text, span=CharSpan(start, end + len(written))) if written else found


def _block_after(closed: str, thought: str) -> str:
    """A block of thoughts with the tags of the empty one that ends the prompt `closed`; empty if there is none."""
    block = next((m for m in EMPTY_THOUGHT.finditer(closed) if m.end() == len(closed) and m["open"]), None)
    if block is None:
        return ""
    line = "\n" if "\n" in block["space"] else ""
    return f"{block['open']}{line}{thought.strip()}{line}{closing_tag(block['open'])}"


def _says(found: AnswerText, thought: str) -> bool:
    return thought.strip() in found.text[found.span.start : found.span.end]


def _answer_text(chat: Renderer, conversation: Conversation, turn: int) -> AnswerText:
    message = conversation.messages[turn]
    before = chat.render(conversation.upto(turn), prompt=True)
    text, rest = chat.markup.split(chat.render(conversation.upto(turn + 1)), list(chat.markup.pieces_of(message)))
    answer = (
        text[len(before) :] if text.startswith(before) else _answer_after(before, text, conversation, turn, chat)
    )
    if not answer.removesuffix(chat.markup.end_of_turn).strip():
        nothing = f"a message {turn + 1} of which the chat template writes nothing"
        what = "tool calls that the chat template leaves out" if message.get("tool_calls") else nothing
        raise RowError("dropped_by_template", f"has {what}")
    if text.startswith(before):
        return AnswerText(turn, text + rest, CharSpan(len(before), len(text)), before)
    return AnswerText(turn, before + answer + rest, CharSpan(len(before), len(before + answer)), before)


def _without_empty_thought(found: AnswerText) -> AnswerText:
    """The answer without the empty think block that the template writes before it, or closes."""
    block = EMPTY_THOUGHT.match(found.text, found.span.start, found.span.end)
    return found._replace(span=CharSpan(block.end(), found.span.end)) if block else found


def _answer_after(before: str, text: str, conversation: Conversation, turn: int, chat: Renderer) -> str:
    """What follows the prompt `before`, from the conversation `text`, which renders the prompt differently.

    Raises: RowError if the two differ in more than a think block, markers and white space.
    """
    message, markup = conversation.messages[turn], chat.markup
    for at_before, at_text in _alignments(before, text, conversation.messages[:turn]):
        same = _whole_markers(before[at_before:], len(shared(before[at_before:], text[at_text:])))
        opened, answer = before[at_before + same :], text[at_text + same :]
        if not opened:
            return answer
        if thoughts := OPEN_THOUGHT.fullmatch(opened.lstrip()):
            return _after_opened(opened, closing_tag(thoughts[1]), answer, markup.thought_of(message) or "")
        if EMPTY_THOUGHT.fullmatch(opened):
            if markup.thought_of(message):
                raise RowError("thinking_off", THINKING_OFF)
            return answer
        if answer.lstrip().startswith(opened.lstrip()):
            return answer.lstrip()[len(opened.lstrip()) :] if opened.strip() else answer.lstrip()
        appended = len(opened) > len(markup.header) and (markup.closing + markup.header).endswith(opened)
        if appended or not markup.marker.sub("", opened.removesuffix(markup.header)).strip():
            # the prompt ends the turns before it in another way
            return _without_header(answer.lstrip(), markup.header)
    same = len(shared(before, text))
    raise RowError(
        "template",
        "has an answer that the chat template does not render after its prompt: the prompt continues with "
        f"{before[same : same + SHOWN]!r}, the conversation with {text[same : same + SHOWN]!r}",
    )


def _alignments(before: str, text: str, earlier: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """Positions in both texts from which they are compared: their beginnings, or the end of the last message."""
    yield 0, 0
    said = next((turn["content"].strip() for turn in reversed(earlier) if turn["content"].strip()), "")
    for form in dict.fromkeys((said, json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1])):
        if form and form in before and form in text:
            yield before.rfind(form) + len(form), text.rfind(form) + len(form)


def _whole_markers(text: str, end: int) -> int:
    """`end`, moved back to the beginning of a marker that it is within."""
    tag = OPEN_THOUGHT.search(text)
    if tag and tag.start() < end:
        return tag.start()
    start = max(text.rfind("<", 0, end), text.rfind("[", 0, end))
    inside = start >= 0 and not re.search(r"[>\]\s]", text[start:end]) and MARKER.match(text, start)
    return start if inside else end


def _without_header(answer: str, header: str) -> str:
    """The answer without the end of the generation prompt with which it begins."""
    ends = (header[start:] for start in range(len(header)))
    return answer.removeprefix(next((end for end in ends if answer.startswith(end)), ""))


def _after_opened(opened: str, close: str, answer: str, thought: str) -> str:
    """What a model writes in a think block that the prompt has opened, and after it.

    Args:
        opened: the end of the prompt, with the opening tag.
        answer: the answer as the template renders it, with or without the think block.
        thought: its thoughts; empty if it has none.
    """
    thought = thought.strip()
    line = "\n" if opened.endswith("\n") else ""
    if thought and thought in answer:
        return answer[answer.index(thought) :]
    said = answer.lstrip()
    block = EMPTY_THOUGHT.match(said)
    if block and block["open"]:
        said = said[block.end("open") :].lstrip()
    if said.startswith(close):
        return thought + line * bool(thought) + said
    return f"{thought}{line}{close}{line * 2}{said}"
