"""What a chat template leaves out is named: a rejection for a trained answer, a finding for the rest."""

from __future__ import annotations

from typing import Any

import pytest

from src.data.content_check import leaves_trace
from src.data.conversation import Message, RowError
from src.data.encode import EncodedRow, EncodingOptions, encode_chats
from src.eval import inference
from src.utils.logs import log
from tests.data.test_template_profile import AS_ITEMS, AS_OBJECT, chat, each_call, each_turn
from tests.data.tokenizers import TOOLS, assistant, row, system, user

PROMPT = "{% if add_generation_prompt %}<%assistant>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
RESULT: Message = {"role": "tool", "content": "rain and 7 degrees"}


def calling(*cities: str, content: str = "") -> Message:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}} for city in cities]
    return assistant(content, tool_calls=calls)


def encoded(template: str, turns: list[Message], tools: list[Any] | None = None) -> EncodedRow | RowError:
    return encode_chats([row(turns, tools)], chat(template + PROMPT), EncodingOptions(100_000))[0]


def left_out(template: str, turns: list[Message], tools: list[Any] | None = None) -> tuple[str, ...]:
    found = encoded(template, turns, tools)
    assert isinstance(found, EncodedRow), found
    return found.dropped


@pytest.mark.parametrize(
    ("template", "turns", "detail"),
    [
        (each_turn("{{ m.content }}"), [user("q"), assistant("4", reasoning_content="Two and two.")], "thoughts"),
        (
            each_turn("{{ m.content.split('</think>') | last }}"),
            [user("q"), assistant("<think>\nTwo and two.\n</think>\n\nFour.")], "thoughts",
        ),
        (
            each_turn("{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}"),
            [user("q"), calling("Bern", content="Let me look."), RESULT, assistant("Rain.")], "text beside a call",
        ),
        (
            AS_OBJECT.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
            [user("q"), calling("Bern", "Oslo"), RESULT, assistant("Rain.")], "parallel tool calls",
        ),
        (each_turn("{{ m.content }}"), [user("q"), calling("Bern", content="I look."), RESULT, assistant("Rain.")],
         "tool calls"),
    ],
    ids=["thoughts", "inline thoughts", "text beside a call", "second call", "calls"],
)  # fmt: skip
def test_what_is_left_out_of_a_trained_answer_rejects_the_row(
    template: str, turns: list[Message], detail: str
) -> None:
    found = encoded(template, turns)
    assert isinstance(found, RowError) and found.reason == "dropped_by_template"
    assert found.detail == f"has {detail} that the chat template leaves out"
    untrained = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in turns[:-1]]
    context = [*untrained, *turns[-1:]] if len(turns) > 2 else [*untrained[:1], {**turns[1], "weight": 0}]
    context += [user("And?"), assistant("Five.")]
    assert left_out(template, context) == (() if detail == "thoughts" else (detail,))  # type: ignore[arg-type]


def test_what_is_left_out_of_the_context_is_a_finding() -> None:
    only = each_turn("{% if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}")
    turns = [system("Be brief and kind."), user("q"), assistant("CALL"), RESULT, assistant("It rains.")]
    assert left_out(only, turns, TOOLS) == ("a system turn", "a tool result", "tools")
    assert left_out(each_turn("{{ m.content }}"), turns) == ()


def test_names_of_turns_are_looked_for() -> None:
    named: list[Message] = [{**user("Is it Ann?"), "name": "Ann"}, assistant("Yes.", name="Bot")]
    assert left_out(each_turn("{{ m.content }}"), named) == ("the name of a turn",)
    assert left_out(each_turn("{{ m.name }}: {{ m.content }}"), named) == ()
    result: Message = {**RESULT, "name": "weather"}
    assert left_out(AS_OBJECT, [user("q"), calling("Bern"), result, assistant("Rain.")]) == ()
    assert left_out(AS_OBJECT, [user("q"), calling("Bern"), {**result, "name": "clock"}, assistant("Rain.")]) == (
        "the name of a turn",
    )


