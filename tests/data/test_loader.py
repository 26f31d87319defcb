"""Loading rows: every row is usable or rejected with a reason, for all kinds of files and encodings."""

from __future__ import annotations

import csv
import gzip
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from src.data.loader import read_rows
from src.errors import MAX_LISTED, ConfigError, DataError
from tests.data.fixtures import Maker
from tests.fixtures import chat, jsonl, tree

pytest_plugins = ["tests.fixtures", "tests.data.fixtures"]

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
    put(make, f"{GOOD}\n" + "{}\n" * (MAX_LISTED + 3))
    with pytest.raises(DataError) as caught:
        make.read(on_bad_row="refuse")
    assert len(caught.value.problems) == MAX_LISTED + 1
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
    data = make.read(num_proc=3)
    assert lines(make) == [("a.jsonl", i) for i in range(1, 201) if i != 51]
    assert [r.line for r in data.store.rejected()] == [51]
    assert [(m.row, m.kind, m.line) for m in data.store.matches("duplicates")] == [(149, "exact", 8)]


def test_overlaps_are_reported_of_the_right_rows_in_every_batch(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.data.loader.BATCH", 7)
    held = make.held_out([{"prompt": f"Held {i}?", "completion": "yes"} for i in range(3)])
    rows: list[object] = [chat(f"{i}+1?", str(i + 1)) for i in range(30)]
    rows[2], rows[9], rows[25] = {}, chat("Held 2?", "yes"), chat("held 0?", "no")
    make.file("a.jsonl", rows)
    store = make.read().store
    found = [(store.row(m.row).line, m.kind, m.file, m.line) for m in store.matches("contamination")]
    assert found == [(10, "exact", str(held), 3), (26, "normalised", str(held), 1)]


def test_a_detail_that_quotes_the_row_is_short_and_can_be_written(make: Maker) -> None:
    roles = [
        "x" * 1000,
        "\ud83d",
        "y" * (500 - len("has the unknown role '' (known: system, developer, user, assistant, tool)")),
    ]
    put(
        make,
        GOOD + "\n" + "".join(json.dumps({"messages": [{"role": role, "content": ""}]}) + "\n" for role in roles),
    )
    details = [r.detail for r in make.read().store.rejected()]
    assert details[0] == "has the unknown role '" + "x" * (500 - len("has the unknown role '")) + " ..."
    assert details[1] == "has the unknown role '?' (known: system, developer, user, assistant, tool)"
    assert (len(details[2]), details[2][-1]) == (500, ")")


def test_a_detail_quotes_no_secret(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_0123456789")
    make.file("a.jsonl", [chat("2+2?", "4"), {"messages": [{"role": "hf_canary_0123456789", "content": "4"}]}])
    (rejected,) = make.read().store.rejected()
    assert "'${oc.env:HF_TOKEN}'" in rejected.detail
    assert not [name for name, content in tree(make.folder / "outputs").items() if b"canary" in content]


def test_a_secret_in_a_file_name_is_redacted(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_0123456789")
    make.held_out([{"prompt": "Held out?", "completion": "yes"}], "hf_canary_0123456789")
    make.file("hf_canary_0123456789.jsonl", [chat("2+2?", "4"), chat("2+2?", "4"), chat("Held out?", "yes"), {}])
    store = make.read().store
    assert [len(list(store.matches(what))) for what in ("duplicates", "contamination")] == [1, 1]
    assert not [name for name, content in tree(make.folder / "outputs").items() if b"canary" in content]


def test_the_tools_of_a_row_are_kept_and_looked_through(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "tool-canary")
    tools = [{"type": "function", "function": {"name": "add"}}]
    make.file("a.jsonl", [chat("2+2?", "4") | {"tools": tools}, chat("3+3?", "6") | {"tools": ["tool-canary"]}])
    store = make.read().store
    assert [store.row(i).tools for i in range(len(store))] == [tools]
    assert [(r.line, r.reason) for r in store.rejected()] == [(2, "secret")]


def test_near_duplicates_follow_the_threshold(make: Maker) -> None:
    words = [f"word{i}" for i in range(60)]
    other = [*words[:30], "another", *words[31:]]
    make.held_out([{"prompt": " ".join(words[::-1]), "completion": "4"}])
    make.file("a.jsonl", [chat(" ".join(w), "4") for w in (words, other, other[::-1])])
    for threshold, found in ((0.8, (1, 1)), (0.99, (0, 0))):
        store = make.read(dedup_threshold=threshold).store
        assert tuple(len(list(store.matches(what))) for what in ("duplicates", "contamination")) == found


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_files_without_a_single_row_are_refused(make: Maker, content: str) -> None:
    put(make, content)
    with pytest.raises(DataError, match=r"x\.jsonl: no row to train on"):
        make.read()


def test_evaluation_rows_are_all_read_or_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "test.jsonl", [{"prompt": "2+2?", "completion": "4"}, {"prompt": "3+3?"}])
    with pytest.raises(DataError, match=r"test\.jsonl:2 has no text under 'completion'.*; fix the rows$"):
        read_rows(path, "prompt_completion")
    jsonl(path, [{"prompt": "2+2?", "completion": "4"}])
    assert [row.messages for row in read_rows(path, "prompt_completion")] == [chat("2+2?", "4")["messages"]]
    tools = [{"type": "function"}]
    jsonl(path, [chat("2+2?", "4") | {"tools": tools}, chat("2+2?", "4")])
    assert [(row.line, row.tools) for row in read_rows(path, "messages")] == [(1, tools), (2, None)]


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


def test_auto_detects_and_logs_a_format_for_each_file(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    make.file("a.jsonl", [chat("2+2?", "4")])
    make.file("b.jsonl", [{"instruction": "3+3?", "output": "6"}, chat("2+2?", "4")])
    make.file("c.jsonl", [{"conversations": [{"input": "4+4?", "output": "8"}]}])
    make.file("d.jsonl", [{"text": "5+5=10"}])
    data = make.read(data_format="auto")
    assert [f["format"] for f in data.store.about["files"]] == ["messages", "instruction", "conversations", "text"]
    assert [(r.file.name, r.line, r.reason) for r in data.store.rejected()] == [("b.jsonl", 2, "no_instruction")]


def test_auto_finds_the_format_that_most_rows_have(make: Maker) -> None:
    make.file("a.jsonl", [{"instruction": "3+3?", "output": "6"}, chat("2+2?", "4"), chat("4+4?", "8")])
    make.file("b.jsonl", [*[chat(f"{i}+1?", "4") for i in range(100)], *[{"text": "5+5=10"}] * 101])
    data = make.read(data_format="auto")
    assert [f["format"] for f in data.store.about["files"]] == ["messages", "messages"]  # the first rows only


def test_auto_names_unknown_columns(make: Maker) -> None:
    make.file("a.jsonl", [{"task": "2+2?", "reply": "4"}])
    with pytest.raises(DataError, match=r"none of its 1 row.*its rows have reply, task") as caught:
        make.read(data_format="auto")
    assert "question_key" in str(caught.value)
    assert lines(make, question_key="task", answer_key="reply") == [("a.jsonl", 1)]
    (file,) = make.read(question_key="task", answer_key="reply").store.about["files"]
    assert file["format"] == "QA"
    make.file("a.jsonl", [{f"column{i:02}": "2+2?" for i in range(20)}])
    with pytest.raises(DataError, match=r"its rows have column00, .*, column11; ") as caught:
        make.read(data_format="auto")
    assert "column12" not in str(caught.value)


def test_a_date_in_a_table_is_kept_as_text(make: Maker) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [chat("2+2?", "4") | {"tools": [{"name": "add", "since": date(2024, 2, 29)}]}]
    (make.folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), make.folder / "data" / "a.parquet")
    (row,) = (make.read(dataset_pattern="*").store.row(0),)
    assert row.tools == [{"type": "function", "function": {"name": "add", "since": "2024-02-29"}}]


def test_several_data_sets_are_read_each_in_its_way(make: Maker) -> None:
    first = make.file("one/a.jsonl", [chat("2+2?", "4")])
    make.file("two/b.jsonl", [{"q": "3+3?", "a": "6"}])
    make.file("two/notes.txt", ["no data"])
    entries = [
        {"path": str(first)},
        {"path": str(make.folder / "data" / "two"), "question_key": "q", "answer_key": "a"},
        {
            "path": str(make.file("three.jsonl", [{"prompt": "4+4?", "completion": "8"}])),
            "format": "prompt_completion",
        },
    ]
    data = make.read(datasets=entries)
    found = [data.store.row(i).messages for i in range(len(data.store))]
    assert found == [chat(a, b)["messages"] for a, b in (("2+2?", "4"), ("3+3?", "6"), ("4+4?", "8"))]
    assert data.version == {"sources": [{"type": "local", "weight": 1}] * 3}


def test_a_train_data_config_is_read(make: Maker) -> None:
    path = make.file("a.jsonl", [{"prompt": "2+2?", "completion": "4"}])
    entry = {"data_path": str(path), "strategy": "QA", "question_key": "prompt", "answer_key": "completion"}
    data = make.read(trainDataConfig={"sums": entry})
    assert data.store.row(0).messages == chat("2+2?", "4")["messages"]
    with pytest.raises(ConfigError, match="datasets and trainDataConfig both"):
        make.read(trainDataConfig={"sums": entry}, datasets=[{"path": str(path)}])


# Formats

ROWS = [{"prompt": f"{n}+1?", "completion": str(n + 1)} for n in range(30)]
OWN = [{"task": "2+2?", "reply": "4"}, {"task": "3+3?", "reply": "6"}]


def refusal(make: Maker, content: bytes, name: str = "x.jsonl", **settings: Any) -> str:
    path = make.folder / "data" / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        make.read(dataset_pattern="*", on_bad_row="refuse", **settings)
    return str(caught.value).removeprefix(f"{path}: ")


def jsonl_bytes(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def test_rows_of_another_format_name_it(make: Maker) -> None:
    assert refusal(make, jsonl_bytes(ROWS), data_format="messages") == (
        "none of its 30 rows can be used as messages: line 1 has no list of messages; "
        "its rows look like prompt_completion; set data_format=prompt_completion"
    )


def test_rows_of_no_format_name_their_columns(make: Maker) -> None:
    assert refusal(make, jsonl_bytes(OWN)) == (
        "none of its 2 rows can be used as messages: line 1 has no list of messages; "
        "its rows have reply, task; name the columns with question_key and answer_key, or set data_format"
    )


def test_a_missing_column_is_reported_with_the_existing_ones(make: Maker) -> None:
    assert refusal(make, jsonl_bytes(OWN), question_key="questoin") == (
        "none of its 2 rows can be used as QA: line 1 has no text under 'questoin'; "
        "its rows have reply, task; name others with question_key and answer_key"
    )


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (
            "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
            "make convert turns multi-line JSON into one row a line",
        ),
        (gzip.compress(jsonl_bytes(ROWS), mtime=0), "it is compressed with gzip: name it x.jsonl.gz"),
        (b"no JSON\nat all\n", "fix the rows"),
        (b'{"prompt": "?", "completion": "a", "completion": "b"}', "fix the rows"),
        (b"{'prompt': '2+2?'}", "its rows are written as Python prints them: json.dumps writes JSON"),
        (b'{"prompt": "gr\xfcn"}', "set encoding, which is cp1252 for most files that Excel writes"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_has_a_remedy(make: Maker, content: bytes, remedy: str) -> None:
    said = refusal(make, content)
    assert said.endswith(f"; {remedy}")
    assert "\n" not in said


COLUMNS = "it holds columns, not rows: pandas writes rows with to_json(orient='records')"


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ({"version": 1, "data": ROWS}, "make convert takes the rows out of the object"),
        ({"prompt": {"0": "2+2?"}, "completion": {"0": "4"}}, COLUMNS),
        ({"columns": ["prompt"], "index": [0], "data": [["2+2?"]]}, COLUMNS),
        ({"name": "x", "chat_messages": []}, "make convert turns exports of ChatGPT and Claude into rows"),
        (
            {"question": "2+2?", "answer": {"text": "4"}},
            "name the columns with question_key and answer_key, or set data_format",
        ),
        ({"a1": ROWS[0], "a2": ROWS[1]}, "it holds rows by key: write them as a list, or one a line"),
        ({"dialogs": chat("2+2?", "4")["messages"]}, "set question_key=dialogs, which holds turns"),
        ({"id": 1, "body": chat("2+2?", "4")}, "set question_key=body.messages, which holds turns"),
        ({"messages": chat("2+2?", "4")["messages"][:1]}, "give rows with an answer"),
        (
            chat("2+2?", "4")["messages"],
            "each row is one turn: give a conversation a row, as a list under messages",
        ),
    ],
)
def test_a_file_of_another_layout_names_the_way_to_rows(make: Maker, content: Any, remedy: str) -> None:
    assert refusal(make, json.dumps(content).encode()).endswith(f"; {remedy}")


def test_rows_of_the_format_with_another_fault_are_not_reported_as_misfits(make: Maker) -> None:
    rows = [{"messages": [{"role": "user", "content": "2+2?"}]}] * 3
    assert refusal(make, jsonl_bytes([*rows, *OWN])).endswith(
        "as for reinforcement learning; give rows with an answer"
    )  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
            "is preference data, which is not supported: supervised training would train on the rejected answers "
            "as well (it has chosen, rejected); to train on the preferred answers, name their column with "
            "answer_key (question_key, where it holds the turns with them), or keep the rows whose label is true "
            "and remove that column",
        ),
        (
            {"question": "?", "answers": {"text": ["blue"], "answer_start": [1]}, "id": "7"},
            "has no text under 'completion' or another name of an answer; its rows have answers.text[0], "
            "question, id; name the column of the answer with answer_key; "
            "prompts alone, as for RL, are not supported",
        ),
        (
            {"response": "4"},
            "has no list of messages; its rows have response; name the column of the request with question_key, "
            "or set data_format=text to train on response alone",
        ),
        ({"messages": [{"role": "user", "content": "?"}], "images": ["a.png"]},
         "is about images, audio or video, which are not supported: its text speaks of what the model does not "
         "see (it has images); remove these rows or, where the text stands alone, their media columns"),
    ],
)  # fmt: skip
def test_auto_says_what_a_file_is_and_the_way_out(make: Maker, row: dict[str, Any], said: str) -> None:
    assert refusal(make, jsonl_bytes([row])).partition("line 1 ")[2] == said


