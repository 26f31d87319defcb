"""A file none of whose rows can be used is told in one sentence: what it seems to be, and what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from src.errors import DataError
from tests.data.fixtures import Maker
from tests.fixtures import chat, jsonl

pytest_plugins = ["tests.fixtures", "tests.data.fixtures"]

ROWS = [{"prompt": f"{n}+1?", "completion": str(n + 1)} for n in range(30)]
OWN = [{"question": "2+2?", "answer": "4"}, {"question": "3+3?", "answer": "6"}]


def refusal(make: Maker, content: bytes, name: str = "x.jsonl", **settings: Any) -> str:
    path = make.folder / "data" / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        make.read(dataset_pattern="*", on_bad_row="refuse", **settings)
    return str(caught.value).removeprefix(f"{path}: ")


def lines(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def test_rows_of_another_format_name_it(make: Maker) -> None:
    assert refusal(make, lines(ROWS)) == (
        "none of its 30 rows can be used as messages: line 1 has no list of messages; "
        "its rows look like prompt_completion; set data_format=prompt_completion"
    )


def test_rows_of_no_format_name_their_columns(make: Maker) -> None:
    assert refusal(make, lines(OWN)) == (
        "none of its 2 rows can be used as messages: line 1 has no list of messages; "
        "its rows have answer, question; name the columns with question_key and answer_key, or set data_format"
    )


def test_a_column_that_no_row_has_is_told_beside_those_that_they_have(make: Maker) -> None:
    assert refusal(make, lines(OWN), question_key="questoin") == (
        "none of its 2 rows can be used as QA: line 1 has no text under 'questoin'; "
        "its rows have answer, question; name others with question_key and answer_key"
    )


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (json.dumps(ROWS, indent=1).encode(), "make convert turns JSON of many lines into a row a line"),
        (gzip.compress(lines(ROWS)), "it is packed with gzip: name it x.jsonl.gz"),
        (b"no JSON\nat all\n", "fix the rows"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_has_a_remedy(make: Maker, content: bytes, remedy: str) -> None:
    said = refusal(make, content)
    assert said.endswith(f"; {remedy}")
    assert "\n" not in said


def test_rows_that_have_the_shape_and_another_fault_are_not_taken_for_others(make: Maker) -> None:
    rows = [{"messages": [{"role": "user", "content": "2+2?"}]}] * 3
    assert refusal(make, lines([*rows, *OWN])).endswith("line 1 has no assistant turn; fix the rows")  # type: ignore[list-item]


def test_where_nothing_is_left_the_reason_is_told_although_bad_rows_are_skipped(make: Maker) -> None:
    make.file("a.jsonl", OWN)
    with pytest.raises(DataError, match="its rows have answer, question"):
        make.read(on_bad_row="skip")


def test_a_good_file_beside_it_hides_nothing(make: Maker) -> None:
    good = make.file("a.jsonl", [chat("2+2?", "4"), {}])
    path: Path = jsonl(make.folder / "data" / "b.jsonl", OWN)
    with pytest.raises(DataError) as caught:
        make.read(on_bad_row="refuse")
    assert [said.split(" has")[0] for said in caught.value.problems] == [
        f"{path}: none of its 2 rows can be used as messages: line 1", f"{good}:2",
    ]  # fmt: skip
    assert len(make.read(on_bad_row="skip").store) == 1