def test_the_parameters_of_tools_are_looked_for() -> None:
    unit = {"type": "string", "description": "degrees", "enum": ["C", "F"]}
    place = {"type": "object", "properties": {"x": {"type": "number"}, "unit": unit}}
    schema = {"type": "object", "properties": {"places": {"type": "array", "items": place}}}
    tools = [{"type": "function", "function": {"name": "weather", "description": "tells", "parameters": schema}}]
    turns = [user("Which C, F or x?"), assistant("a")]

    def lost(listed: str, before: str = "") -> tuple[str, ...]:
        each = "{% for t in tools %}{{ t.function.name }}: {{ t.function.description }}" + listed + "{% endfor %}"
        return left_out(before + each + each_turn("{{ m.content }}"), turns, tools)

    names = "{% for n, p in o.properties | items %}{{ n }} {{ deeper(p['items'] or p) }}{% endfor %}"
    deeper = "{% macro deeper(o) %}{% if o.properties %}" + names + "{% endif %}{% endmacro %}"
    assert lost("") == ("parameters of tools",)
    assert lost("{{ deeper(t.function.parameters) }}", deeper) == (
        "descriptions of parameters of tools", "allowed values of parameters of tools",
    )  # fmt: skip
    assert lost("{{ t.function.parameters | tojson(indent=2) }}") == lost("{{ t | tojson }}") == ()


def test_truth_values_and_names_of_arguments_are_looked_for() -> None:
    call = {"type": "function", "function": {"name": "light", "arguments": {"on": True, "room": "hall"}}}
    turns = [user("Is it true?"), assistant("", tool_calls=[call])]
    assert left_out(AS_OBJECT, turns) == left_out(AS_ITEMS, turns) == ()
    for each in ("{{ v if v is string }}<{{ k }}>", "={{ v }}"):
        items = "{% for k, v in c.function.arguments | items %}" + each + "{% endfor %}"
        found = encoded(each_call("{{ c.function.name }}" + items), turns)
        assert isinstance(found, RowError) and "arguments of tool calls" in found.detail, each


def test_a_short_text_that_only_the_prompt_of_an_answer_shows_is_not_missing() -> None:
    moved = (
        "{% for m in messages %}{% if m.role != 'system' %}<%{{ m.role }}>{% if loop.last and m.role == 'user' %}"
        "{{ messages[0].content }} {% endif %}{{ m.content }}{% endif %}{% endfor %}"
    )
    turns = [system("Brief."), user("q"), assistant("a", weight=0), user("And?"), assistant("b")]
    assert left_out(moved, turns) == ()


def test_a_short_text_that_occurs_by_chance_is_found_missing() -> None:
    only = each_turn("{% if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}")
    turns: list[Message] = [user("Is it 7 degrees?"), assistant("CALL"), {"role": "tool", "content": "7"}]
    assert left_out(only, [*turns, assistant("Yes.")]) == ("a tool result",)
    turns[-1] = {"role": "tool", "content": '{"degrees": 7, "sky": "s"}'}
    assert left_out(only, [*turns, assistant("Yes.")]) == ("a tool result",)
    whole = each_turn("{{ m.content if m.role != 'tool' }}{{ m.content | tojson if m.role == 'tool' }}")
    assert left_out(whole, [*turns, assistant("Yes.")]) == ()
    beside = each_turn("{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}")
    found = encoded(beside, [user("q"), calling("Bern", content="me"), RESULT, assistant("Rain.")])
    assert isinstance(found, RowError) and "text beside a call" in found.detail


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (" Hi \n", "<user>Hi<end>"),
        ("one\n\ntwo", "one\ntwo"),
        ("Be kind. /no_think", "Reasoning: /no_think\nBe kind."),
        ('say "hi"\n', '{"content": "say \\"hi\\""}'),
        ("naïve", '"na\\u00efve"'),
        ("a < b", "a &lt; b"),
        ('it\'s "so"\nhere', repr('it\'s "so"\nhere')),
        ('{"temp": 21, "sky": "grey"}', "<temp>21</temp><sky>grey</sky>"),
        ('{"rain": true, "days": 1}', "<rain>True</rain><days>1</days>"),
        ('{"n":1.50}', '{"n": 1.50}'),
    ],
)
def test_a_text_leaves_a_trace_in_every_form_in_which_templates_write_it(said: str, text: str) -> None:
    assert leaves_trace(said, text)
    assert not leaves_trace(said, text.replace("i", "").replace("1", "").replace("n", "").replace("a", ""))


def test_an_evaluation_says_what_the_template_leaves_out_of_its_requests(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "propagate", False)
    only = chat(each_turn("{% if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}") + PROMPT)
    turns = [user("q"), assistant("CALL", reasoning_content="Hm."), RESULT, assistant("It rains.")]
    rows = [row(turns, TOOLS), row(turns), row([user("q"), assistant("a")])]
    requests = inference.encode_requests({"test": rows}, only, "causal_lm", {}, references=False)
    inference.warn_of_left_out(requests, only)
    assert [record.getMessage() for record in caplog.records] == [
        "test: 2 rows have a tool result that the chat template leaves out",
        "test: 1 row has tools that the chat template leaves out",
    ]
