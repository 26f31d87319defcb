"""Row formats: the translation into messages, as in the docstring examples, and the reasons of rejection."""

from __future__ import annotations

import doctest
import re
from types import ModuleType
from typing import get_args, get_type_hints

import pytest

from src import schema
from src.data import formats, readers, sources
from src.data.calls import tools_of
from src.data.formats import FORMATS, Message, RowError, count_formats, to_messages
from src.schema import DataArgs
from tests.fixtures import chat

ANSWERED = {"role": "assistant", "content": "4"}


def refusal(row: object, data_format: str) -> RowError:
    with pytest.raises(RowError) as caught:
        translate(row, data_format)
    return caught.value


def translate(row: object, data_format: str) -> list[Message]:
    return to_messages(row, FORMATS[data_format].translate)


@pytest.mark.parametrize("module", [formats, sources, readers])
def test_the_places_that_a_docstring_names_for_a_new_entry_exist(module: ModuleType) -> None:
    named = re.findall(r"\b(schema|config)\.(\w+)", str(module.__doc__))
    assert [f"{file}.{name}" for file, name in named if not hasattr({"schema": schema}.get(file), name)] == []
    assert named or module is readers, "a setting names the entry"


@pytest.mark.parametrize("name", FORMATS)
def test_the_docstring_example_of_each_format_is_true(name: str) -> None:
    function = FORMATS[name].translate
    (example,) = doctest.DocTestFinder().find(function, name, globs={name: function, "to_messages": to_messages})
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0
    assert result.attempted >= 1


def test_each_format_can_be_selected() -> None:
    assert set(get_args(get_type_hints(DataArgs)["data_format"])) == {"auto", *FORMATS}


def test_a_conversation_passes_unchanged_and_other_keys_of_its_messages_are_left_out() -> None:
    row = chat("2+2?", "4", "And 3+3?", "6", system="Count.")
    noisy = {"messages": [{**turn, "id": 7} for turn in row["messages"]], "source": "book"}
    assert translate(noisy, "messages") == row["messages"]


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": "  \n"}, {"input": None}])
def test_an_empty_input_adds_nothing_to_the_instruction(given: dict[str, object]) -> None:
    row = {"instruction": "Add 2 and 2.", "output": "4", **given}
    assert translate(row, "instruction")[0]["content"] == "Add 2 and 2."


@pytest.mark.parametrize(
    ("row", "data_format", "reason", "told"),
    [
        ([], "messages", "not_an_object", "is not a JSON object"),
        (7, "prompt_completion", "not_an_object", "is not a JSON object"),
        ({}, "messages", "no_messages", "no list of messages"),
        ({"messages": []}, "messages", "no_messages", "no list of messages"),
        ({"messages": {"role": "user"}}, "messages", "no_messages", "no list of messages"),
        ({"messages": [ANSWERED, "hello"]}, "messages", "not_an_object", "message 2 that is not an object"),
        ({"messages": [{"role": "alien", "content": "4"}]}, "messages", "unknown_role", "'alien'"),
        (
            {"messages": [{"content": "4"}]},
            "messages",
            "unknown_role",
            "message 1 without a role among its keys content",
        ),
        ({"messages": [{"role": ["user"], "content": "4"}]}, "messages", "unknown_role", "'list'"),
        (
            {"messages": [{"role": "user", "content": "2+2?"}, {**ANSWERED, "weight": 2}]},
            "messages",
            "bad_weight",
            "2",
        ),
        (
            {"messages": [{"role": "tool", "content": "4"}, ANSWERED]},
            "messages",
            "role_order",
            "tool at the beginning",
        ),
        ({"messages": [ANSWERED]}, "messages", "role_order", "message 1 of assistant at the beginning"),
        (chat("2+2?", "4", "Thanks!"), "messages", "role_order", "ends with a message of user"),
        (
            {"messages": [*chat("2+2?")["messages"], *chat("2+2?", "4")["messages"]]},
            "messages",
            "role_order",
            "message 2 of user after user",
        ),
        (
            {"messages": [*chat("2+2?", "4")["messages"], ANSWERED]},
            "messages",
            "role_order",
            "assistant after assistant",
        ),
        (
            {"messages": [*chat("2+2?", "4")["messages"], {"role": "system", "content": "Count."}, ANSWERED]},
            "messages",
            "role_order",
            "system after assistant",
        ),
        (chat(" ", "4"), "messages", "empty_prompt", "empty message 1"),
        (chat("2 \ud83d 2?", "4"), "messages", "not_unicode", "half a surrogate pair"),
        ({"conversations": "no list"}, "conversations", "no_conversations", "no list of conversations"),
        ({"conversations": [{"from": "alien", "value": "4"}]}, "conversations", "unknown_role", "'alien'"),
        ({"conversations": [{"input": "2+2?"}]}, "conversations", "no_output", "'output'"),
        ({"conversations": [{"from": "human", "value": None}]}, "conversations", "not_text", "message 1"),
        ({"text": None}, "text", "no_text", "'text'"),
        ({"text": " \n"}, "text", "empty_text", "empty"),
        ({"messages": [{"role": "user"}, ANSWERED]}, "messages", "not_text", "message 1 whose content"),
        ({"messages": [{"role": "user", "content": ["2+2?"]}]}, "messages", "not_text", "message 1 whose content"),
        (chat("2+2?"), "messages", "no_assistant_turn", "no assistant turn"),
        (chat("2+2?", ""), "messages", "empty_answer", "empty assistant turn"),
        (chat("2+2?", "4", "3+3?", " \n"), "messages", "empty_answer", "empty assistant turn"),
        ({"completion": "4"}, "prompt_completion", "no_prompt", "'prompt'"),
        ({"prompt": "2+2?"}, "prompt_completion", "no_completion", "'completion'"),
        ({"prompt": "2+2?", "completion": True}, "prompt_completion", "no_completion", "'completion'"),
        ({"prompt": "2+2?", "completion": "\t"}, "prompt_completion", "empty_answer", "empty assistant turn"),
        ({"output": "4"}, "instruction", "no_instruction", "'instruction'"),
        ({"instruction": "Add."}, "instruction", "no_output", "'output'"),
        (
            {"instruction": "Add.", "input": True, "output": "4"},
            "instruction",
            "not_text",
            "input that is not text",
        ),
        (
            {"instruction": "Add.", "input": [2], "output": "0"},
            "instruction",
            "not_text",
            "input that is not text",
        ),
    ],
)
def test_a_row_that_cannot_be_used_has_its_reason(row: object, data_format: str, reason: str, told: str) -> None:
    error = refusal(row, data_format)
    assert error.reason == reason
    assert told in error.detail


