"""Ten thousand rows with seeded faults, from the file to the tokens: each is trained on, or rejected by name."""

from __future__ import annotations

from pathlib import Path

from tests.data.fixtures import Maker
from tests.data.fuzz import BLANK, SHAPES, VALUE, csv_bytes, jsonl_bytes, malformed, malformed_records

pytest_plugins = ["tests.fixtures", "tests.data.fixtures"]

ROWS = 10_000
UNHARMED = {"good", "CRLF", "lone CR", "indented"}  # what is trained on whatever the tokenizer


def put(make: Maker, name: str, content: bytes) -> Path:
    path = make.folder / "data" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_no_row_is_unexplained(make: Maker) -> None:
    each = ROWS // len(SHAPES) + 1
    cases = {shape: malformed(2026, each, [shape]) for shape in SHAPES}
    files = {str(put(make, f"{shape}.jsonl", jsonl_bytes(lines))): lines for shape, lines in cases.items()}
    found = make.tokens(data_format="auto", max_length=4096)
    report = found.report

    lines = {(path, i): case for path, each in files.items() for i, case in enumerate(each, 1)}
    rows = {place: case for place, case in lines.items() if case.outcome != BLANK}
    assert len(lines) >= ROWS
    assert report["rows_in"] == len(rows) == report["rows_trained"] + len(report["rejected"])
    rejected = {(r["file"], r["line"]): r for r in report["rejected"]}
    assert len(rejected) == len(report["rejected"])
    assert rejected.keys() <= rows.keys()
    assert all(r["reason"] and r["detail"] for r in rejected.values())
    unread = {place: case.outcome for place, case in rows.items() if case.outcome != VALUE}
    assert {place: rejected[place]["reason"] for place in unread} == unread
    harmed = [place for place, case in rows.items() if case.what in UNHARMED and place in rejected]
    assert {rejected[place]["detail"] for place in harmed} == set()
    assert report["rows_trained"] > ROWS * 0.4


def test_no_record_of_a_table_is_unexplained(make: Maker) -> None:
    cases = malformed_records(3, 2000)
    put(make, "a.csv", csv_bytes(cases))
    report = make.tokens(dataset_pattern="*.csv", data_format="auto", max_length=4096).report
    rows = [case for case in cases if case.outcome != BLANK]
    text = [len([line for line in case.line.split(b"\n") if line.strip()]) for case in rows]
    assert report["rows_in"] == sum(n if c.outcome == "not_csv" else 1 for n, c in zip(text, rows, strict=True))
    assert report["rows_in"] == report["rows_trained"] + sum(r.get("rows", 1) for r in report["rejected"])
    assert all(r["reason"] and r["detail"] and r["line"] > 1 for r in report["rejected"])
    assert report["rows_trained"] >= sum(case.what == "good" for case in cases)
