"""Tokenize a rendered conversation in segments: cut where answers begin and end, each tokenized separately.

So the tokens of an evaluation prompt are exactly the tokens that precede the same answer in training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from .answer_text import CharSpan

CONTEXT_CHARS = 64  # characters before a segment that are searched for its context


class RenderedChat(NamedTuple):
    """A conversation as text.

    answer_spans: spans of the answers with loss, in order and disjoint.
    answer_turns: indices of the messages of these answers.
    earlier_spans: spans of answers that are masked, because another text trains them. The text is cut at these
        too, as in a prompt.
    """

    text: str
    answer_spans: tuple[CharSpan, ...]
    answer_turns: tuple[int, ...]
    earlier_spans: tuple[CharSpan, ...] = ()

    def answers(self) -> dict[int, str]:
        """The text of each answer, by the index of its message."""
        spans = zip(self.answer_turns, self.answer_spans, strict=True)
        return {turn: self.text[span.start : span.end] for turn, span in spans}


class Segment(NamedTuple):
    """A part of a text that is tokenized separately: an answer, or the text between two answers.

    turn: index of the answer's message; None for text between answers.
    context: preceding text that the tokenizer must see. Its tokens are removed again.
    """

    text: str
    turn: int | None
    context: str


class SegmentTokenizer:
    """A tokenizer that tokenizes segments."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.special_tokens = tuple(sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True))
        self.special = re.compile("|".join(map(re.escape, self.special_tokens)) or r"(?!)")

    def segments(self, rendered: RenderedChat) -> list[Segment]:
        """The text, cut where answers begin and end, without empty segments."""
        turns: dict[CharSpan, int | None] = dict.fromkeys(rendered.earlier_spans)
        turns |= zip(rendered.answer_spans, rendered.answer_turns, strict=True)
        found: list[Segment] = []
        done = 0
        for span in sorted(turns):
            found += self._segment(rendered.text, done, span.start, None)
            found += self._segment(rendered.text, span.start, span.end, turns[span])
            done = span.end
        return found + self._segment(rendered.text, done, len(rendered.text), None)

    def _segment(self, text: str, start: int, end: int, turn: int | None) -> list[Segment]:
        return [Segment(text[start:end], turn, self._context(text, start))] if end > start else []

    def _context(self, text: str, start: int) -> str:
        """The special token before `start`, with the white space that it may strip; else a newline."""
        if not self._needs_context or text[:start] in (
            "",
            self.tokenizer.bos_token,
        ):  # a document begins after BOS
            return ""
        before = text[max(0, start - CONTEXT_CHARS) : start]
        *_, last = [None, *self.special.finditer(before)]
        return before[last.start() :] if last and not before[last.end() :].strip() else "\n"

    @cached_property
    def _needs_context(self) -> bool:
        """Whether the tokens of a segment depend on the text before it.

        A tokenizer may prepend something to a text, as SentencePiece does with a space, and a special token may
        strip the white space that follows it. Such a tokenizer gets the end of the preceding segment as context.
        """
        together, newline, letter = self._ids(["\na", "\n", "a"])
        return together != newline + letter or any(t.rstrip for t in self.tokenizer.added_tokens_decoder.values())

    def tokenize(self, segments: Sequence[Segment]) -> list[list[int]]:
        """The token ids of each segment. No special tokens are added."""
        contexts = sorted({p.context for p in segments})
        off = dict(zip(contexts, self._ids(contexts), strict=True))
        ids = self._ids([p.context + p.text for p in segments])
        spanning = [n for n, p in enumerate(segments) if ids[n][: len(off[p.context])] != off[p.context]]
        if spanning:  # a token spans context and segment: try another context, then none
            retried = [segments[n]._replace(context="" if segments[n].context == "\n" else "\n") for n in spanning]
            for number, found_ids in zip(spanning, self.tokenize(retried), strict=True):
                ids[number] = off[segments[number].context] + found_ids
        return [found[len(off[p.context]) :] for p, found in zip(segments, ids, strict=True)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        backend.no_truncation()  # state that an earlier call or the tokenizer's file may have set
        backend.no_padding()
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
