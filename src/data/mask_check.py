"""Verify the loss mask: derive it a second time, independently, and compare.

chat.py locates an answer by rendering the conversation up to it and through it ("prefix rendering"). This module
locates answers in the complete text: by the `{% generation %}` marks of the template or, if it has none, by
rendering placeholders instead of the messages. Tokens come from one pass over the complete text, by their
character offsets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import compress, pairwise
from typing import NamedTuple

import numpy as np

from ..utils.limits import LimitExceeded, limited
from .answer_text import CharSpan
from .chat import RENDERING, ChatTokenizer
from .conversation import TEXT, Conversation, Message, RowError
from .segments import RenderedChat
from .store import Example
from .template_render import is_plain
from .thoughts import find_thought

NEAR = 64  # characters around a position that are searched for a marker
TAGS = re.compile(r"</?[\w:|]{1,40}>")
MARK = "\ue000{}\ue001"  # the placeholder of a message, of private-use characters


class MaskCheck(NamedTuple):
    """The result of a check.

    agrees: None if the second derivation does not apply.
    detail: what differs, or why it does not apply.
    """

    agrees: bool | None
    detail: str = ""


class TextTokens(NamedTuple):
    """A text as tokens: their ids, and the characters `start, end` of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class MaskVerifier:
    """Compares the two derivations of the mask for one tokenizer and chat template."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self.chat = chat
        self.marks = bool(re.search(r"\{%-?\s*generation\s*-?%\}", str(chat.tokenizer.chat_template)))

    @property
    def method(self) -> str:
        return "generation marks" if self.marks else "offsets"

    def verify(self, conversation: Conversation, rendered: RenderedChat, example: Example) -> MaskCheck:
        """Compare a rendered text, and its example with loss on its answers, with the second derivation."""
        return next(self.verify_all([(conversation, rendered, example)]))

    def verify_all(self, items: Sequence[tuple[Conversation, RenderedChat, Example]]) -> Iterator[MaskCheck]:
        """The result of `verify` for each item, in order. All texts are tokenized in one call."""
        fast = self.chat.tokenizer.is_fast
        chats = [rendered.text for conversation, rendered, _ in items if _is_chat(conversation)]
        tokens = self._tokens(chats) if fast else iter(())
        for conversation, rendered, example in items:
            if not _is_chat(conversation):
                yield MaskCheck(True)
            elif not fast:
                yield MaskCheck(None, "the tokenizer gives no offsets")
            else:
                yield self._verify(conversation, rendered, example, next(tokens))

    def _verify(
        self, conversation: Conversation, rendered: RenderedChat, example: Example, full: TextTokens
    ) -> MaskCheck:
        conversation = conversation.upto(rendered.answer_turns[-1] + 1)
        turns, text = conversation.messages, rendered.text
        for span in rendered.answer_spans:
            if not self.chat.markup.ends_turn(text[: span.end]):
                return MaskCheck(False, f"has no end of turn after {text[span.start : span.end]!r}")
        marks = self.marks
        spans = self._by_marks(conversation, text, full) if marks else self._by_placeholders(conversation, text)
        if spans is None:
            check = self._by_content(conversation, rendered)
            return self._tokens_agree(rendered, example, full) if check.agrees else check
        wanted = spans[-len(rendered.answer_spans) :]
        if len(wanted) != len(rendered.answer_spans) or (len(wanted) > 1 and len(spans) > len(wanted)):
            detail = f"has {len(rendered.answer_spans)} answers by prefix rendering, {len(spans)} by {self.method}"
            return MaskCheck(False, detail)
        for number, found, other in zip(rendered.answer_turns, rendered.answer_spans, wanted, strict=True):
            if not self._same(text, found, other, turns[number]):
                texts = (text[s.start : s.end] for s in (found, other))
                detail = "has loss on {!r} by prefix rendering, on {!r} by {}".format(*texts, self.method)
                return MaskCheck(False, detail)
        return self._tokens_agree(rendered, example, full)

    def _same(self, text: str, found: CharSpan, other: CharSpan, turn: Message) -> bool:
        """Whether two spans differ in nothing but what the template writes around an answer.

        The second derivation may include the generation prompt and an empty think block, and leave out what the
        template writes before the first word and after the last.
        """
        if not self._is_markup(text, min(found.end, other.end), max(found.end, other.end)):
            return False
        thought = _thought(turn) if found.start <= other.start else ""
        start, end = sorted((found.start, other.start))
        return self._is_markup(text, start, end, thought)

    def _is_markup(self, text: str, start: int, end: int, thought: str = "") -> bool:
        """Whether a part of a text consists of the template's own words, none of them cut, and of a thought."""
        if start == end:
            return True
        written = text[start:end].replace(thought.strip(), " ", 1) if thought else text[start:end]
        return not any(self._cuts(text, at) for at in (start, end)) and not self._surplus(written)

    def _cuts(self, text: str, at: int) -> bool:
        """Whether a position is within a word or a marker."""
        near = self.chat.markup.marker.finditer(text, max(0, at - NEAR), at + NEAR)
        return text[max(0, at - 1) : at + 1].isalnum() or any(m.start() < at < m.end() for m in near)

    def _surplus(self, text: str) -> set[str]:
        """The words of a text that are neither the template's own nor in a tag."""
        bare = TAGS.sub(" ", self.chat.markup.marker.sub(" ", text))
        return {*re.findall(r"\w+", bare)} - self.chat.markup.words

    def _by_content(self, conversation: Conversation, rendered: RenderedChat) -> MaskCheck:
        """Compare each answer's span with what the message says: all of it, and else only the template's words."""
        for number, span in zip(rendered.answer_turns, rendered.answer_spans, strict=True):
            turn = conversation.messages[number]
            rest = rendered.text[span.start : span.end].removesuffix(self.chat.markup.end_of_turn)
            markup = self.chat.markup
            said = {*markup.pieces_of(turn), (markup.thought_of(turn) or "").strip()} - {""}
            for piece in sorted(said, key=len, reverse=True):
                form = next((f for f in _rendered_forms(piece) if f in rest), None)
                if form is None:
                    return MaskCheck(None, f"{self.method} do not tell where its answers stand")
                rest = _without(rest, form)
            ids = [str(call.get("id")) for call in turn.get("tool_calls") or () if isinstance(call, dict)]
            surplus = {w for w in self._surplus(rest) if not w.isdigit() and w not in " ".join(ids)}
            if surplus and not turn.get("tool_calls"):
                return MaskCheck(False, f"has loss on {' '.join(sorted(surplus))!r}, which is not in its answer")
        return MaskCheck(True)

    def _tokens(self, texts: Sequence[str]) -> Iterator[TextTokens]:
        backend = self.chat.tokenizer.backend_tokenizer
        backend.no_truncation()  # state that an earlier call or the tokenizer's file may have set
        backend.no_padding()
        found = backend.encode_batch(list(texts), add_special_tokens=False)
        return (TextTokens(each.ids, each.offsets) for each in found)

    def _tokens_agree(self, rendered: RenderedChat, example: Example, full: TextTokens) -> MaskCheck:
        """Compare the example with the tokens of the complete text, which have loss if they begin in an answer.

        They are compared in stretches between special tokens, which both must have in common.
        """
        ids, offsets = full
        loss_mask = _begin_within(offsets, rendered.answer_spans)
        if (example.ids, example.loss_mask) == (ids, loss_mask):
            return MaskCheck(True)
        ours, theirs = self._stretches(example.ids), self._stretches(ids)
        if len(ours) != len(theirs):
            return MaskCheck(False, "has other special tokens than its text")
        for mine, other in zip(ours, theirs, strict=True):
            same_ids = example.ids[mine] == ids[other]
            if same_ids and example.loss_mask[mine] == loss_mask[other]:
                continue
            found = self._letters(list(compress(example.ids[mine], example.loss_mask[mine])))
            if same_ids:
                meant = self._letters(list(compress(ids[other], loss_mask[other])))
            else:  # a token of the complete text spans the edge of an answer: compare texts without white space
                meant = self._letters(self._ids_within(rendered, offsets[other][0][0], offsets[other][-1][1]))
            if same_ids or found != meant:
                return MaskCheck(False, f"has loss on tokens that read {found[:80]!r}, not {meant[:80]!r}")
        return MaskCheck(True)

    def _ids_within(self, rendered: RenderedChat, begin: int, end: int) -> list[int]:
        """The token ids of the parts of the answers within `begin:end` of the text."""
        parts = (rendered.text[max(begin, s.start) : min(end, s.end)] for s in rendered.answer_spans)
        return list(self.chat.tokenizer("".join(parts), add_special_tokens=False)["input_ids"])

    def _stretches(self, ids: list[int]) -> list[slice]:
        """`ids`, cut after each special token."""
        edges = {0, *(i for i, token in enumerate(ids, 1) if token in self._special_ids), len(ids)}
        return [slice(*edge) for edge in pairwise(sorted(edges))]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.chat.tokenizer.convert_tokens_to_ids(list(self.chat.special_tokens)))

    def _letters(self, ids: list[int]) -> str:
        return "".join(self.chat.tokenizer.decode(ids).split())

    def _by_marks(self, conversation: Conversation, text: str, full: TextTokens) -> list[CharSpan] | None:
        """The spans of the answers by the template's generation marks; None if it renders another text."""
        conversation = self.chat.adapt(conversation).conversation
        try:
            if self.chat.plain_template and is_plain(conversation):
                marked, blocks = limited(RENDERING, self.chat.plain_template.answers, conversation.messages)
                return _joined(CharSpan(*block) for block in blocks) if marked == text else None
            out = limited(
                RENDERING,
                self.chat.tokenizer.apply_chat_template,
                list(conversation.messages),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **self.chat.template_arguments(conversation),
            )
        except LimitExceeded:
            raise
        except Exception:  # whatever a template raises: it renders the prompt, but not the conversation
            return None
        if list(out["input_ids"]) != full.ids:
            return None
        spans: list[CharSpan] = []
        before = 0
        for on, (start, end) in zip(out["assistant_masks"], full.offsets, strict=True):
            if on and before:
                spans[-1] = CharSpan(spans[-1].start, end)
            elif on:
                spans.append(CharSpan(start, end))
            before = on
        return spans

    def _by_placeholders(self, conversation: Conversation, text: str) -> list[CharSpan] | None:
        """The spans of the answers by placeholders: each message is rendered as a distinct mark, which is located.

        A mark replaces tool calls as well. None if the text contains a message in a modified form.
        """
        turns = conversation.messages
        marks = [MARK.format(i) if _has_content(turn) else "" for i, turn in enumerate(turns)]
        placed = [_placeholder_turn(*pair) for pair in zip(turns, marks, strict=True)]
        try:
            marked = self.chat.render(conversation._replace(messages=placed))
        except RowError:
            return None
        spans: list[CharSpan] = []
        at = 0
        for turn, mark in zip(turns, marks, strict=True):
            if not mark:  # its frame is part of the next message's
                continue
            frame, found, marked = marked.partition(mark)
            if not found or not text.startswith(frame, at):
                return None
            at += len(frame)
            following = marked.partition(MARK[0])[0]
            if turn.get("tool_calls"):
                end = text.find(following, at + 1) if following else -1
            else:
                forms = _rendered_forms(_split_thought(turn)[1])
                ends = (at + len(form) for form in forms if text.startswith(form + following, at))
                end = next(ends, -1)
            if end < 0:
                return None
            if turn["role"] == "assistant":
                spans.append(CharSpan(at, end))
            at = end
        return spans if text.startswith(marked, at) else None


