"""What a chat template writes around an answer: where the turn ends, and how the next one begins.

It is found by rendering a probe conversation, with private-use characters for what the messages say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from .conversation import Conversation, Message, RowError
from .template_forms import TRUTH, scalars
from .template_probes import PROBE_TOOL
from .thoughts import EMPTY_THOUGHT, OPEN_THOUGHT, find_thought, split_thought

ANSWER, REQUEST = "\ue000", "\ue001"  # characters that templates neither contain nor strip
TAG = r"<[|\uff5c][^<>\s]{1,40}?[|\uff5c]>"  # a marker, whether the tokenizer has a token for it or not
CLOSING_TAG = re.compile(r"</|\[/")  # ends a part of an answer, such as a call, not the turn


class TurnMarkup:
    """The text around the answers of one chat template.

    Args:
        render: as ChatTokenizer.render.
        source: the template.
        tokens: the tokenizer's added tokens.
        eos: its end-of-sequence token.
        tools: what the template needs to render any conversation.
    """

    def __init__(
        self,
        render: Callable[..., str],
        source: str,
        tokens: Sequence[str],
        eos: str | None,
        tools: Sequence[Any] | None,
    ) -> None:
        self._render, self._source, self._eos, self._tools = render, source, eos, tools
        known = sorted(filter(None, tokens), key=len, reverse=True)
        self.marker = re.compile("|".join([*map(re.escape, known), TAG]))

    @cached_property
    def words(self) -> frozenset[str]:
        """The words in the template's source, among them all that it writes itself."""
        return frozenset(re.findall(r"\w+", self._source))

    @cached_property
    def _probe(self) -> tuple[str, str, str, str]:
        """The text before a request, from there to its answer, to the next request, and after a last answer.

        Raises: RowError if the template does not render a request and an answer.
        """
        turns: list[Message] = [{"role": "user", "content": REQUEST}, {"role": "assistant", "content": ANSWER}]
        head, _, rest = self._render(Conversation(turns, self._tools)).rpartition(REQUEST)
        header, _, last = rest.rpartition(ANSWER)
        try:
            again = self._render(Conversation([*turns, turns[0]], self._tools))
        except RowError:  # the template allows one answer only
            return head, header, "", last
        return head, header, again.partition(ANSWER)[2].partition(REQUEST)[0], last

    @cached_property
    def header(self) -> str:
        """The generation prompt: what the template appends so that an answer begins."""
        request = Conversation([{"role": "user", "content": REQUEST}], self._tools)
        bare, prompt = self._render(request), self._render(request, prompt=True)
        return prompt.removeprefix(bare) if prompt.startswith(bare) else ""

    @cached_property
    def writes_empty_thoughts(self) -> bool:
        """Whether the template writes, or its prompt opens, a think block for an answer without thoughts."""
        before_answer = self._probe[1]
        return bool(EMPTY_THOUGHT.search(before_answer) or OPEN_THOUGHT.search(self.header))

    @cached_property
    def openers(self) -> frozenset[str]:
        """The markers with which a turn begins."""
        head, before_answer, before_request, last = self._probe
        first, *others = self.marker.findall(before_answer) or [""]
        if not before_answer.lstrip().startswith(first):  # the request has no end of its own
            others = [first, *others]
        header = self.marker.findall(self.header)
        begins = (header or others)[:1]
        nearest = self.marker.findall(head)[-1:]
        found = {*header, *nearest, *(set(others) & set(self.marker.findall(before_request)))}
        ends = self.marker.findall(shared(last, before_request))  # even if other turns have them too
        appended = self.marker.findall(last)[len(ends) :]
        if appended and appended[0] in others and ends[-1:] != [first]:
            ends = ends[:-1]  # the template begins an answer after each conversation: this marker opens any turn
        return frozenset({*begins, *(found - {*ends})} - {self._eos})

    def end_of(self, tail: str, *, plain: bool = False) -> str:
        """The part of `tail`, the text after an answer, that ends the turn; empty if there is none.

        It reaches through the end-of-sequence token, or the last marker before one that opens a turn.

        Args:
            plain: whether the answer has no calls, which closing tags may end.
        """
        end = 0
        for found in self.marker.finditer(tail):
            if found[0] in self.openers:
                break
            if plain or self._may_end(found[0]):
                end = found.end()
            if found[0] == self._eos:
                break
        return tail[:end]

    def _may_end(self, marker: str) -> bool:
        return marker == self._eos or not CLOSING_TAG.match(marker) or self.end_of_turn.endswith(marker)

    @cached_property
    def end_of_turn(self) -> str:
        """What ends an answer, from its last character on.

        Markers, as the last answer has them or else an earlier one; without markers the text that both have in
        common; without any the tokenizer's end-of-sequence token. Empty if it has none.
        """
        _, _, within, last = self._probe
        found, earlier = self.end_of(last, plain=True), self.end_of(within, plain=True)
        if earlier and found.startswith(earlier):  # what follows ends the conversation
            return earlier
        return found or earlier or shared(last, within).rstrip() or self._eos or ""

    @cached_property
    def end_of_call(self) -> str:
        """The marker that ends an answer with calls; empty if the template has none, or each call ends with it."""
        try:
            one, two = (self._with_calls(number) for number in (1, 2))
        except RowError:  # the template knows no calls
            return ""
        *_, last = [None, *self.marker.finditer(one)]
        if last is None or last.end() != len(one) or ANSWER not in one:
            return ""
        return last[0] if two.count(last[0]) == one.count(last[0]) else ""

    def _with_calls(self, number: int) -> str:
        """A conversation that ends with so many calls. Raises: RowError if the template rejects one call."""
        try:
            return self.split(self._render_calls(number), ["", *[REQUEST, ANSWER] * number])[0]
        except RowError:
            if number == 1:
                raise
            return self._with_calls(1)  # the template takes one call at a time

    def _render_calls(self, number: int) -> str:
        function = {"name": REQUEST, "arguments": {"x": ANSWER}}
        calls = [{"id": f"call1234{i}", "type": "function", "function": function} for i in range(number)]
        turns: list[Message] = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        return self._render(Conversation(turns, [PROBE_TOOL]))

    @cached_property
    def _after_calls(self) -> str | None:
        """What the template writes after the end of an answer with calls; None if it knows none."""
        try:
            text = self._render_calls(1)
            end = self._find_end(text, ["", REQUEST, ANSWER])
        except RowError:
            return None
        return text[end:] if ANSWER in text else None

    @cached_property
    def closing(self) -> str:
        """What the template writes after the end of the last turn."""
        last = self._probe[3]
        return last.removeprefix(self.end_of_turn)

    def split(self, text: str, pieces: Sequence[str]) -> tuple[str, str]:
        """A conversation that ends with an answer, in two parts: through the end of the answer, and the rest.

        Where the template does not write the end of the turn, it is appended to the answer.

        Args:
            pieces: what the answer says: its content, and the names and values of its calls.
        Raises: RowError if the end is not found.
        """
        calls = len(pieces) > 1
        if calls and self._after_calls is not None and text.endswith(self._after_calls):
            end = len(text) - len(self._after_calls)  # whatever the values of the call are
        else:
            end = self._find_end(text, pieces)
        done = text[:end]
        return (done, text[end:]) if self.ends_turn(done) else (done + self.end_of_turn, "")

    def _find_end(self, text: str, pieces: Sequence[str]) -> int:
        ends = self._end_by_closing(text), self._end_by_pieces(text, pieces)
        end = min((end for end in ends if end), default=None)
        if end is None:
            raise RowError("template", f"is rendered without a recognisable end of its answer: {text[-60:]!r}")
        return end if len(pieces) == 1 else self._end_of_calls(text, end, *pieces[:2])

    def _end_of_calls(self, text: str, end: int, text_beside: str, name: str) -> int:
        """`end`, or the end before it if the template writes an empty turn after a call: `END<assistant>END`.

        Raises: RowError if that turn says the text beside the call.
        """
        *_, last = [None, *self.marker.finditer(text, 0, end)]
        if last is None or last.end() != end:
            return end
        calls, _, after = text[: last.start()].rpartition(last[0])
        opened = any(opener in after for opener in self.openers)
        if not opened or name not in calls.rpartition(last[0])[2]:
            return end
        written, header = (self.marker.sub("", each).strip() for each in (after, self.header))
        said = written.removeprefix(header).strip()
        if said and said == text_beside:
            raise RowError("template", "has text beside a call, which the chat template writes as another answer")
        return end if said else len(calls) + len(last[0])

    def _end_by_closing(self, text: str) -> int | None:
        closing = self.closing.strip()
        body = text.rstrip()
        if not body.endswith(closing):
            return None
        end = len(body) - len(closing) if closing else len(text.removesuffix(self.closing))
        stripped = len(text[:end].rstrip())
        if any(text.endswith(opener, 0, stripped) for opener in self.openers):
            return None
        return stripped if self.ends_turn(text[:stripped]) else end

    def _end_by_pieces(self, text: str, pieces: Sequence[str]) -> int | None:
        """The end of the turn after what the answer says; None if the template has changed it or writes no end."""
        said = [piece for piece in pieces if piece]
        places = [text.rfind(piece) for piece in said]
        if not said or min(places) < 0:
            return None
        last = max(at + len(piece) for at, piece in zip(places, said, strict=True))
        end = self.end_of(text[last:])
        return last + len(end) if end else None

    def thought_of(self, turn: Message) -> str | None:
        """The thoughts of an answer, without their tags; None if it has none. They may be empty, between tags."""
        found = find_thought(turn["content"], self._source)
        return turn.get("reasoning_content") or (found.text if found else None)

    def pieces_of(self, turn: Message) -> Iterator[str]:
        """The texts that an answer says: its content without thoughts, the names and long values of its calls."""
        yield split_thought(turn["content"], self._source)[1].strip()
        for call in turn.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            yield str(function.get("name") or "")
            yield from (value for value in scalars(function.get("arguments")) if not _is_short(value))

    def ends_turn(self, text: str) -> bool:
        """Whether `text` ends with a marker of the template that ends a turn."""
        *_, last = [None, *self.marker.finditer(text, max(0, len(text) - 64))]
        if last and last.end() == len(text):
            return last[0] == self._eos or (last[0] in self._source and self._may_end(last[0]))
        return bool(self.end_of_turn) and text.endswith(self.end_of_turn.strip())


def _is_short(value: str) -> bool:
    return len(value) < 2 or value in TRUTH


def shared(a: str, b: str) -> str:
    """The common beginning of two texts."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[: next(differ, min(len(a), len(b)))]
