"""Column mapping by the settings of the aiDAPTIV chart."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest

from src.data.column_mapping import STRATEGIES, choose_translation, strategy_of
from src.data.formats import RowError, parse_row, to_messages
from src.data.sources import parse_train_data_config
from src.errors import ConfigError
from src.schema import ColumnArgs, Strategy
from tests.fixtures import chat

# As the chart's documentation prints it.
PRINTED = """\
instruction-dataset:
  data_path: "HuggingFaceH4/instruction-dataset"  # HuggingFace dataset or local path
  strategy: "QA"                                  # Data strategy (QA/Chat)
  system_prompt: "A chat between a curious user and an artificial intelligence assistant."
  user_prompt: "{question}"                       # User prompt template
  question_key: "prompt"                          # Column name for questions
  answer_key: "completion"                        # Column name for answers
  exp_type: train                                 # Experiment type: train/eval/inference
  label_key: "completion"                         # Label column (same as answer_key)
"""


def test_each_strategy_can_be_selected() -> None:
    assert set(get_args(Strategy)) == set(STRATEGIES)


def taken(row: object, **columns: Any) -> list[Any]:
    return list(to_messages(row, choose_translation(ColumnArgs(**columns), "messages")))


def test_the_printed_train_data_config_names_a_data_set_on_the_hub() -> None:
    (found,) = parse_train_data_config(PRINTED)
    assert (found.data_source.type, found.data_source.repo) == ("hub", "HuggingFaceH4/instruction-dataset")
    row = {"prompt": "2+2?", "completion": "4", "meta": {"source": "x"}}
    assert (
        to_messages(row, choose_translation(found, "auto"))
        == chat("2+2?", "4", system="A chat between a curious user and an artificial intelligence assistant.")[
            "messages"
        ]
    )


def test_an_existing_data_path_is_local(tmp_path: Path) -> None:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        Path("HuggingFaceH4/instruction-dataset").mkdir(parents=True)
        (found,) = parse_train_data_config(PRINTED)
    finally:
        os.chdir(before)
    assert (found.path, found.data_source.type) == ("HuggingFaceH4/instruction-dataset", "local")


@pytest.mark.parametrize("path", ["data.csv", "a/b/c", "/a/b", "./a/b", "a b/c"])
def test_a_data_path_that_is_not_a_id_is_local(path: str) -> None:
    (found,) = parse_train_data_config({"a": {"data_path": path}})
    assert (found.path, found.data_source.type) == (path, "local")


def test_only_entries_to_train_on_are_trained_on() -> None:
    both = {"a": {"data_path": "a.csv", "exp_type": "eval"}, "b": {"data_path": "b.csv"}}
    assert [d.path for d in parse_train_data_config(both)] == ["b.csv"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("a: [", "trainDataConfig is not YAML"),
        ("just text", "should be {name:"),
        ({"a": "x"}, "should be {name:"),
        ({"a": {"data_path": "x", "question_kye": "q"}}, "trainDataConfig.a.question_kye is not a setting"),
        ({"a": {"strategy": "QA"}}, "trainDataConfig.a has no data_path"),
        (
            {"a": {"data_path": "x", "exp_type": "tarin"}},
            "exp_type=tarin: should be one of train, eval, inference",
        ),
        ({"a": {"data_path": "x", "strategy": "Talk"}}, "strategy=Talk: should be one of QA, Chat"),
    ],
)
def test_invalid_train_data_configs_are_refused(config: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_train_data_config(config)
    assert told in str(caught.value)


def test_a_question_is_put_into_the_users_words() -> None:
    row = {"q": "2+2?", "topic": "sums", "a": "4", "braces": "{topic}"}
    columns = {"question_key": "q", "answer_key": "a"}
    assert taken(row, **columns, user_prompt="On {topic}: {question} {}")[0]["content"] == "On sums: 2+2? {}"
    other = {**row, "question": "of another column"}
    assert taken(other, **columns, user_prompt="{question}")[0]["content"] == "2+2?"
    # what a column holds is text, no template
    assert taken({**row, "q": "{topic}"}, **columns, user_prompt="{question}")[0]["content"] == "{topic}"
    spaced = {**row, "Customer message": "Hello", "a{": "x"}
    prompt = 'On {topic}: {Customer message} {"a": {}} { } {b: 1}'
    assert taken(spaced, **columns, user_prompt=prompt)[0]["content"] == 'On sums: Hello {"a": {}} { } {b: 1}'
    with pytest.raises(RowError, match="'Customer message', which user_prompt names"):
        taken(row, **columns, user_prompt=prompt)
    with pytest.raises(RowError, match="'level', which user_prompt names"):
        taken(row, **columns, user_prompt="{level}: {question}")


def test_a_template_of_other_columns_needs_no_question() -> None:
    row = {"topic": "sums", "task": "2+2?", "a": "4"}
    assert taken(row, answer_key="a", user_prompt="On {topic}: {task}")[0]["content"] == "On sums: 2+2?"
    with pytest.raises(RowError, match="no text under 'question'"):
        taken(row, answer_key="a", user_prompt="On {topic}: {question}")


def test_a_path_leads_into_a_column() -> None:
    row = {
        "question": "Which colour?",
        "context": "It is blue.",
        "answers": {"text": ["blue"], "answer_start": [6]},
    }
    columns = {"question_key": "question", "answer_key": "answers.text[0]"}
    assert taken(row, **columns) == chat("Which colour?", "blue")["messages"]
    (asked, _) = taken(row, **columns, user_prompt="{context} {question} {answers.text[0]} {a[0]:}")
    assert asked["content"] == "It is blue. Which colour? blue {a[0]:}"
    with pytest.raises(RowError, match=r"no text under 'answers.text\[1\]'"):
        taken(row, question_key="question", answer_key="answers.text[1]")
    parsed = parse_row(row, choose_translation(ColumnArgs(**columns), "messages"))
    assert parsed.unread == {"context", "answers.answer_start"}


def test_a_named_column_of_preference_data_is_taken_at_its_word() -> None:
    row: dict[str, Any] = {
        "prompt": "2+2?",
        "chosen": "4",
        "rejected": "5",
        "system": "Count.",
        "history": [["1?", "1"]],
    }
    found = taken(row, question_key="prompt", answer_key="chosen", system_prompt="Yours.")
    assert [turn["content"] for turn in found] == ["Count.", "1?", "1", "2+2?", "4"]
    with pytest.raises(RowError, match="preference data"):
        taken(row, question_key="prompt", answer_key="answer")
    pair = {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": "5",
    }
    assert taken(pair, question_key="prompt", answer_key="chosen") == chat("2+2?", "4")["messages"]
    complete = {"prompt": "2+2?", "chosen": chat("2+2?", "4")["messages"], "rejected": []}
    assert taken(complete, question_key="prompt", answer_key="chosen") == chat("2+2?", "4")["messages"]
    with pytest.raises(RowError, match="its label is false"):
        taken({"q": "2+2?", "a": "5", "label": False}, question_key="q", answer_key="a")
    assert taken({"q": "Even?", "label": "true"}, question_key="q", answer_key="label")[1]["content"] == "true"


def test_naming_a_column_selects_questions_and_answers() -> None:
    assert [
        strategy_of(ColumnArgs(**c))
        for c in (
            {},
            {"answer_key": "a"},
            {"question_key": "q"},
            {"user_prompt": "{question}"},
            {"strategy": "Chat"},
        )
    ] == [
        None,
        "QA",
        "QA",
        "QA",
        "Chat",
    ]
    assert strategy_of(ColumnArgs(system_prompt="Count.")) is None
    assert taken({"question": "2+2?", "a": "4"}, answer_key="a") == chat("2+2?", "4")["messages"]


@pytest.mark.parametrize(
    "turns",
    [
        chat("2+2?", "4")["messages"],
        [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
        [{"input": "2+2?", "output": "4"}],
    ],
)
def test_a_chat_takes_turns_of_any_shape_from_its_column(turns: list[Any]) -> None:
    found = taken(
        {"talk": turns}, strategy="Chat", question_key="talk", user_prompt="Q: {question}", system_prompt="Count."
    )
    assert found == chat("Q: 2+2?", "4", system="Count.")["messages"]


def test_a_row_with_a_system_turn_keeps_its_own() -> None:
    row = chat("2+2?", "4", system="Mine.")
    assert taken(row, system_prompt="Yours.") == row["messages"]
    document = to_messages({"text": "4"}, choose_translation(ColumnArgs(system_prompt="Yours."), "text"))
    assert [turn["role"] for turn in document] == ["text"]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"answer_key": "a", "label_key": "b"}, "label_key=b differs from answer_key=a"),
        ({"strategy": "Chat", "answer_key": "a"}, "answer_key is not supported with strategy=Chat"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(columns: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        choose_translation(ColumnArgs(**columns), "messages")


def test_a_chat_without_a_column_is_read_from_messages() -> None:
    found = taken(
        chat("{topic}", "{topic}") | {"topic": "sums"}, strategy="Chat", user_prompt="{topic}: {question}"
    )
    assert found == chat("sums: {topic}", "{topic}")["messages"]


def test_what_stands_beside_a_path_is_named() -> None:
    row = {"data": {"question": "Which?", "hint": "It is blue.", "answer": {"text": ["blue", "azure", "blue"]}}}
    columns = ColumnArgs(question_key="data.question", answer_key="data.answer.text[0]")
    parsed = parse_row(row, choose_translation(columns, "messages"))
    assert parsed.unread == {"data.hint", "data.answer.text[]"}
    assert parse_row(row, choose_translation(ColumnArgs(user_prompt="{data.hint} {data.question}",
        answer_key="data.answer.text[0]"), "messages")).unread == {"data.answer.text[]"}  # fmt: skip


def test_one_named_column_is_enough_where_the_other_has_a_known_name() -> None:
    assert taken({"prompt": "2+2?", "generation": "4"}, answer_key="generation") == chat("2+2?", "4")["messages"]
    assert taken({"ask": "2+2?", "completion": "4"}, question_key="ask") == chat("2+2?", "4")["messages"]
    dialogs = {"dialogs": chat("2+2?", "4", "3+3?", "6")["messages"]}
    assert taken(dialogs, question_key="dialogs") == dialogs["dialogs"]
    cells = {"p": json.dumps(dialogs["dialogs"][:1]), "c": json.dumps(dialogs["dialogs"][1:2])}
    assert taken(cells, question_key="p", answer_key="c") == dialogs["dialogs"][:2]


def test_the_preferred_answers_train_as_the_refusal_says() -> None:
    turns = chat("2+2?", "4")["messages"]
    for row in (
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"conversations": [{"from": "human", "value": "2+2?"}], "chosen": turns[1], "rejected": {**turns[1]}},
        {"chosen": turns, "rejected": turns},
    ):
        assert taken(row, answer_key="chosen") == turns
    assert taken({"messages": turns, "rejected_response": "5"}, question_key="messages") == turns
