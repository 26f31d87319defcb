"""Row formats: each turns its rows into messages as its docstring shows, and says why it cannot use one."""

from __future__ import annotations

import doctest
from typing import get_args, get_type_hints

import pytest

from src.config import DataArgs
from src.data.formats import FORMATS, RowError, translate
from tests.fixtures import chat

ANSWERED = {"role": "assistant", "content": "4"}


def refusal(row: object, data_format: str) -> RowError:
    with pytest.raises(RowError) as caught:
        translate(row, data_format)
    return caught.value


@pytest.mark.parametrize("name", FORMATS)
def test_the_docstring_example_of_each_format_is_true(name: str) -> None:
    (example,) = doctest.DocTestFinder().find(FORMATS[name], name, globs={name: FORMATS[name]})
    result = doctest.DocTestRunner().run(example)
    assert (result.failed, result.attempted) == (0, 1)


def test_each_format_can_be_asked_for() -> None:
    assert set(get_args(get_type_hints(DataArgs)["data_format"])) == set(FORMATS)


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
        ({"messages": [{"role": "tool", "content": "4"}]}, "messages", "unknown_role", "'tool'"),
        ({"messages": [{"content": "4"}]}, "messages", "unknown_role", "None"),
        ({"messages": [{"role": ["user"], "content": "4"}]}, "messages", "unknown_role", "'list'"),
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
