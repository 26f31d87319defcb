"""Row formats: each turns its rows into messages as its docstring shows, and says why it cannot use one."""

from __future__ import annotations

import doctest
from typing import get_args, get_type_hints

import pytest

from src.config import DataArgs
from src.data.formats import FORMATS, Message, RowError, detect, tools_of, translated
from tests.fixtures import chat

ANSWERED = {"role": "assistant", "content": "4"}


def refusal(row: object, data_format: str) -> RowError:
    with pytest.raises(RowError) as caught:
        translate(row, data_format)
    return caught.value


def translate(row: object, data_format: str) -> list[Message]:
    return translated(row, FORMATS[data_format].translate)


@pytest.mark.parametrize("name", FORMATS)
def test_the_docstring_example_of_each_format_is_true(name: str) -> None:
    function = FORMATS[name].translate
    (example,) = doctest.DocTestFinder().find(function, name, globs={name: function})
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0
    assert result.attempted >= 1


def test_each_format_can_be_asked_for() -> None:
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
        ({"messages": [{"role": "bot", "content": "4"}]}, "messages", "unknown_role", "'bot'"),
        ({"messages": [{"content": "4"}]}, "messages", "unknown_role", "None"),
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
        ({"prompt": "2+2?", "completion": 4}, "prompt_completion", "no_completion", "'completion'"),
        ({"prompt": "2+2?", "completion": "\t"}, "prompt_completion", "empty_answer", "empty assistant turn"),
        ({"output": "4"}, "instruction", "no_instruction", "'instruction'"),
        ({"instruction": "Add."}, "instruction", "no_output", "'output'"),
        ({"instruction": "Add.", "input": 2, "output": "4"}, "instruction", "not_text", "input that is not text"),
        ({"instruction": "Add.", "input": 0, "output": "0"}, "instruction", "not_text", "input that is not text"),
    ],
)
def test_a_row_that_cannot_be_used_has_its_reason(row: object, data_format: str, reason: str, told: str) -> None:
    error = refusal(row, data_format)
    assert error.reason == reason
    assert told in error.detail


def test_calls_of_tools_are_carried_to_the_template() -> None:
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
    assert refusal(row, "messages").reason == "not_text"


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
        {"text": "4"},
        {"question": "2+2?"},
        7,
    ]
    assert detect(rows) == dict.fromkeys(FORMATS, 1)
