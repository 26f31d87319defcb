"""One tokenisation path for training and evaluation: where answers stand in a rendered conversation, and tokens.

A conversation is rendered as text, cut where an answer begins and where it ends, and each piece is tokenised
by itself. So the tokens of an evaluation prompt are, token by token, what the model saw before that answer
in training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

from src.data.formats import TEMPLATE_KEYS, TEXT, Message, RowError

Tools = Sequence[Any] | None
IDENTITY_FILE = "tokenization.json"  # file beside an adapter that holds Chat.identity
CONTEXT_CHARS = 64  # characters before a piece in which its lead is looked for
PLACEHOLDER = "\ue000"  # a character of private use: in no template, trimmed by none


class CharSpan(NamedTuple):
    """Characters `start:end` of a text."""

    start: int
    end: int


class RenderedChat(NamedTuple):
    """A conversation as text.

    answers: the places of the turns `taught`, in order and apart.
    earlier: places of answers that another text teaches; the text is cut there too, as it is in a prompt.
    """

    text: str
    answer_spans: tuple[CharSpan, ...]
    answer_turns: tuple[int, ...]
    earlier_spans: tuple[CharSpan, ...] = ()


class AnswerRendering(NamedTuple):
    """The answer `turn` as the last of its conversation: `text` is all of it, and holds the answer at `span`.

    span: None where `text` does not begin as the prompt for the answer does.
    """

    turn: int
    text: str
    span: CharSpan | None

    def locate_in(self, text: str) -> CharSpan | None:
        """Where the answer stands in `text`; None where `text` goes on from it in another way."""
        return self.span if self.span and text.startswith(self.text[: self.span.end]) else None


class Segment(NamedTuple):
    """A stretch of text that is tokenised by itself: an answer, or what stands between two.

    `turn` is the position of the answer's message, else None; `lead` is text before the piece that the
    tokenizer must see.
    """

    text: str
    turn: int | None
    context: str


class ChatTokenizer:
    """A tokenizer with its chat template, as the data room uses it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.special_tokens = tuple(sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True))
        self.special = re.compile("|".join(map(re.escape, self.special_tokens)) or r"(?!)")

    # text

    def render(self, turns: Sequence[Message], tools: Tools = None, *, prompt: bool = False) -> str:
        """The text of a conversation; with `prompt`, up to where the next answer begins.

        Raises: RowError if the chat template refuses the turns.
        """
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(turns), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=prompt
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            said = str(error) or type(error).__name__
            raise RowError("template", f"is refused by the chat template: {said}") from error

    def training_texts(self, turns: Sequence[Message], tools: Tools = None) -> list[RenderedChat]:
        """The conversation, which ends with an answer, as text in which each answer is taught once.

        It is one text where the template writes the beginning of a conversation as it writes the whole. A
        template that writes earlier answers another way (one that drops their thoughts, say) gives one text
        an answer, as the model will meet it.
        Raises: RowError if the template refuses the turns, hides where answers begin, or leaves out tool calls.
        """
        if turns[0]["role"] == TEXT:
            return [self._document(turns[0]["content"])]
        answers = self._answers(turns, tools)
        self._check_calls(turns, tools, answers[-1].text)
        places = [a.locate_in(answers[-1].text) for a in answers]
        if all(places):
            return [RenderedChat(answers[-1].text, tuple(filter(None, places)), tuple(a.turn for a in answers))]
        found = []
        for number, answer in enumerate(answers):
            if answer.span is None:
                raise RowError("template", "is written by the chat template so that it hides where answers begin")
            earlier = tuple(filter(None, (a.locate_in(answer.text) for a in answers[:number])))
            found.append(RenderedChat(answer.text, (answer.span,), (answer.turn,), earlier))
        return found

    def _document(self, text: str) -> RenderedChat:
        """A plain text with the marks that the tokenizer puts around one; all of it is learnt but the first."""
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        begins = bos if bos and self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id] else ""
        text = ("" if text.startswith(begins) else begins) + text + ("" if text.endswith(eos) else eos)
        return RenderedChat(text, (CharSpan(len(begins), len(text)),), (0,))

    def _answers(self, turns: Sequence[Message], tools: Tools) -> list[AnswerRendering]:
        found = []
        for i in (i for i, turn in enumerate(turns) if turn["role"] == "assistant"):
            closing = self._after_answer[1]
            before = self.render(turns[:i], tools, prompt=True)
            text = self.render(turns[: i + 1], tools)
            end = len(text.removesuffix(closing))
            span = CharSpan(len(before), end) if text.startswith(before) and len(before) < end else None
            found.append(AnswerRendering(i, text, span))
        return found

    @property
    def end_of_turn(self) -> str:
        """What the template writes between an answer's last character and the end of its end-of-turn token."""
        return self._after_answer[0]

    @cached_property
    def _after_answer(self) -> tuple[str, str]:
        """What the template writes after the last answer: its end of turn, and what it closes a conversation with.

        An end-of-turn token is written after every answer, the last or not. Where these share no special token,
        the first one after the last answer is taken, and with none at all, whatever they share but space.
        """
        turns: list[Message] = [{"role": "user", "content": "."}, {"role": "assistant", "content": PLACEHOLDER}]
        last = self.render(turns).rpartition(PLACEHOLDER)[2]
        try:
            within = self.render([*turns, turns[0]]).partition(PLACEHOLDER)[2]
        except RowError:  # it allows one answer only
            within = ""
        differ = (i for i, (a, b) in enumerate(zip(last, within, strict=False)) if a != b)
        shared = next(differ, min(len(last), len(within)))
        specials = [m.end() for m in self.special.finditer(last)]
        ends = [end for end in specials if end <= shared] or specials[:1] or [len(last[:shared].rstrip())]
        return last[: ends[-1]], last[ends[-1] :]

    def _check_calls(self, turns: Sequence[Message], tools: Tools, text: str) -> None:
        """Raises: RowError if the template writes nothing of the tool calls, and so an answer without them."""
        if not any(turn.get("tool_calls") for turn in turns):
            return
        bare: list[Message] = [{**turn} for turn in turns]
        for turn in bare:
            turn.pop("tool_calls", None)
        try:
            left_out = self.render(bare, tools) == text
        except RowError:  # it knows them, and refuses the turns without them
            return
        if left_out:
            raise RowError("template", "has tool calls, which the chat template leaves out")

    def has_end_of_turn(self, rendered: RenderedChat) -> bool:
        """Whether every answer ends with a special token, by which a model knows when to stop."""
        return all(rendered.text.endswith(self.special_tokens, s.start, s.end) for s in rendered.answer_spans)

    def find_control_token(self, turns: Sequence[Message]) -> str | None:
        """A token by which this template steers the model, and which a message holds as text.

        It would be read as the token itself, and end a turn or begin another where nobody did. A special
        token that the template does not use, such as the <filename> of a code model, does no such harm.
        """
        said = [_words(turn) for turn in turns if turn["role"] != TEXT]
        return next((token for token in self._control for text in said if token in text), None)

    @cached_property
    def _control(self) -> list[str]:
        turns: list[Message] = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
        shown = self.render(turns) + self.render(turns[:1], prompt=True) + str(self.tokenizer.chat_template)
        with suppress(RowError):  # it may know no system turn
            shown += self.render([{"role": "system", "content": "."}, *turns])
        used = {*self.special.findall(shown), *filter(None, (self.tokenizer.bos_token, self.tokenizer.eos_token))}
        return sorted(used, key=len, reverse=True)

    # tokens

    def segments(self, rendered: RenderedChat) -> list[Segment]:
        """The text cut where answers begin and end; empty pieces are left out."""
        turns: dict[CharSpan, int | None] = dict.fromkeys(rendered.earlier_spans)
        turns |= zip(rendered.answer_spans, rendered.answer_turns, strict=True)
        found: list[Segment] = []
        done = 0
        for span in sorted(turns):
            found += self._piece(rendered.text, done, span.start, None)
            found += self._piece(rendered.text, span.start, span.end, turns[span])
            done = span.end
        return found + self._piece(rendered.text, done, len(rendered.text), None)

    def _piece(self, text: str, start: int, end: int, turn: int | None) -> list[Segment]:
        return [Segment(text[start:end], turn, self._context(text, start))] if end > start else []

    def _context(self, text: str, start: int) -> str:
        """The special token that ends `text[:start]`, with the space that it may swallow, or else a newline."""
        if not self._leading or text[:start] in ("", self.tokenizer.bos_token):  # a document begins after its mark
            return ""
        before = text[max(0, start - CONTEXT_CHARS) : start]
        *_, last = [None, *self.special.finditer(before)]
        return before[last.start() :] if last and not before[last.end() :].strip() else "\n"

    @cached_property
    def _leading(self) -> bool:
        """Whether a piece's tokens depend on what stands before it.

        A tokenizer may put something before a text, as SentencePiece does with a space, and a special token may
        swallow the space that follows it. Such a tokenizer is shown the end of the piece before, and its tokens
        are taken off again.
        """
        together, newline, letter = self._ids(["\na", "\n", "a"])
        return together != newline + letter or any(t.rstrip for t in self.tokenizer.added_tokens_decoder.values())

    def tokenize(self, pieces: Sequence[Segment]) -> list[list[int]]:
        """Token ids of each piece; no special token is added to what the text says."""
        leads = sorted({p.context for p in pieces})
        off = dict(zip(leads, self._ids(leads), strict=True))
        ids = self._ids([p.context + p.text for p in pieces])
        joined = [n for n, p in enumerate(pieces) if ids[n][: len(off[p.context])] != off[p.context]]
        if joined:  # a token reaches from the lead into the piece: another lead, or at last none
            other = [pieces[n]._replace(context="" if pieces[n].context == "\n" else "\n") for n in joined]
            for number, own in zip(joined, self.tokenize(other), strict=True):
                ids[number] = off[pieces[number].context] + own
        return [found[len(off[p.context]) :] for p, found in zip(pieces, ids, strict=True)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        backend.no_truncation()  # both are a state, which any call or the tokenizer's file may have left
        backend.no_padding()
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def prompt_ids(self, turns: Sequence[Message], tools: Tools = None) -> list[int]:
        """Token ids of a conversation up to the point where the next answer begins.

        Raises: RowError if the chat template refuses it.
        """
        text = self.render(turns, tools, prompt=True)
        earlier = tuple(filter(None, (a.locate_in(text) for a in self._answers(turns, tools))))
        ids = self.tokenize(self.segments(RenderedChat(text, (), (), earlier)))
        return [token for piece in ids for token in piece]

    # identity

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a model was tuned with, and is to be used with."""
        return {"chat_template_sha256": self.template_hash, "tokenizer_sha256": self.tokenizer_hash}

    @property
    def template_date(self) -> str | None:
        """Today, where the template writes the date: what it renders then holds for a day."""
        dated = "strftime_now" in str(self.tokenizer.chat_template)
        return date.today().isoformat() if dated else None

    @property
    def template_hash(self) -> str:
        """sha256 of the chat template."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    @property
    def tokenizer_hash(self) -> str:
        """sha256 of what decides how text becomes ids: vocabulary, rules, added and special tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend else {"vocabulary": self.tokenizer.get_vocab()}
        rules |= {"padding": None, "truncation": None}  # a state, which any call may leave behind
        rules["special"] = self.tokenizer.special_tokens_map
        return hashlib.sha256(json.dumps(rules, sort_keys=True, default=str).encode()).hexdigest()


def _words(turn: Message) -> str:
    """All that a turn brings into a text."""
    carried = {key: turn.get(key) for key in TEMPLATE_KEYS if key in turn}
    return turn["content"] + (json.dumps(carried, ensure_ascii=False, default=str) if carried else "")