def _is_chat(conversation: Conversation) -> bool:
    return conversation.messages[0]["role"] != TEXT


def _joined(spans: Iterable[CharSpan]) -> list[CharSpan]:
    """The spans that are not empty; those that touch become one."""
    found: list[CharSpan] = []
    for start, end in spans:
        if found and found[-1].end == start:
            found[-1] = CharSpan(found[-1].start, end)
        elif end > start:
            found.append(CharSpan(start, end))
    return found


def _begin_within(offsets: Sequence[tuple[int, int]], spans: Sequence[CharSpan]) -> list[bool]:
    """Whether each token that is not empty begins within one of the spans."""
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    within = np.zeros(len(starts), bool)
    for span in spans:
        within |= (starts >= span.start) & (starts < span.end)
    found: list[bool] = (within & (starts < ends)).tolist()
    return found


def _has_content(turn: Message) -> bool:
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def _placeholder_turn(turn: Message, mark: str) -> Message:
    """`turn` with its thoughts, and `mark` for the rest of its content; `turn` itself if `mark` is empty."""
    if not mark:
        return turn
    made: Message = {**turn, "content": _split_thought(turn)[0] + mark}
    made.pop("tool_calls", None)
    return made


def _thought(turn: Message) -> str:
    """The thoughts of an answer, between whatever tags."""
    found = find_thought(turn["content"], source=turn["content"])
    return turn.get("reasoning_content") or (found.text if found else "")


def _split_thought(turn: Message) -> tuple[str, str]:
    """The thoughts at the beginning of an answer, through their closing tag, and the rest."""
    found = find_thought(turn["content"]) if turn["role"] == "assistant" else None
    end = found.end if found else 0
    return turn["content"][:end], turn["content"][end:]


def _rendered_forms(content: str) -> list[str]:
    """The forms in which a template may render a message: as is, or stripped of white space or newlines."""
    return [
        content,
        content.strip(),
        content.lstrip(),
        content.rstrip(),
        content.lstrip("\n"),
        content.strip("\n"),
    ]


def _without(text: str, said: str) -> str:
    """`text` without what an answer says, where it stands alone: a short one may occur in a marker too."""
    alone, count = re.subn(rf"(?<!\w){re.escape(said)}(?!\w)", " ", text)
    return alone if count else text.replace(said, " ", 1)