def test_tool_calls_are_passed_to_the_template() -> None:
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "4", "name": "add", "tool_call_id": "1"},
        {"role": "assistant", "content": "4", "weight": 0},
    ]
    row = {"messages": turns, "tools": [{"type": "function"}]}
    assert translate(row, "messages") == [turns[0], {**turns[1], "content": ""}, *turns[2:]]
    assert tools_of(row) == [{"type": "function"}]
    assert tools_of({"tools": '[{"type": "function"}]'}) == [{"type": "function"}]  # a table's cell
    assert tools_of({"tools": []}) is None
    with pytest.raises(RowError, match="tools that are not a list"):
        tools_of({"tools": {"type": "function"}})


def test_the_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    row = {"messages": [{"role": "user", "content": parts}, ANSWERED]}
    assert translate(row, "messages")[0]["content"] == "2+2?"
    parts.append({"type": "image_url"})
    assert refusal(row, "messages").reason == "multimodal"


def test_a_conversation_in_a_cell_of_a_table_is_read_as_json() -> None:
    cell = '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]'
    assert translate({"messages": cell}, "messages") == chat("2+2?", "4")["messages"]


def test_the_system_text_beside_a_conversation_or_an_instruction_comes_first() -> None:
    for row, name in (
        ({"system": "Count.", "conversations": [{"input": "2+2?", "output": "4"}]}, "conversations"),
        ({"system": "Count.", "instruction": "2+2?", "output": "4"}, "instruction"),
    ):
        assert translate(row, name) == chat("2+2?", "4", system="Count.")["messages"]


def test_a_format_is_known_by_its_columns() -> None:
    rows = [
        chat("2+2?", "4"),
        {"prompt": "2+2?", "completion": "4", "id": 1},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"conversations": []},
        {"text": "4", "label": "even"},
        {"text": "4"},
        {"question": "2+2?"},
        {"message_tree_id": "1", "prompt": {}},
        7,
    ]
    names = (
        "message_tree",
        "messages",
        "prompt_completion",
        "instruction",
        "conversations",
        "classification",
        "text",
    )
    assert count_formats(rows) == dict.fromkeys(names, 1)


@pytest.mark.parametrize("name", FORMATS)
def test_auto_finds_each_format_by_its_columns_alone(name: str) -> None:
    assert count_formats([{group[0]: "" for group in FORMATS[name].columns}]) == {name: 1}


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"prompt": "2+2?"}, []),
        ({"instruction": "2+2?", "completion": "4"}, ["instruction"]),
        ({"instruction": "2+2?"}, []),
        ({"text": "4", "messages": []}, ["messages"]),  # the first that fits
    ],
)
def test_a_format_needs_all_its_columns(columns: dict[str, object], found: list[str]) -> None:
    assert list(count_formats([columns])) == found


@pytest.mark.parametrize(
    ("speaker", "role"),
    [("human", "user"), ("user", "user")]
    + [(name, "assistant") for name in ("gpt", "chatgpt", "bing", "bard", "assistant", "model")],
)
def test_roles_of_other_vendors_are_known(speaker: str, role: str) -> None:
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    turns[role == "assistant"]["from"] = speaker
    assert translate({"conversations": turns}, "conversations") == chat("2+2?", "4")["messages"]


