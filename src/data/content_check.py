"""What a chat template leaves out: everything that a conversation says must leave a trace in its rendered text.

Templates change texts: they strip white space, write a result as JSON, or split thoughts from an answer. So a text
counts as rendered if it occurs as it is, without white space, as JSON, Python or HTML write it, or value by value.
"""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, Protocol

from .conversation import TEXT, Conversation, Message, RowError
from .template_forms import END_THINK, parse_arguments, scalars, split_thought
from .template_probes import PROBE_TOOL

SHORT = 12  # characters: a shorter text, or the values of one, may occur in the rendered one by chance
FLAG = re.compile(r"/(?:no_?)?think\b")  # a switch within a message, which a template acts on and removes
SHAPES = 4096  # of conversations, whose probes are kept
THOUGHTS, ANSWER = "thoughts", "an answer"


class Piece(NamedTuple):
    """A text that a conversation says.

    turn: the index of its message; None for a tool. what: its kind, as reports name it.
    """

    turn: int | None
    what: str
    text: str


class DroppedContent(RowError):
    """Content of a trained answer that the template leaves out.

    kinds: the kinds of what is left out.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = tuple(kinds)
        super().__init__("dropped_by_template", f"has {', '.join(kinds)} that the chat template leaves out")


def pieces(conversation: Conversation) -> Iterator[Piece]:
    """Everything that a conversation says, in order, without empty texts."""
    found = [piece for number, turn in enumerate(conversation.messages) for piece in _of_turn(number, turn)]
    found += [piece for tool in conversation.tools or () for piece in _of_tool(tool)]
    return (piece for piece in found if piece.text.strip())


def _of_turn(number: int, turn: Message) -> Iterator[Piece]:
    role, content = turn["role"], turn["content"]
    if role != "assistant":
        yield Piece(number, {"tool": "a tool result", "user": "a request"}.get(role, f"a {role} turn"), content)
        return
    calls = turn.get("tool_calls") or []
    thought, said = split_thought(content)
    yield Piece(number, THOUGHTS, turn.get("reasoning_content") or "")
    yield Piece(number, THOUGHTS, thought)
    yield Piece(number, "text beside a call" if calls else ANSWER, said)
    for order, call in enumerate(calls):
        function = call.get("function") or call
        what = "tool calls" if order == 0 else "parallel tool calls"
        yield Piece(number, what, str(function.get("name") or ""))
        yield from (Piece(number, f"arguments of {what}", text) for text in scalars(function.get("arguments")))


def _of_tool(tool: Any) -> Iterator[Piece]:
    function = (tool.get("function") or tool) if isinstance(tool, Mapping) else {}
    for key in ("name", "description"):
        if isinstance(function.get(key), str):
            yield Piece(None, "tools", function[key])


def leaves_trace(said: str, text: str) -> bool:
    """Whether `text` contains what is said, in one of the forms in which templates write it."""
    said = said.strip()
    if said in text:
        return True
    said, bare = FLAG.sub("", said), "".join(text.split())
    as_json = (json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1])
    forms = (said, *as_json, repr(said)[1:-1], html.escape(said))
    if any("".join(form.split()) in bare for form in forms):
        return True
    values = list(scalars(said))
    return values != [said] and bool(values) and all(leaves_trace(value, text) for value in values)


class Rendered(Protocol):
    """A rendered text (chat.RenderedChat)."""

    @property
    def text(self) -> str: ...
    @property
    def answer_turns(self) -> tuple[int, ...]: ...
    def answers(self) -> dict[int, str]: ...


class LeftOut(NamedTuple):
    """The kinds of content that a template leaves out, each once: of trained answers, and of everything else."""

    answers: tuple[str, ...] = ()
    context: tuple[str, ...] = ()


class ContentCheck:
    """Compares conversations with their rendered texts, for one chat template.

    Args:
        render: as ChatTokenizer.render.
    """

    def __init__(self, render: Callable[..., str]) -> None:
        self._render = render
        self._left_out: dict[object, frozenset[tuple[int | None, str]]] = {}

    def dropped(
        self, conversation: Conversation, texts: Sequence[Rendered], trained: AbstractSet[int | None]
    ) -> LeftOut:
        """What leaves no trace. An answer must be in its own text, the rest in the text of an answer that follows.

        Args:
            texts: the texts to train on.
            trained: the indices of the messages with loss.
        """
        turns = conversation.messages
        if turns[0]["role"] == TEXT:
            return LeftOut()
        own = {turn: answer for text in texts for turn, answer in text.answers().items()}
        last = {text.text: text.answer_turns[-1] for text in texts}
        answers, context = [], []
        for piece in pieces(conversation):
            turn = piece.turn
            if turn is not None and turn in own and turn in trained:
                if not self._is_in(piece, [own[turn]], conversation):
                    answers.append(piece.what)
                continue
            after = [text for text, end in last.items() if turn is None or end > turn]
            thoughts = turns[turn]["role"] == "assistant" and piece.what == THOUGHTS if turn is not None else False
            if after and not thoughts and not self._is_in(piece, after, conversation):
                context.append(piece.what)
        return LeftOut(_kinds(answers), _kinds(context))

    def _is_in(self, piece: Piece, texts: Sequence[str], conversation: Conversation) -> bool:
        if not any(leaves_trace(piece.text, text) for text in texts):
            return False
        said = piece.text.strip()
        if piece.what in (THOUGHTS, ANSWER) or (len(said) >= SHORT and any(said in text for text in texts)):
            return True
        return (piece.turn, piece.what) not in self._left_out_of(conversation, piece.turn)

    def _left_out_of(self, conversation: Conversation, turn: int | None) -> frozenset[tuple[int | None, str]]:
        """What the template leaves out of any conversation of this shape, rendered with words for its texts."""
        if turn is not None and conversation.messages[turn]["role"] == "assistant":
            conversation = conversation.upto(turn + 1)
        key = tuple(map(_shape, conversation.messages)), bool(conversation.tools)
        if key not in self._left_out:
            if len(self._left_out) >= SHAPES:
                self._left_out.clear()
            self._left_out[key] = self._probe(conversation)
        return self._left_out[key]

    def _probe(self, conversation: Conversation) -> frozenset[tuple[int | None, str]]:
        words = (f"assayword{number}x" for number in itertools.count())
        turns = [_with_words(turn, words) for turn in conversation.messages]
        probe = conversation._replace(messages=turns, tools=[PROBE_TOOL] if conversation.tools else None)
        try:
            shown = [self._render(probe)]
            if turns[-1]["role"] == "assistant":  # a text may be composed of this prompt and the answer
                shown.append(self._render(probe.upto(len(turns) - 1), prompt=True))
        except RowError:
            return frozenset()
        text = "\0".join(shown)
        return frozenset((piece.turn, piece.what) for piece in pieces(probe) if piece.text not in text)


def _kinds(found: Sequence[str]) -> tuple[str, ...]:
    """Each kind once. The arguments of calls that are left out go without saying."""
    return tuple(
        kind
        for kind in dict.fromkeys(found)
        if kind.removeprefix("arguments of ") == kind or kind.removeprefix("arguments of ") not in found
    )


def _shape(turn: Message) -> tuple[str, bool, bool, int]:
    thought = bool(turn.get("reasoning_content")) or END_THINK in turn["content"]
    return turn["role"], bool(turn["content"].strip()), thought, len(turn.get("tool_calls") or ())


def _with_words(turn: Message, words: Iterator[str]) -> Message:
    """`turn` with a new word for each of its texts, and without thoughts."""
    made: Message = {**turn, "content": next(words) if split_thought(turn["content"])[1].strip() else ""}
    made.pop("reasoning_content", None)
    if turn.get("tool_calls"):
        made["tool_calls"] = [_call_of_words(call, words) for call in turn["tool_calls"]]
    return made


def _call_of_words(call: Any, words: Iterator[str]) -> dict[str, Any]:
    arguments = (call.get("function") or call).get("arguments")
    keys = parse_arguments(arguments, {}) if isinstance(arguments, str) else arguments
    values = {key: next(words) for key in keys} if isinstance(keys, Mapping) else {}
    return {**call, "function": {"name": next(words), "arguments": values}}
