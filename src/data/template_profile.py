"""What a chat template wants: each row is passed to it in the form that it reads, found by rendering short probes.

Templates differ in the form of a call's arguments (object or JSON text), in the ids that calls must have, in the
key of thoughts, in roles, and in whether content is text or a list of parts. For each question there is a short
list of forms (template_forms.py). The first one that the template renders without loss is used.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from .conversation import Conversation, Message, RowError
from .template_forms import (
    IDS,
    INLINE,
    THOUGHT_FORMS,
    TOOL_ROLES,
    Adapted,
    CallForm,
    Turn,
    arguments_as,
)
from .template_probes import (
    ANSWERED,
    ASKED,
    KEY,
    LISTED,
    NAME,
    OPENAI_ID,
    PROBE_TOOL,
    RESULT,
    THOUGHT,
    TOLD,
    VALUE,
    answer_turn,
    calling_turn,
    reads_once,
    result_turn,
    shows,
    user_turn,
)  # fmt: skip
from .thoughts import END_THINK, split_thought

Render = Callable[[Conversation], str]  # raises RowError where the template rejects the conversation
PLAIN_KEYS = {"role", "content", "weight"}
PLAIN_ROLES = {"system", "user", "assistant"}


class TemplateProfile:
    """What one chat template wants. Each question is answered by probes when a row first asks it.

    Args:
        render: renders a conversation by the template, as is.
        source: the text of the template.
        template_kwargs: the variables with which it is rendered.
    """

    def __init__(self, render: Render, source: str, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self._render, self._source = render, source
        self.template_kwargs = dict(template_kwargs or {}) or None

    # Adapting

    def adapt(self, conversation: Conversation) -> Adapted:
        """The conversation as the template reads it. A plain conversation is returned as it is.

        Raises: RowError if the arguments of a call are not the object that the template needs.
        """
        if not self.parts and not conversation.tools and all(map(self._is_plain, conversation.messages)):
            return Adapted(conversation, {})
        turns: list[Turn] = [dict(turn) for turn in conversation.messages]
        restored: dict[str, str] = {}
        if any(turn["role"] == "developer" for turn in turns):
            turns = self._with_known_roles(turns)
        *earlier, last = turns
        last = self._with_thoughts(last, after_result=bool(earlier) and earlier[-1]["role"] == "tool")
        turns = [*(self._with_thoughts(turn, earlier=True) for turn in earlier), last]
        if any(turn.get("tool_calls") or turn["role"] == "tool" for turn in turns):
            turns = self._with_calls(turns, restored)
        turns = [self._with_parts(turn) for turn in turns]
        tools = [self._tool(tool) for tool in conversation.tools or ()]
        return Adapted(Conversation(turns, tools or None, conversation.template_kwargs), restored)  # type: ignore[arg-type]

    def changes(self, conversation: Conversation) -> list[str]:
        """What `adapt` changes of a conversation that a reader of its text may wonder about."""
        turns = conversation.messages
        if all(turn.keys() <= PLAIN_KEYS and turn["role"] in PLAIN_ROLES for turn in turns):
            return []
        thoughts = [bool(turn.get("tool_calls")) for turn in turns if turn.get("reasoning_content")]
        found = {
            "a developer turn as a system turn": not self.has_developer_role
            and any(turn["role"] == "developer" for turn in turns),
            "thoughts as <think> within the answer": any(self.thought_form(c) == INLINE for c in thoughts),
            "ids of calls as the chat template demands them": any(turn.get("tool_calls") for turn in turns)
            and self.calls.ids != "any",
        }
        return [what for what, changed in found.items() if changed]

    def _is_plain(self, turn: Message) -> bool:
        return (
            turn.keys() <= PLAIN_KEYS
            and turn["role"] in PLAIN_ROLES
            and (turn["role"] != "assistant" or END_THINK not in turn["content"])
        )

    def _with_known_roles(self, turns: list[Turn]) -> list[Turn]:
        """A developer turn becomes a system turn where the template lacks the role; two at the beginning, one."""
        if not self.has_developer_role:
            turns = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]
        first = list(itertools.takewhile(lambda turn: turn["role"] in ("system", "developer"), turns))
        if len(first) < 2:
            return turns
        return [{**first[0], "content": "\n\n".join(t["content"] for t in first)}, *turns[len(first) :]]

    def _with_thoughts(self, turn: Turn, *, earlier: bool = False, after_result: bool = False) -> Turn:
        """The thoughts of an answer in the form that the template reads; as they are if it reads none.

        A template without a key for thoughts does not see those of an earlier answer at inference. One that cuts
        them off at the end tag may keep them in an answer after a result.
        """
        if turn["role"] != "assistant":
            return turn
        thought = turn.get("reasoning_content")
        calls = bool(turn.get("tool_calls"))
        if not thought and END_THINK in turn["content"] and not self.keeps_inline(calls):
            thought, content = split_thought(turn["content"], self._source)
            turn = {**turn, "content": content} if thought else turn
        form = self.thought_form(calls) if thought else None
        if thought and form is None and after_result and END_THINK in self._source and self.keeps_inline(calls):
            form = INLINE
        if not thought or form is None:
            return turn
        bare = {key: value for key, value in turn.items() if key != "reasoning_content"}
        return bare if earlier and form == INLINE else THOUGHT_FORMS[form](bare, thought)

    def _with_calls(self, turns: list[Turn], restored: dict[str, str]) -> list[Turn]:
        form = self.calls
        renamed: dict[str, str] = {}
        pending: list[tuple[str, str]] = []  # id and name of the calls without a result
        numbers = itertools.count()
        found = []
        for turn in turns:
            if turn.get("tool_calls"):
                pending = []
                turn = {
                    **turn,
                    "tool_calls": [self._call(c, next(numbers), renamed, restored) for c in turn["tool_calls"]],
                }
                pending = [(c.get("id", ""), c["function"]["name"]) for c in turn["tool_calls"]]
            elif turn["role"] == "tool":
                turn = self._result(turn, renamed, pending)
            found.append(turn)
        return found if form.tool_role == "tool" else [_with_role(turn, form.tool_role) for turn in found]

    def _call(self, call: Any, number: int, renamed: dict[str, str], restored: dict[str, str]) -> Any:
        form, function = self.calls, {**call["function"]}
        own, name = call.get("id") or "", function["name"]
        ids = IDS[form.ids]
        made = {**call, "type": call.get("type") or "function"}
        if form.needs_ids and not ids.fits(own, name):
            made["id"] = ids.make(own, name, number)
            renamed[own] = made["id"]
        if form.arguments != "as is":
            function["arguments"] = arguments_as(function, form.arguments, restored)
        made["function"] = function
        return {**made, **function, "parameters": function.get("arguments")} if form.flat else made

    def _result(self, turn: Turn, renamed: Mapping[str, str], pending: list[tuple[str, str]]) -> Turn:
        """A result with the id, and if needed the name, of its call: the one that it names, else the next one."""
        own = renamed.get(turn.get("tool_call_id") or "", turn.get("tool_call_id") or "")
        call = next((each for each in pending if each[0] == own), pending[0] if pending else ("", ""))
        if call in pending:
            pending.remove(call)
        if self.calls.needs_ids and call[0]:
            turn = {**turn, "tool_call_id": call[0]}
        if self.calls.names and not turn.get("name") and call[1]:
            turn = {**turn, "name": call[1]}
        return turn

    def _with_parts(self, turn: Turn) -> Turn:
        if turn["role"] not in self.parts or not isinstance(turn["content"], str):
            return turn
        return {**turn, "content": [{"type": "text", "text": turn["content"]}]}

    def _tool(self, tool: Any) -> Any:
        """A tool as the OpenAI API writes it, or its function alone if the template reads that."""
        if not isinstance(tool, Mapping):
            return tool
        function = tool.get("function")
        if function is None and "name" in tool:
            function = {key: value for key, value in tool.items() if key != "type"}
            tool = {"type": "function", "function": function}
        return function if self.bare_tools and function else tool

    # Probing

    def try_render(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> str | None:
        """The text of a probe; None if the template rejects it."""
        with suppress(RowError):
            return self._render(Conversation(turns, tools, self.template_kwargs))  # type: ignore[arg-type]
        return None

    @cached_property
    def tools_for_probes(self) -> list[Any] | None:
        """A tool, if the template renders no conversation without one; else None."""
        turns = [user_turn(), answer_turn()]
        without = self.try_render(turns)
        return [PROBE_TOOL] if without is None and self.try_render(turns, [PROBE_TOOL]) is not None else None

    @cached_property
    def parts(self) -> frozenset[str]:
        """The roles whose content must be a list of parts."""
        choices = [frozenset(roles) for roles in ((), ("user", "assistant"), ("user",), ("assistant",))]
        probe = [user_turn(), answer_turn()]
        chosen = next((c for c in choices if self._traced(probe, c, ASKED, ANSWERED)), choices[0])
        for role in ("system", "tool") if chosen else ():
            turns = [{"role": "system", "content": TOLD}, *probe]
            if role == "tool":
                turns = [user_turn(), calling_turn({KEY: VALUE}, OPENAI_ID), result_turn(OPENAI_ID), answer_turn()]
            word = RESULT if role == "tool" else TOLD
            if not self._traced(turns, chosen, word) and self._traced(turns, chosen | {role}, word):
                chosen |= {role}
        return chosen

    def _traced(self, turns: list[Turn], parts: frozenset[str], *words: str) -> bool:
        made = [
            {**t, "content": [{"type": "text", "text": t["content"]}]} if t["role"] in parts else t for t in turns
        ]
        return shows(self.try_render(made, self.tools_for_probes), words)

    def _shaped(self, turns: list[Turn]) -> list[Turn]:
        return [self._with_parts(turn) for turn in turns]

    @cached_property
    def has_developer_role(self) -> bool:
        turns = [{"role": "developer", "content": TOLD}, user_turn(), answer_turn()]
        named = "developer" in self._source
        return named and shows(self.try_render(self._shaped(turns), self.tools_for_probes), [TOLD])

    @cached_property
    def bare_tools(self) -> bool:
        """Whether the template reads a tool's function in place of the tool."""
        turns = self._shaped([user_turn()])
        if shows(self.try_render(turns, [PROBE_TOOL]), [LISTED, TOLD]):
            return False
        return shows(self.try_render(turns, [PROBE_TOOL["function"]]), [LISTED, TOLD])

    def thought_form(self, calls: bool) -> str | None:
        """The name in THOUGHT_FORMS of how the template reads the thoughts of an answer; None if it reads none."""
        return self._thought_forms[calls]

    @cached_property
    def _thought_forms(self) -> dict[bool, str | None]:
        return {calls: self._find_thought_form(calls) for calls in (False, True)}

    def _find_thought_form(self, calls: bool) -> str | None:
        names = [name for name in THOUGHT_FORMS if name != INLINE or END_THINK in self._source]
        return next((name for name in names if self._renders_thought(name, calls)), None)

    def _renders_thought(self, name: str, calls: bool) -> bool:
        """Whether the thoughts of a probe are rendered once, and not behind thoughts that are already closed."""
        text = self._thought_probe(name, calls)
        words = [THOUGHT, *([] if calls else [ANSWERED])]
        return text is not None and shows(text, words) and text.count(THOUGHT) == 1 and not _closed_before(text)

    def _thought_probe(self, name: str, calls: bool) -> str | None:
        answer = self._call_probe(calling_turn({KEY: VALUE}, OPENAI_ID)) if calls else answer_turn()
        turns = self._shaped([user_turn(), THOUGHT_FORMS[name](answer, THOUGHT)])
        return self.try_render(turns, self._probe_tools(calls))

    def keeps_inline(self, calls: bool) -> bool:
        """Whether thoughts within the content are passed as they are.

        They are not if the template has a key for them and cuts them off, or writes them behind an empty block.
        """
        return self._keeps_inline[calls]

    @cached_property
    def _keeps_inline(self) -> dict[bool, bool]:
        return {calls: self._find_inline(calls) for calls in (False, True)}

    def _find_inline(self, calls: bool) -> bool:
        if self._renders_thought(INLINE, calls):
            return True
        return self.thought_form(calls) in (None, INLINE) and not self._follows_empty_block(calls)

    def _follows_empty_block(self, calls: bool) -> bool:
        """Whether the template writes an empty block of thoughts before thoughts within the content."""
        text = self._thought_probe(INLINE, calls) or ""
        return THOUGHT in text and _closed_before(text)

    def _probe_tools(self, calls: bool) -> list[Any] | None:
        return [self._tool(PROBE_TOOL)] if calls else self.tools_for_probes

    def _call_probe(self, turn: Turn) -> Turn:
        """A probe's turn with calls, in the form that the template reads."""
        return self._with_calls([turn], {})[0]

    @cached_property
    def calls(self) -> CallForm:
        """The first form whose rendering holds name, argument and value once encoded."""
        tools = [self._tool(PROBE_TOOL)]
        for flat, ids, arguments in itertools.product((False, True), IDS, ("object", "text")):
            form = CallForm(arguments, ids, ids != "any", flat)
            text = self._call_text(form, tools)
            if text is not None and reads_once(text):
                if f"functions.{NAME}:0" in text:  # the template makes the id, which the result must repeat
                    form = form._replace(ids="functions")
                form = form._replace(needs_ids=form.ids != "any" or self._wants_id(form, text, tools))
                return self._with_result(form, tools)
        return CallForm()

    def _call_text(self, form: CallForm, tools: list[Any], **more: Any) -> str | None:
        """The probe of a call in `form`: complete with its result, else up to the call."""
        turns = self._call_turns(form, **more)
        return self.try_render(turns, tools) or self.try_render(turns[:2], tools)

    def _call_turns(self, form: CallForm, *, own: str | None = OPENAI_ID, name: str | None = NAME) -> list[Turn]:
        arguments: Any = {KEY: VALUE} if form.arguments == "object" else json.dumps({KEY: VALUE})
        if own is not None and form.ids != "any":
            own = IDS[form.ids].make("", NAME, 0)
        turn = calling_turn(arguments, own)
        if form.flat:
            turn["tool_calls"] = [{**c, **c["function"], "parameters": arguments} for c in turn["tool_calls"]]
        result = result_turn(own) | ({"name": name} if name else {}) | {"role": form.tool_role}
        return self._shaped([user_turn(), turn, result, answer_turn()])

    def _wants_id(self, form: CallForm, text: str, tools: list[Any]) -> bool:
        """Whether the template shows the id of a call, or requires one."""
        return OPENAI_ID in text or self._call_text(form, tools, own=None) is None

    def _with_result(self, form: CallForm, tools: list[Any]) -> CallForm:
        """`form` with the role of results, and whether they need a name."""
        for role in TOOL_ROLES:
            made = form._replace(tool_role=role)
            if shows(self.try_render(self._call_turns(made), tools), [RESULT]):
                return made._replace(names=self.try_render(self._call_turns(made, name=None), tools) is None)
        return form


def _with_role(turn: Turn, role: str) -> Turn:
    return {**turn, "role": role} if turn["role"] == "tool" else turn


def _closed_before(text: str) -> bool:
    """Whether a block of thoughts ends between the request of a probe and its thoughts."""
    return END_THINK in text[: text.index(THOUGHT)].rpartition(ASKED)[2]
