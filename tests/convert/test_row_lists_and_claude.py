"""`make convert`: rows inside an object, and Claude exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from src.convert.files import ConversionResult, convert_file

TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
ROW = {"prompt": "2+2?", "completion": "4"}


def convert(folder: Path, content: str | object, name: str = "x.json") -> tuple[ConversionResult, list[Any]]:
    """The result, and the rows that were written."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    result = convert_file(path)
    written = path.with_suffix(".jsonl")
    lines = written.read_text(encoding="utf-8").splitlines() if result.status != "refused" else []
    return result, [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("wrapped", "rows", "note"),
    [
        ({"version": "1.1", "data": [ROW, ROW]}, [ROW, ROW], "; the rows of data; left out: version"),
        ({"questions": [ROW]}, [ROW], "; the rows of questions"),  # by the columns of its rows
        ({"features": [], "rows": [{"row_idx": 0, "row": ROW}]}, [ROW], "; the rows of rows; left out: features"),
        ({"conversations": [{"messages": TURNS}]}, [{"messages": TURNS}], "; the rows of conversations"),
        ({"messages": TURNS}, [{"messages": TURNS}], ""),
        ({"conversations": [{"input": "2+2?", "output": "4"}]},) * 2 + ("",),
        ({"question": "2+2?", "sources": [{"text": "a page"}]},) * 2 + ("",),
    ],
)
def test_the_rows_inside_an_object_are_unwrapped(tmp_path: Path, wrapped: Any, rows: Any, note: str) -> None:
    result, written = convert(tmp_path, wrapped)
    rows = rows if isinstance(rows, list) else [rows]
    assert (result.status, written) == ("converted", rows)
    assert result.detail.partition("x.jsonl")[2] == note
    assert convert_file(result.path).status == "up to date"


def test_numbers_of_unwrapped_rows_keep_their_text(tmp_path: Path) -> None:
    convert(tmp_path, '{"data": [\n {"n": 1.10,\n  "m": 1e400}]}')
    assert (tmp_path / "x.jsonl").read_text() == '{"n": 1.10, "m": 1e400}\n'


def test_an_object_in_a_jsonl_file_is_unwrapped_too(tmp_path: Path) -> None:
    result, written = convert(tmp_path, {"data": [ROW]}, "x.jsonl")
    assert (result.status, written) == ("converted", [ROW])
    assert json.loads((tmp_path / "x.jsonl.orig").read_text()) == {"data": [ROW]}


def test_several_lists_in_one_object_are_refused(tmp_path: Path) -> None:
    result, _ = convert(tmp_path, {"train": [ROW], "test": [ROW]})
    assert result.status == "refused"
    assert result.detail.startswith(":1: the object holds several lists of rows: train, test. Put each list into")


# Claude exports


def message(name: str, sender: str, text: str, parent: str | None = None, **more: Any) -> dict[str, Any]:
    return {"uuid": name, "sender": sender, "text": text, "parent_message_uuid": parent, **more}


def claude(*messages: dict[str, Any], name: str = "A talk") -> dict[str, Any]:
    return {"uuid": "c", "name": name, "account": {}, "chat_messages": list(messages)}


def test_a_claude_conversation_becomes_a_row(tmp_path: Path) -> None:
    parts = [
        {"type": "thinking", "thinking": "Hm."},
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "name": "search"},
        {"type": "tool_result", "content": []},
        {"type": "text", "text": "It is 4."},
    ]
    pasted = [{"file_name": "paste.txt", "extracted_content": "A long text."}]
    question = message("1", "human", "Read this.", attachments=pasted, files=[{"file_name": "photo.png"}])
    answer = message("2", "assistant", "Let me look.\n(not supported)\nIt is 4.", content=parts)
    result, rows = convert(tmp_path, [claude(question, answer), claude(message("1", "human", "Hello?"))])
    turns = [("user", "Read this.\n\nA long text."), ("assistant", "Let me look.\n\nIt is 4.")]
    assert rows == [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    left_out = "1 attached file, 1 thought, 1 tool call, 1 tool message, 1 unanswered user message"
    assert f'; left out: {left_out}\n  no row from "A talk": no visible text from the assistant' in str(result)


def test_each_version_of_a_claude_answer_is_a_row(tmp_path: Path) -> None:
    ask = message("q", "human", "2+2?", "00000000-0000-4000-8000-000000000000")
    _, rows = convert(
        tmp_path, claude(ask, message("a", "assistant", "5", "q"), message("b", "assistant", "4", "q"))
    )
    assert [[turn["content"] for turn in row["messages"]] for row in rows] == [["2+2?", "5"], ["2+2?", "4"]]


def test_claude_conversations_and_other_objects_in_one_file_are_refused(tmp_path: Path) -> None:
    result, _ = convert(tmp_path, [claude(message("q", "human", "Hello?")), ROW])
    assert "this object is not a Claude conversation, while others in the file are" in result.detail
