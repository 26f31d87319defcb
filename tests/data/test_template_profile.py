"""Each template gets calls, thoughts, roles and content in the form that it reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from src.data.chat import ChatTokenizer
from src.data.conversation import Conversation, Message, RowError
from tests.data import tokenizers
from tests.data.tokenizers import FAMILIES, TOOLS, assistant, system, user


def each_turn(content: str) -> str:
    """A template that writes `content` for each turn `m`, behind its role."""
    return "{% for m in messages %}<%{{ m.role }}>" + content + "{% endfor %}"


def each_call(call: str, before: str = "") -> str:
    """A template that writes `call` for each call `c` of a turn, behind `before` and its content."""
    return each_turn(before + "{{ m.content }}{% for c in m.tool_calls or [] %}" + call + "{% endfor %}")


CONTENT = "{{ m.content }}"
AS_OBJECT = each_call("{{ c.function.name }}{{ c.function.arguments | tojson }}")
AS_TEXT = each_call("{{ c.function.name + c.function.arguments }}")
AS_ITEMS = each_call(
    "{{ c.function.name }}{% for k, v in c.function.arguments | items %}<{{ k }}={{ v }}>{% endfor %}"
)
FLAT = each_call("{{ c['name'] }}{{ c['parameters'] | tojson }}")
NINE = each_call(
    "{% if c.id is undefined or c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "{{ c.function.name }}#{{ c.id }}{{ c.function.arguments | tojson }}",
    "{{ m.tool_call_id }}",
)
NAMED_ID = each_call("{{ c.id }}{{ c.function.arguments | tojson }}", "{{ m.tool_call_id }}")


def chat(template: str, **variables: Any) -> ChatTokenizer:
    tokenizer = tokenizers.tokenizer(FAMILIES["chatml"])
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer, variables)


def rendered(template: str, turns: list[Message], tools: list[Any] | None = None, **variables: Any) -> str:
    return chat(template, **variables).render(Conversation(turns, tools))


def calling(arguments: Any, own: str | None = "call_1") -> Message:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return assistant("", tool_calls=[call | ({"id": own} if own else {})])


RESULT: Message = {"role": "tool", "content": "rain", "tool_call_id": "call_1"}


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (AS_OBJECT, 'weather{"city": "Bern"}'),
        (AS_TEXT, 'weather{"city": "Bern"}'),
        (AS_TEXT.replace(" + ", "}}{{ "), 'weather{"city": "Bern"}'),
        (AS_ITEMS, "weather<city=Bern>"),
        (FLAT, 'weather{"city": "Bern"}'),
    ],
    ids=["object", "text", "text that Python writes", "items", "flat"],
)
def test_arguments_are_encoded_once_whether_the_row_has_text_or_an_object(template: str, call: str) -> None:
    for arguments in ({"city": "Bern"}, '{"city": "Bern"}'):
        text = rendered(template, [user("Weather?"), calling(arguments), RESULT, assistant("Rain.")], TOOLS)
        assert f"<%assistant>{call}<%tool>rain" in text


def test_numbers_of_arguments_keep_their_spelling_and_no_arguments_are_an_empty_object() -> None:
    spelled = '{"a": 1.10, "b": 1e5, "c": -0, "d": 3, "e": "1.10", "f": [2.50, 10.0]}'
    assert spelled in rendered(AS_OBJECT, [user("q"), calling(spelled)])
    for empty in ("", " ", None, {}):
        assert "weather{}" in rendered(AS_OBJECT, [user("q"), calling(empty)])


def test_text_that_is_no_object_is_refused_by_a_template_that_needs_one() -> None:
    with pytest.raises(RowError, match="'weather' whose arguments are not a JSON object") as caught:
        rendered(AS_OBJECT, [user("q"), calling("city=Bern")])
    assert caught.value.reason == "bad_arguments"
    assert "weathercity=Bern" in rendered(AS_TEXT, [user("q"), calling("city=Bern")])


def test_ids_have_the_form_that_the_template_demands_and_results_repeat_them() -> None:
    turns = [user("q"), calling({"city": "Bern"}), RESULT, assistant("a")]
    text = rendered(NINE, turns)
    own = text.partition("weather#")[2][:9]
    assert own.isalnum() and f"<%tool>{own}rain" in text
    kept = [user("q"), calling({}, "abcdefgh1"), {**RESULT, "tool_call_id": "abcdefgh1"}, assistant("a")]
    assert rendered(NINE, kept).count("abcdefgh1") == 2
    unnamed: list[Message] = [user("q"), calling({}, None), {"role": "tool", "content": "rain"}, assistant("a")]
    assert "functions.weather:0{}<%tool>functions.weather:0rain" in rendered(NAMED_ID, unnamed)
    assert "call_1" not in rendered(AS_OBJECT, turns)
    calls = [{"id": own, "type": "function", "function": {"name": own, "arguments": {}}} for own in "ab"]
    results: list[Message] = [{"role": "tool", "content": f"of {own}", "tool_call_id": own} for own in "ba"]
    crossed = rendered(NINE, [user("q"), assistant("", tool_calls=calls), *results, assistant("a")])
    for own in "ab":
        assert f"<%tool>{crossed.partition(own + '#')[2][:9]}of {own}" in crossed


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_passed_under_the_key_that_the_template_reads(key: str) -> None:
    template = each_turn("{% if m.KEY %}[{{ m.KEY }}]{% endif %}{{ m.content }}".replace("KEY", key))
    assert "<%assistant>[Hm.]Four." in rendered(template, [user("q"), assistant("Four.", reasoning_content="Hm.")])


def test_thoughts_inside_the_content_are_moved_to_the_key_if_the_template_would_cut_them_off() -> None:
    cut = each_turn("{{ m.reasoning_content }}|{{ (m.content.split('</think>') | last).lstrip() }}")
    inline = assistant("<think>\nHm.\n</think>\n\nFour.")
    assert "<%assistant>Hm.|Four." in rendered(cut, [user("q"), inline])
    kept = each_turn("{{ m.reasoning_content }}|{{ m.content }}")
    assert "|<think>\nHm.\n</think>\n\nFour." in rendered(
        kept.replace("}}|", "}}{# </think> #}|"), [user("q"), inline]
    )


def test_a_template_that_knows_only_the_tags_gets_thoughts_inside_the_content() -> None:
    knows = each_turn("{{ m.content }}{# </think> #}")
    answer = assistant("Four.", reasoning_content="Hm.")
    assert "<think>\nHm.\n</think>\n\nFour." in rendered(knows, [user("q"), answer])
    assert "Hm." not in rendered(each_turn("{{ m.content }}"), [user("q"), answer])
    assert "Hm." not in rendered(knows, [user("q"), answer, user("And?")])


def test_variables_of_the_template_decide_how_thoughts_are_read() -> None:
    switched = each_turn("{% if enable_thinking %}[{{ m.reasoning_content }}]{% endif %}{{ m.content }}")
    turns = [user("q"), assistant("a", reasoning_content="Hm.")]
    assert "Hm." not in rendered(switched, turns)
    assert "[Hm.]a" in rendered(switched, turns, enable_thinking=True)
    assert "[Hm.]a" in chat(switched).render(Conversation(turns, None, {"enable_thinking": True}))


def test_a_developer_is_the_system_where_the_template_has_no_such_role() -> None:
    told: list[Message] = [{"role": "developer", "content": "Be brief."}, user("q"), assistant("a")]
    assert "<%system>Be brief." in rendered(each_turn("{{ m.content }}"), told)
    assert "<%developer>Be brief." in rendered(each_turn("{{ m.content }}{# developer #}"), told)
    both = rendered(each_turn("{{ m.content }}"), [system("Swiss."), *told])
    assert "<%system>Swiss.\n\nBe brief.<%user>" in both


def test_content_is_a_list_of_parts_where_the_template_needs_one() -> None:
    parts = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    turns = [system("Be brief."), user("q"), assistant("a")]
    assert rendered(each_turn(parts), turns) == "<%system>Be brief.<%user>q<%assistant>a"
    mixed = each_turn("{% if m.role == 'user' %}" + parts + "{% else %}{{ m.content + '' }}{% endif %}")
    assert rendered(mixed, turns) == "<%system>Be brief.<%user>q<%assistant>a"


def test_tools_are_passed_as_the_api_writes_them_or_as_their_functions() -> None:
    bare = [TOOLS[0]["function"]]
    wrapped = "{% for t in tools %}{{ t.function.name }}: {{ t.function.description }}{% endfor %}" + each_turn("")
    for tools in (TOOLS, bare):
        assert "weather: Looks out" in rendered(wrapped, [user("q"), assistant("a")], tools)
        assert "weather: Looks out" in rendered(
            wrapped.replace(".function", ""), [user("q"), assistant("a")], tools
        )


def test_results_have_the_role_that_the_template_reads() -> None:
    shown = "{% if m.role in ['user', 'assistant', 'observation'] %}{{ m.content }}{% endif %}"
    calls = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    turns = [user("q"), calling({"city": "Bern"}), RESULT, assistant("a")]
    assert "<%observation>rain" in rendered(each_turn(shown + calls), turns)


def test_a_row_is_not_changed_and_a_plain_one_is_passed_as_it_is() -> None:
    turns = [user("q"), calling('{"city": "Bern"}'), RESULT, assistant("a", reasoning_content="Hm.")]
    before = json.dumps(turns)
    chat(NINE).render(Conversation(turns, TOOLS))
    assert json.dumps(turns) == before
    plain = Conversation([user("q"), assistant("a", weight=0)])
    assert chat(AS_OBJECT).adapt(plain).conversation is plain
