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
from .template_forms import TRUTH, parse_arguments, scalars
from .thoughts import find_thought, split_thought

SHORT = 12  # characters: a shorter text, or the values of one, may occur in the rendered one by chance
FLAG = re.compile(r"/(?:no_?)?think\b")  # a switch within a message, which a template acts on and removes
SHAPES = 4096  # of conversations, whose probes are kept
THOUGHTS, ANSWER, NAME = "thoughts", "an answer", "the name of a turn"
TOOLS, PARAMETERS = "tools", "parameters of tools"
DESCRIPTIONS, CHOICES = f"descriptions of {PARAMETERS}", f"allowed values of {PARAMETERS}"


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
    yield Piece(number, NAME, turn.get("name") or "")
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
        values = scalars(function.get("arguments"), names=True)
        yield from (Piece(number, f"arguments of {what}", text) for text in values)


def _of_tool(tool: Any) -> Iterator[Piece]:
    function = _function(tool)
    texts = (function.get("name"), function.get("description"))
    yield from (Piece(None, TOOLS, text) for text in texts if isinstance(text, str))
    yield from _of_schema(function.get("parameters"))


def _of_schema(schema: Any) -> Iterator[Piece]:
    """The parameters that a JSON schema describes, also those of nested objects and lists."""
    if not isinstance(schema, Mapping):
        return
    properties = schema.get("properties")
    for name, inner in properties.items() if isinstance(properties, Mapping) else ():
        yield Piece(None, PARAMETERS, str(name))
        if isinstance(inner, Mapping):
            yield Piece(None, DESCRIPTIONS, str(inner.get("description") or ""))
            yield from (Piece(None, CHOICES, text) for text in scalars(inner.get("enum")))
            yield from _of_schema(inner)
    yield from _of_schema(schema.get("items"))


def _function(tool: Any) -> Mapping[str, Any]:
    return (tool.get("function") or tool) if isinstance(tool, Mapping) else {}


def leaves_trace(said: str, text: str) -> bool:
    """Whether `text` contains what is said, in one of the forms in which templates write it."""
    said = said.strip()
    if said in text or (said in TRUTH and said in text.lower()):
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
        tools = [tool for tool in conversation.tools or () if not any(_is_whole(tool, text) for text in last)]
        for piece in pieces(conversation._replace(tools=tools)):
            turn = piece.turn
            if turn is not None and turn in own and turn in trained and piece.what != NAME:
                if not self._is_in(piece, [own[turn]], conversation):
                    answers.append(piece.what)
                continue
            after = [text for text, end in last.items() if turn is None or end + (piece.what == NAME) > turn]
            if after and piece.what != THOUGHTS and not self._is_in(piece, after, conversation):
                context.append(piece.what)
        return LeftOut(_kinds(answers), _kinds(context))

    def _is_in(self, piece: Piece, texts: Sequence[str], conversation: Conversation) -> bool:
        if not any(leaves_trace(piece.text, text) for text in texts):
            return False
        said, turn = piece.text.strip(), piece.turn
        if piece.what == NAME and turn is not None and conversation.messages[turn]["role"] == "tool":
            return True  # the call has the same name
        if piece.what in (THOUGHTS, ANSWER) or (len(said) >= SHORT and any(said in text for text in texts)):
            return True
        return (turn, piece.what) not in self._left_out_of(conversation, turn)

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
        probe = conversation._replace(
            messages=turns, tools=[_tool_of_words(words)] if conversation.tools else None
        )
        try:
            shown = [self._render(probe)]
            if turns[-1]["role"] == "assistant":  # a text may be composed of this prompt and the answer
                shown.append(self._render(probe.upto(len(turns) - 1), prompt=True))
        except RowError:
            return frozenset()
        text = "\0".join(shown)
        return frozenset((piece.turn, piece.what) for piece in pieces(probe) if piece.text not in text)


def _is_whole(tool: Any, text: str) -> bool:
    """Whether a text has all of a tool, as most templates write it."""
    return json.dumps(_function(tool), ensure_ascii=False, default=str) in text


def _kinds(found: Sequence[str]) -> tuple[str, ...]:
    """Each kind once. The arguments of calls that are left out go without saying."""
    return tuple(kind for kind in dict.fromkeys(found) if kind.partition(" of ")[2] not in found)


def _shape(turn: Message) -> tuple[Any, ...]:
    thought = bool(turn.get("reasoning_content") or find_thought(turn["content"]))
    has = (bool(turn["content"].strip()), bool(turn.get("name")), thought)
    return turn["role"], *has, len(turn.get("tool_calls") or ())


def _with_words(turn: Message, words: Iterator[str]) -> Message:
    """`turn` with a new word for each of its texts, and without thoughts."""
    made: Message = {**turn, "content": next(words) if split_thought(turn["content"])[1].strip() else ""}
    made.pop("reasoning_content", None)
    if turn.get("name") and turn["role"] != "tool":
        made["name"] = next(words)
    if turn.get("tool_calls"):
        made["tool_calls"] = [_call_of_words(call, words) for call in turn["tool_calls"]]
    return made


def _call_of_words(call: Any, words: Iterator[str]) -> dict[str, Any]:
    arguments = (call.get("function") or call).get("arguments")
    keys = parse_arguments(arguments, {}) if isinstance(arguments, str) else arguments
    values = {key: next(words) for key in keys} if isinstance(keys, Mapping) else {}
    return {**call, "function": {"name": next(words), "arguments": values}}


def _tool_of_words(words: Iterator[str]) -> dict[str, Any]:
    parameter, word = next(words), {"type": "string", "description": next(words), "enum": [next(words)]}
    schema = {"type": "object", "properties": {parameter: word}, "required": [parameter]}
    function = {"name": next(words), "description": next(words), "parameters": schema}
    return {"type": "function", "function": function}
