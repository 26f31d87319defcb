"""The mask derived a second time, by another way, and compared with the first.

chat.py finds an answer as what a longer rendering adds to a shorter one. Here it is found in the whole
conversation: by the template's own `{% generation %}` marks, or, where it has none, by the place that
marked stand-ins for the messages take when the template renders them. Tokens then come from one pass over
the whole text, by their character offsets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import compress, pairwise
from typing import NamedTuple

from src.data.chat import CharSpan, ChatTokenizer, RenderedChat, Tools
from src.data.formats import TEXT, Message, RowError
from src.data.store import Example

MARK = "\ue000{}\ue001"  # stands in for a message: characters of private use


class MaskCheck(NamedTuple):
    """agrees: None where the second way does not apply; detail: what differs, or why it does not apply."""

    agrees: bool | None
    detail: str = ""


class MaskVerifier:
    """Compares the two derivations for one tokenizer and chat template."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self.chat = chat
        self.marks = bool(re.search(r"\{%-?\s*generation\s*-?%\}", str(chat.tokenizer.chat_template)))

    @property
    def method(self) -> str:
        return "generation marks" if self.marks else "offsets"

    def verify(
        self, turns: Sequence[Message], tools: Tools, rendered: RenderedChat, example: Example
    ) -> MaskCheck:
        """Compare one text of a conversation, and its example with loss on its answers, with the second way."""
        if turns[0]["role"] == TEXT:
            return MaskCheck(True)
        if not self.chat.tokenizer.is_fast:
            return MaskCheck(None, "the tokenizer gives no offsets")
        turns = turns[: rendered.answer_turns[-1] + 1]
        find = self._marked if self.marks else self._replaced
        places = find(turns, tools, rendered.text)
        if places is None:
            return MaskCheck(None, f"{self.method} do not tell where its answers stand")
        wanted = places[-len(rendered.answer_spans) :]
        if len(wanted) != len(rendered.answer_spans) or (len(wanted) > 1 and len(places) > len(wanted)):
            told = f"has {len(rendered.answer_spans)} answers by prefix rendering, {len(places)} by {self.method}"
            return MaskCheck(False, told)
        for number, found, place in zip(rendered.answer_turns, rendered.answer_spans, wanted, strict=True):
            other = self._through_end(rendered.text, place)
            if not self._same(rendered.text, found, other, turns[number]):
                shown = (rendered.text[s.start : s.end] for s in (found, other))
                told = "has loss on {!r} by prefix rendering, on {!r} by {}".format(*shown, self.method)
                return MaskCheck(False, told)
        return self._tokens_agree(rendered, example)

    def _same(self, text: str, found: CharSpan, other: CharSpan, turn: Message) -> bool:
        """Whether two places are one, but for space and for what the template writes in front of an answer."""
        if text[min(found.end, other.end) : max(found.end, other.end)].strip():
            return False
        if other.start <= found.start:
            return not text[other.start : found.start].strip()
        between = text[found.start : other.start].strip()
        return between == "" or between == self._preamble(turn)

    def _preamble(self, turn: Message) -> str:
        """What the template writes in front of an answer which the model is to write itself: its thoughts, say."""
        asked: list[Message] = [{"role": "user", "content": "."}]
        try:
            before = self.chat.render(asked, prompt=True)
            text = self.chat.render([*asked, _stand_in(turn, MARK.format(0))])
        except RowError:
            return ""
        return text.removeprefix(before).partition(MARK.format(0))[0].strip() if text.startswith(before) else ""

    def _tokens_agree(self, rendered: RenderedChat, example: Example) -> MaskCheck:
        """Tokens of one pass over the text, learnt where they begin in an answer, against those of the pieces.

        They are compared stretch by stretch, from one special token to the next, of which both have the same.
        """
        whole = self.chat.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = list(whole["input_ids"]), list(whole["offset_mapping"])
        learnt = [
            start < end and any(s.start <= start < s.end for s in rendered.answer_spans) for start, end in places
        ]
        ours, theirs = self._stretches(example.ids), self._stretches(ids)
        if len(ours) != len(theirs):
            return MaskCheck(False, "has other special tokens than its text")
        for mine, other in zip(ours, theirs, strict=True):
            same_ids = example.ids[mine] == ids[other]
            if same_ids and example.loss_mask[mine] == learnt[other]:
                continue
            found = self._letters(list(compress(example.ids[mine], example.loss_mask[mine])))
            if same_ids:
                meant = self._letters(list(compress(ids[other], learnt[other])))
            else:  # a token of one pass reaches over the edge of an answer: texts are compared, save space
                meant = self._letters(self._ids_within(rendered, places[other][0][0], places[other][-1][1]))
            if same_ids or found != meant:
                return MaskCheck(False, f"has loss on tokens that read {found[:80]!r}, not {meant[:80]!r}")
        return MaskCheck(True)

    def _ids_within(self, rendered: RenderedChat, begin: int, end: int) -> list[int]:
        """Token ids of what is of the answers in this stretch of the text."""
        parts = (rendered.text[max(begin, s.start) : min(end, s.end)] for s in rendered.answer_spans)
        return list(self.chat.tokenizer("".join(parts), add_special_tokens=False)["input_ids"])

    def _stretches(self, ids: list[int]) -> list[slice]:
        """`ids` cut behind each special token."""
        edges = {0, *(i for i, token in enumerate(ids, 1) if token in self._special_ids), len(ids)}
        return [slice(*edge) for edge in pairwise(sorted(edges))]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.chat.tokenizer.convert_tokens_to_ids(list(self.chat.special_tokens)))

    def _letters(self, ids: list[int]) -> str:
        return "".join(self.chat.tokenizer.decode(ids).split())

    def _through_end(self, text: str, place: CharSpan) -> CharSpan:
        """`place`, and the end of turn that follows it, if it is not in it."""
        end = self.chat.end_of_turn
        if text[place.start : place.end].rstrip().endswith(end.strip()) or not text.startswith(end, place.end):
            return place
        return CharSpan(place.start, place.end + len(end))

    def _marked(self, turns: Sequence[Message], tools: Tools, text: str) -> list[CharSpan] | None:
        """Places of the answers by the template's generation marks."""
        out = self.chat.tokenizer.apply_chat_template(
            list(turns),
            tools=list(tools) if tools else None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        whole = self.chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(out["input_ids"]) != list(whole["input_ids"]):
            return None
        places: list[CharSpan] = []
        before = 0
        for on, (start, end) in zip(out["assistant_masks"], whole["offset_mapping"], strict=True):
            if on and before:
                places[-1] = CharSpan(places[-1].start, end)
            elif on:
                places.append(CharSpan(start, end))
            before = on
        return places

    def _replaced(self, turns: Sequence[Message], tools: Tools, text: str) -> list[CharSpan] | None:
        """Places of the answers by stand-ins: each message is rendered as a mark of its own, and the marks found.

        A mark stands in for calls of tools as well. None where the text has a message in another form.
        """
        marks = [MARK.format(i) if _says(turn) else "" for i, turn in enumerate(turns)]
        try:
            marked = self.chat.render([_stand_in(*pair) for pair in zip(turns, marks, strict=True)], tools)
        except RowError:
            return None
        places: list[CharSpan] = []
        at = 0
        for turn, mark in zip(turns, marks, strict=True):
            if not mark:  # its frame is part of the next one
                continue
            frame, found, marked = marked.partition(mark)
            if not found or not text.startswith(frame, at):
                return None
            at += len(frame)
            following = marked.partition(MARK[0])[0]
            if turn.get("tool_calls"):
                end = text.find(following, at) if following else -1
            else:
                ends = (at + len(way) for way in _ways(_thought(turn)[1]) if text.startswith(way + following, at))
                end = next(ends, -1)
            if end < 0:
                return None
            if turn["role"] == "assistant":
                places.append(CharSpan(at, end))
            at = end
        return places if text.startswith(marked, at) else None


def _says(turn: Message) -> bool:
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def _stand_in(turn: Message, mark: str) -> Message:
    """`turn` with its thoughts, and the mark for all else that it says; the turn itself without a mark."""
    if not mark:
        return turn
    made: Message = {**turn, "content": _thought(turn)[0] + mark}
    made.pop("tool_calls", None)
    return made


def _thought(turn: Message) -> tuple[str, str]:
    """The thoughts that an answer begins with, through their closing tag, and what it says."""
    thought, tag, said = turn["content"].rpartition("</think>" if turn["role"] == "assistant" else "\0")
    return thought + tag, said


def _ways(content: str) -> list[str]:
    """How a template may write a message: as it is, or without the space or the newlines around it."""
    return [
        content,
        content.strip(),
        content.lstrip(),
        content.rstrip(),
        content.lstrip("\n"),
        content.strip("\n"),
    ]