@pytest.mark.parametrize("speaker", ["tool", "observation", "function_response"])
def test_tool_output_is_known_by_other_role_names(speaker: str) -> None:
    said = [("system", "Count."), ("human", "2+2?"), ("gpt", "?"), (speaker, "4"), ("gpt", "4")]
    turns = translate({"conversations": [{"from": who, "value": what} for who, what in said]}, "conversations")
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("roles", "told"),
    [
        ("system user assistant user assistant", None),
        ("user assistant tool tool assistant", None),
        ("user assistant tool assistant user assistant", None),
        ("system assistant", "message 2 of assistant after system"),
        ("user assistant tool user assistant", None),
        ("user tool assistant", "message 2 of tool after user"),
        ("user assistant tool", "ends with a message of tool"),
        ("user system assistant", "message 2 of system after user"),
        ("system system user assistant", "message 2 of system after system"),
    ],
)
def test_turns_come_in_an_order_that_models_know(roles: str, told: str | None) -> None:
    row = {"messages": [{"role": role, "content": "4"} for role in roles.split()]}
    if told is None:
        assert [turn["role"] for turn in translate(row, "messages")] == roles.split()
    else:
        assert told in refusal(row, "messages").detail


def test_only_requests_and_answers_must_not_be_empty() -> None:
    call = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": " "},
        ANSWERED,
    ]
    assert translate({"messages": turns}, "messages") == turns
    asked = {"role": "user", "content": None, "tool_calls": call}
    assert refusal({"messages": [asked, ANSWERED]}, "messages").reason == "not_text"
    assert refusal({"messages": [{"role": "user", "content": []}, ANSWERED]}, "messages").reason == "not_text"


def test_a_lone_surrogate_is_found_in_every_field() -> None:
    asked = {"role": "user", "content": "2+2?"}
    for carried in ({"name": "\ud83d"}, {"reasoning_content": "\ud83d"}, {"tool_calls": [{"name": "\ud83d"}]}):
        assert refusal({"messages": [asked, ANSWERED | carried]}, "messages").reason == "not_unicode"


def test_fields_that_templates_read_are_passed_unchanged() -> None:
    carried = {"name": "Ann", "reasoning_content": "two and two", "tool_call_id": "1"}
    (_, found) = translate({"messages": [{"role": "user", "content": "2+2?"}, ANSWERED | carried]}, "messages")
    assert found == ANSWERED | carried
    row = {"messages": [{"role": "user", "content": "2+2?"}, ANSWERED | {"name": None, "weight": None}]}
    assert translate(row, "messages")[1] == ANSWERED


@pytest.mark.parametrize("weight", [0, 1, 0.0, 1.0, False, True])
def test_a_weight_is_0_or_1_however_it_is_written(weight: float) -> None:
    row = {"messages": [{"role": "user", "content": "2+2?"}, ANSWERED | {"weight": weight}]}
    assert repr(translate(row, "messages")[1]["weight"]) == str(int(weight))


@pytest.mark.parametrize("tools", [None, "", [], "[]", "null"])
def test_a_row_may_have_no_tools(tools: object) -> None:
    assert tools_of({"tools": tools}) is None


@pytest.mark.parametrize("tools", ["add", 7, '{"a": 1}', {"a": 1}])
def test_tools_are_a_list(tools: object) -> None:
    with pytest.raises(RowError, match="tools that are not a list") as caught:
        tools_of({"tools": tools})
    assert caught.value.reason == "bad_tools"


def test_a_cell_that_is_nested_too_deeply_is_no_list() -> None:
    assert refusal({"messages": "[" * 200_000}, "messages").reason == "no_messages"


@pytest.mark.parametrize("system", ["", None, 7])
def test_no_system_text_adds_no_turn(system: object) -> None:
    for row, name in (
        ({"system": system, "conversations": [{"input": "2+2?", "output": "4"}]}, "conversations"),
        ({"system": system, "instruction": "2+2?", "output": "4"}, "instruction"),
    ):
        assert translate(row, name) == chat("2+2?", "4")["messages"]
    assert (
        translate({"system": " ", "conversations": [{"input": "2+2?", "output": "4"}]}, "conversations")
        == chat("2+2?", "4")["messages"]
    )


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"from": "human"}, "not_text"),
        ({"value": "2+2?"}, "unknown_role"),
        ({"output": "4"}, "no_input"),
        ({"input": "2+2?"}, "no_output"),
        ("2+2?", "not_an_object"),
    ],
)
def test_half_a_turn_is_refused_for_what_it_lacks(turn: object, reason: str) -> None:
    assert refusal({"conversations": [turn, *chat("2+2?", "4")["messages"]]}, "conversations").reason == reason


def test_turns_of_roles_and_contents_may_stand_among_conversations() -> None:
    row = {"conversations": chat("2+2?", "4", "3+3?", "6")["messages"]}
    assert translate(row, "conversations") == row["conversations"]