def test_if_no_row_is_left_the_reason_is_reported_although_bad_rows_are_skipped(make: Maker) -> None:
    make.file("a.jsonl", OWN)
    with pytest.raises(DataError, match="its rows have reply, task"):
        make.read(on_bad_row="skip")


def test_rows_that_are_too_large_are_not_blamed_on_their_columns(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The format is that of the rows that can be read, and a file is explained by what most of its rows have."""
    monkeypatch.setattr("src.data.readers.json_rows.MAX_ROW_BYTES", 200)
    large, asked = {"prompt": "2+2?", "completion": "x" * 200}, {"prompt": "2+2?"}
    make.file("a.jsonl", [*[large] * 120, {"prompt": "2+2?", "completion": "4"}])
    assert len(make.read(on_bad_row="skip").store) == 1
    for rows, told in (
        (
            [large, large, asked],
            "none of its 3 rows can be read: line 1 has 237 bytes, over 32 MiB; split these rows",
        ),
        ([large, asked, asked], "none of its 3 rows can be used as prompt_completion: line 2 has no text under"),
    ):
        make.file("a.jsonl", rows)
        with pytest.raises(DataError, match=told):
            make.read(on_bad_row="refuse")


def test_a_good_file_beside_it_hides_nothing(make: Maker) -> None:
    good = make.file("a.jsonl", [chat("2+2?", "4"), {}])
    path: Path = jsonl(make.folder / "data" / "b.jsonl", OWN)
    with pytest.raises(DataError) as caught:
        make.read(on_bad_row="refuse")
    assert [said.split(" has")[0] for said in caught.value.problems] == [
        f"{path}: none of its 2 rows can be used as messages: line 1", f"{good}:2",
    ]  # fmt: skip
    assert len(make.read(on_bad_row="skip").store) == 1
