"""Rows: none is lost without a word, whatever the files are and however they were saved."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from src.data.loader import read_rows
from src.data.rows import MOST_SHOWN
from src.errors import ConfigError, DataError
from tests.data.ready import Maker
from tests.fixtures import chat, jsonl

pytest_plugins = ["tests.fixtures", "tests.data.ready"]

GOOD = json.dumps(chat("2+2?", "4"))


def put(make: Maker, content: str | bytes, name: str = "x.jsonl") -> Path:
    path = make.folder / "data" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(make: Maker, **settings: Any) -> list[tuple[str, int]]:
    store = make.read(**settings).store
    return [(store.row(i).file.name, store.row(i).line) for i in range(len(store))]


def test_every_bad_row_is_named_by_file_and_line_at_once(make: Maker) -> None:
    first = put(make, f'{GOOD}\n{{"messages": []}}\n{GOOD}\nnot json\n', "a.jsonl")
    second = put(make, f"[]\n{GOOD}\n", "b.jsonl")
    with pytest.raises(DataError) as caught:
        make.read(on_bad_row="refuse")
    assert [problem.split(" (")[0] for problem in caught.value.problems] == [
        f"{first}:2 has no list of messages",
        f"{first}:4 is not JSON: Expecting value at column 1",
        f"{second}:1 is not a JSON object",
    ]
    assert all("data_format=messages" in problem for problem in caught.value.problems)
    assert "on_bad_row=skip" in str(caught.value)


def test_one_bad_row_is_enough_to_refuse(make: Maker) -> None:
    put(make, f"{GOOD}\n{{}}\n{GOOD}\n")
    with pytest.raises(DataError, match=r"x\.jsonl:2 has no list of messages"):
        make.read(on_bad_row="refuse")


def test_when_bad_rows_are_many_the_rest_is_counted(make: Maker) -> None:
    put(make, "{}\n" * (MOST_SHOWN + 3))
    with pytest.raises(DataError) as caught:
        make.read(on_bad_row="refuse")
    assert len(caught.value.problems) == MOST_SHOWN + 1
    assert caught.value.problems[-1] == "... and 3 more"


def test_bad_rows_can_be_skipped_and_are_reported(make: Maker) -> None:
    put(make, f"{GOOD}\n{{}}\n{GOOD}\n{{\n")
    data = make.read()
    assert [data.store.row(i).line for i in range(len(data.store))] == [1, 3]
    assert [(r.line, r.reason) for r in data.store.rejected()] == [(2, "no_messages"), (4, "not_json")]


def test_rows_keep_the_order_of_their_files_and_lines(make: Maker) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        make.file(name, [chat(f"{name} {i}", "4") for i in range(3)])
    assert lines(make) == [(n, i) for n in ("a.jsonl", "b.jsonl") for i in (1, 2, 3)]


def test_many_rows_are_read_by_several_processes_in_order(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.data.loader.SMALL", 0)
    monkeypatch.setattr("src.data.loader.BATCH", 7)
    rows: list[object] = [chat(f"{i}+1?", str(i + 1)) for i in range(200)]
    rows[50], rows[150] = {}, chat("7+1?", "8")
    make.file("a.jsonl", rows)
    data = make.read(data_workers=3)
    assert lines(make) == [("a.jsonl", i) for i in range(1, 201) if i != 51]
    assert [r.line for r in data.store.rejected()] == [51]
    assert [(m.row, m.kind, m.line) for m in data.store.matches("duplicates")] == [(149, "exact", 8)]


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n"])
def test_files_without_a_single_row_are_refused(make: Maker, content: str) -> None:
    put(make, content)
    with pytest.raises(DataError, match=r"x\.jsonl: no row to train on"):
        make.read()


def test_evaluation_rows_are_all_read_or_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "test.jsonl", [{"prompt": "2+2?", "completion": "4"}, {"prompt": "3+3?"}])
    with pytest.raises(DataError, match=r"test\.jsonl:2 has no text under 'completion'"):
        read_rows(path, "prompt_completion")
    jsonl(path, [{"prompt": "2+2?", "completion": "4"}])
    assert [row.messages for row in read_rows(path, "prompt_completion")] == [chat("2+2?", "4")["messages"]]


# --- every kind of file, and every format ---------------------------------------------------------------


def test_the_same_rows_come_out_of_every_kind_of_file(make: Maker) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    rows = [{"prompt": "2+2?", "completion": '4,\n"four"'}, {"prompt": "3+3?", "completion": "6"}]
    plain = "".join(json.dumps(row) + "\n" for row in rows)
    put(make, plain, "a.jsonl")
    put(make, json.dumps(rows, indent=1), "b.json")
    put(make, gzip.compress(plain.encode()), "c.jsonl.gz")
    put(make, zstandard.compress(plain.encode()), "d.jsonl.zst")
    for name, delimiter in (("e.csv", ","), ("f.tsv", "\t")):
        with (make.folder / "data" / name).open("w", newline="") as file:
            table = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), make.folder / "data" / "g.parquet")
    data = make.read(dataset_pattern="*", data_format="auto")
    found: dict[str, list[Any]] = {}
    for i in range(len(data.store)):
        found.setdefault(data.store.row(i).file.name, []).append(data.store.row(i).messages)
    assert len(found) == 7
    assert all(each == [chat(r["prompt"], r["completion"])["messages"] for r in rows] for each in found.values())
    assert {f["format"] for f in data.store.about["files"]} == {"prompt_completion"}


def test_auto_finds_a_format_for_each_file_and_says_which(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    make.file("a.jsonl", [chat("2+2?", "4")])
    make.file("b.jsonl", [{"instruction": "3+3?", "output": "6"}, chat("2+2?", "4")])
    make.file("c.jsonl", [{"conversations": [{"input": "4+4?", "output": "8"}]}])
    make.file("d.jsonl", [{"text": "5+5=10"}])
    data = make.read(data_format="auto")
    assert [f["format"] for f in data.store.about["files"]] == ["messages", "instruction", "conversations", "text"]
    assert [(r.file.name, r.line, r.reason) for r in data.store.rejected()] == [("b.jsonl", 2, "no_instruction")]


def test_auto_tells_the_columns_that_it_does_not_know(make: Maker) -> None:
    make.file("a.jsonl", [{"question": "2+2?", "answer": "4"}])
    with pytest.raises(
        DataError, match="knows none of its first 1 rows: its rows have answer, question"
    ) as caught:
        make.read(data_format="auto")
    assert "question_key" in str(caught.value)
    assert lines(make, question_key="question", answer_key="answer") == [("a.jsonl", 1)]


def test_several_data_sets_are_read_each_in_its_way(make: Maker) -> None:
    first = make.file("one/a.jsonl", [chat("2+2?", "4")])
    make.file("two/b.jsonl", [{"q": "3+3?", "a": "6"}])
    make.file("two/notes.txt", ["no data"])
    entries = [
        {"path": str(first)},
        {"path": str(make.folder / "data" / "two"), "question_key": "q", "answer_key": "a"},
    ]
    data = make.read(datasets=entries)
    found = [data.store.row(i).messages for i in range(len(data.store))]
    assert found == [chat(a, b)["messages"] for a, b in (("2+2?", "4"), ("3+3?", "6"))]
    assert data.version == {"sources": [{"type": "local", "weight": 1}] * 2}


def test_a_train_data_config_is_read(make: Maker) -> None:
    path = make.file("a.jsonl", [{"prompt": "2+2?", "completion": "4"}])
    entry = {"data_path": str(path), "strategy": "QA", "question_key": "prompt", "answer_key": "completion"}
    data = make.read(trainDataConfig={"sums": entry})
    assert data.store.row(0).messages == chat("2+2?", "4")["messages"]
    with pytest.raises(ConfigError, match="datasets and trainDataConfig both"):
        make.read(trainDataConfig={"sums": entry}, datasets=[{"path": str(path)}])
