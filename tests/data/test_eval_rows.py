"""Evaluation rows: read in every format, and asked as the run asks its training rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow.feather
import pyarrow.parquet
import pytest

from src.data.eval_rows import AS_WRITTEN, Reading, shared_columns
from src.data.loader import read_rows
from src.errors import ConfigError, DataError
from src.schema import ColumnArgs, EvalConfig
from tests.data.fixtures import Maker
from tests.fixtures import chat, jsonl

pytest_plugins = ["tests.fixtures", "tests.data.fixtures"]

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Bern"}}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "4"},
]


def read(folder: Path, *rows: Any, **columns: Any) -> list[list[tuple[str, str]]]:
    turn = columns.pop("reference_turn", None)
    reading = Reading(ColumnArgs(**columns), turn)
    found = read_rows(jsonl(folder / "rows.jsonl", rows), reading=reading)
    return [[(m["role"], m["content"]) for m in row.messages] for row in found]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "completion": "4"},
        {"messages": chat("2+2?", "4")["messages"], "label": 3, "id": "a"},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"question": "2+2?", "answer": "4"},
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
        {"text": "2+2?", "label": "4"},
    ],
)
def test_rows_of_every_format_ask_the_same(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(tmp_path, row) == [[("user", "2+2?"), ("assistant", "4")]]


@pytest.mark.parametrize(
    "name", ["rows.csv", "rows.tsv", "rows.json", "rows.jsonl.gz", "rows.parquet", "rows.arrow", "rows.xlsx"]
)
def test_files_of_every_kind_hold_evaluation_rows(tmp_path: Path, name: str) -> None:
    path, row = tmp_path / name, {"prompt": "2+2?", "completion": "4"}
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(json.dumps(row).encode()))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    elif name.endswith(".arrow"):
        pyarrow.feather.write_feather(pyarrow.Table.from_pylist([row]), path)
    elif name.endswith(".xlsx"):
        book = openpyxl.Workbook()
        for cells in (list(row), list(row.values())):
            book.active.append(cells)
        book.save(path)
    else:
        text = json.dumps([row]) if name.endswith("json") else "prompt;completion\n2+2?;4\n"
        path.write_text(text.replace(";", "," if name.endswith("csv") else "\t"))
    assert [m["content"] for m in read_rows(path)[0].messages] == ["2+2?", "4"]


def test_tools_calls_and_several_turns_are_kept_and_an_earlier_answer_can_be_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"messages": TURNS, "tools": [TOOL]}])
    (row,) = read_rows(path)
    assert len(row.messages) == 5 and row.tools == [TOOL]
    (first,) = read_rows(path, reading=Reading(ColumnArgs(), 1))
    assert first.messages[-1]["tool_calls"] == [CALL] and len(first.messages) == 3
    named = {"messages": TURNS, "reference_turn": "1"}
    assert [len(turns) for turns in read(tmp_path, named, {"messages": TURNS}, reference_turn=-1)] == [3, 5]
    with pytest.raises(DataError) as error:
        read(
            tmp_path,
            named | {"reference_turn": 3},
            named | {"reference_turn": 1.5},
            chat("a", "b"),
            reference_turn=2,
        )
    assert [text.partition("jsonl:")[2] for text in error.value.problems] == [
        "1 has 2 answers, and reference_turn=3 names none of them",
        "2 has a reference_turn that is not a whole number",
        "3 has one answer, and reference_turn=2 names none of them",
    ]
    with pytest.raises(ConfigError, match="reference_turn=0 names no answer"):
        Reading.of(EvalConfig(reference_turn=0))


def test_rows_are_asked_with_the_prompt_template_and_the_system_text_of_the_training(tmp_path: Path) -> None:
    columns = {
        "question_key": "q",
        "answer_key": "a",
        "user_prompt": "Q: {question}",
        "system_prompt": "Be brief.",
    }
    mine, other = {"q": "2+2?", "a": "4"}, {"prompt": "2+2?", "completion": "4"}
    asked = [("system", "Be brief."), ("user", "Q: 2+2?"), ("assistant", "4")]
    assert read(tmp_path, mine, other, **columns) == [asked, asked]
    assert read(tmp_path, other, **(columns | {"user_prompt": "Q: {q}"})) == [asked]
    own = other | {"system": "My own."}
    assert read(tmp_path, own, **columns) == [[("system", "My own."), *asked[1:]]]
    with pytest.raises(DataError, match="has no text under 'topic', which user_prompt names"):
        read(tmp_path, other, user_prompt="{topic}: {question}")
    assert read(tmp_path, other | {"topic": "Sums"}, user_prompt="{topic}: {question}")[0][0][1] == "Sums: 2+2?"


def test_of_several_data_sets_those_columns_count_on_which_they_agree() -> None:
    mapped, plain = ColumnArgs(question_key="q", answer_key="a"), ColumnArgs()
    assert shared_columns([mapped, plain]) == mapped and shared_columns([]) == plain
    assert shared_columns([mapped, ColumnArgs(question_key="x")]) == plain
    brief = ColumnArgs(system_prompt="Be brief.")
    assert shared_columns([brief, brief]) == brief and shared_columns([brief, mapped]) == mapped


def test_training_rows_are_compared_with_evaluation_rows_of_any_format(make: Maker) -> None:
    make.file("rows.jsonl", [{"q": "How many moons?", "a": "Two"}, {"q": "Which sea is this?", "a": "None"}])
    make.held_out([{"q": "How many moons?", "a": "Two."}])
    jsonl(make.folder / "eval" / "hard.jsonl", [{"neither": "column"}])
    columns = {"question_key": "q", "answer_key": "a", "user_prompt": "Q: {question}"}
    report = make.tokens(**columns).report
    assert report["rows_trained"] == 1 and report["contamination"]["exact"] == 1
    assert report["contamination"]["not_compared"] == {str(make.folder / "eval" / "hard.jsonl"): 1}
    fact = "1 evaluation row is unreadable: training rows were compared with the others only"
    assert fact in report["findings"]
    assert make.read(**columns).reading.identity == columns and AS_WRITTEN.identity == {}
