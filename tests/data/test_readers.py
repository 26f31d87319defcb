"""Data files: every row is read or reported with its position, and none is read in part."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from src.convert.json_text import read_json_values
from src.data.formats import RowError
from src.data.readers import READERS, file_kind, is_data_file, json_rows, read_values
from src.data.readers.stream import MAX_ROW_BYTES
from src.errors import DataError
from tests.data import fuzz

ROWS = [{"prompt": "2+2?", "completion": "4"}, {"prompt": 'a "b",\nc\té🔥', "completion": ""}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
REST = "; the rest of the file could not be read"
REST_FROM = "and the rest of the file ({} rows) could not be read: {}"
MIB = 1 << 20


def read(path: Path) -> list[tuple[int, Any]]:
    """What `read_values` gives, a RowError as `(reason, detail)`."""
    return [(n, (v.reason, v.detail) if isinstance(v, RowError) else v) for n, v in read_values(path)]


def read_bytes(folder: Path, name: str, data: bytes) -> list[tuple[int, Any]]:
    path = folder / name
    path.write_bytes(data)
    return read(path)


def refusal(folder: Path, name: str, data: bytes) -> str:
    """The sentence of the DataError, behind the file's name."""
    with pytest.raises(DataError) as refused:
        read_bytes(folder, name, data)
    assert str(refused.value).startswith(str(folder / name))
    assert refused.value.hint
    return str(refused.value).removeprefix(str(folder / name))


def peak(path: Path) -> int:
    """The most memory that Python held at once while it read the file, in bytes."""
    tracemalloc.start()
    for _ in read_values(path):
        pass
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held


def delimited(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def parquet(rows: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file.getvalue()


PLAIN = {
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": delimited(","),
    ".tsv": delimited("\t"),
}
PLACES = {".json": [2, 6], ".csv": [2, 3], ".tsv": [2, 3]}
PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}

# Kinds


def test_every_kind_of_file_is_tested_here_or_in_test_files_of_people() -> None:
    assert {*PLAIN, ".parquet", ".arrow", ".feather", ".xlsx", ".txt"} == set(READERS)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("packed", ["", *PACK])
def test_the_same_rows_are_read_from_every_kind(tmp_path: Path, kind: str, packed: str) -> None:
    data = PACK[packed](PLAIN[kind]) if packed else PLAIN[kind]
    want = list(zip(PLACES.get(kind, [1, 2]), ROWS, strict=True))
    assert read_bytes(tmp_path, f"x{kind}{packed}", data) == want
    assert read_bytes(tmp_path, f"X.Y{kind}{packed}".upper(), data) == want


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_null_that_arrow_filled_into_a_struct_is_left_out(tmp_path: Path, kind: str) -> None:
    rows = [
        {"call": {"arguments": {"city": "Oslo", "days": [{"from": 1}]}}, "a": None},
        {"call": {"arguments": {"x": 2}}},
    ]
    table = pyarrow.Table.from_pylist(rows)
    assert table.to_pylist()[1]["call"]["arguments"]["city"] is None
    file = io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    found = [value for _, value in read_bytes(tmp_path, f"x.{kind}", file.getvalue())]
    assert found == [rows[0], {**rows[1], "a": None}]


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "x.parquet", parquet(ROWS)) == [(1, ROWS[0]), (2, ROWS[1])]


@pytest.mark.parametrize("packed", ["", *PACK])
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("content", [b"", codecs.BOM_UTF8, b"\r\n \n"])
def test_an_empty_file_has_no_row(tmp_path: Path, kind: str, packed: str, content: bytes) -> None:
    assert read_bytes(tmp_path, f"x{kind}{packed}", PACK[packed](content) if packed else content) == []


@pytest.mark.parametrize("name", ["x.dat", "x", "x.gz", ".jsonl", "jsonl", "x.gz.jsonl.old"])
def test_an_unknown_kind_is_refused_with_the_known_ones(name: str) -> None:
    assert not is_data_file(Path(name))
    with pytest.raises(
        DataError, match=r"unsupported extension; supported are \.jsonl, .*\.parquet, .* \.gz or \.zst"
    ):
        next(read_values(Path(name)))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("x.xls", "save it as .xlsx or .csv"),
        ("x.jsonl.bz2", "unpack it, or compress it as .gz or .zst"),
        ("x.zip", "unpack it"),
        ("x.pkl", "write its rows to .jsonl: a pickle can run any code"),
        ("x.PDF", "save its text as .txt or .jsonl"),
    ],
)
def test_kinds_that_people_have_instead_are_refused_with_the_way_out(name: str, remedy: str) -> None:
    with pytest.raises(DataError) as refused:
        file_kind(Path(name))
    assert refused.value.hint == remedy


def test_the_kind_follows_from_the_name() -> None:
    assert [file_kind(Path(n)) for n in ("a.b/x.JSONL.gz", "x.v2.csv", "x.tsv.ZST")] == [".jsonl", ".csv", ".tsv"]
    assert is_data_file(Path("x.json.gz")) and not is_data_file(Path("x.parquet.gz"))
    with pytest.raises(DataError, match=r"compressed twice.*; unpack it to x\.parquet"):
        file_kind(Path("x.parquet.gz"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv.gz", "x.parquet"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(DataError, match="cannot be read: No such file or directory"):
        read(path)
    path.mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(DataError, match="is not a regular file"):
        read(path)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jsonl").touch(mode=0)
    if os.access(tmp_path / "x.jsonl", os.R_OK):  # root reads everything

        def denied(self: Path, *how: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read(tmp_path / "x.jsonl")


def test_a_file_is_closed_when_reading_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    original: Any = Path.open

    def opening(self: Path, *how: Any) -> Any:
        opened.append(original(self, *how))
        return opened[-1]

    for name, data in {"x.jsonl": JSONL, "x.jsonl.gz": gzip.compress(JSONL), "x.parquet": parquet(ROWS)}.items():
        (tmp_path / name).write_bytes(data)
        monkeypatch.setattr(Path, "open", opening)
        values = read_values(tmp_path / name)
        next(values)
        values.close()  # type: ignore[attr-defined]
        monkeypatch.undo()
    assert [file.closed for file in opened] == [True] * 3


def test_importing_the_readers_is_cheap() -> None:
    script = "import sys, src.data.readers; print({'pyarrow', 'zstandard', 'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# JSON Lines

BAD_LINES = {
    b'{"a": ': ("not_json", "is not JSON: Expecting value at column 6"),
    b'{"a": 1} x\r': ("not_json", "is not JSON: Extra data at column 10"),
    b'{"a": 1}\r{"a": 1}': ("not_json", "is not JSON: Extra data at column 10"),
    b'{"a\0": 1}': ("not_json", "is not JSON: Invalid control character at at column 4"),
    b"[" * 100_000: ("not_json", "is not JSON that can be read: nested too deeply"),
    b'{"a": [NaN]}': ("not_json", "is not JSON: it has the number NaN, which JSON does not allow"),
    b"-Infinity": ("not_json", "is not JSON: it has the number -Infinity, which JSON does not allow"),
    codecs.BOM_UTF8 + b"{}": (
        "not_json",
        "is not JSON: it starts with a byte order mark, which only a file may do",
    ),
    b'{"a": "\xff"}': ("not_utf8", "is not UTF-8 at byte 8"),
    b'{"a": 1, "b": 2, "b": 3}': ("duplicate_key", 'has the key "b" twice'),
    rb'[{"x": [{"\u0061": 1, "a": 1}]}]': ("duplicate_key", 'has the key "a" twice'),
}


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.items(), ids=[str(line[:30]) for line in BAD_LINES])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_bad_line_is_named_and_the_others_are_read(
    tmp_path: Path, line: bytes, problem: tuple[str, str], end: bytes
) -> None:
    data = end.join([b'{"n": 1}', b"", line, b'{"n": 2}'])
    assert read_bytes(tmp_path, "x.jsonl", data) == [(1, {"n": 1}), (3, problem), (4, {"n": 2})]


GOOD_LINES = {
    rb'"\ud800 \u0000"': "\ud800 \x00",
    '"\u2028\x7f\ufeff"'.encode(): "\u2028\x7f\ufeff",
    b'{"a":\r1}\r\r': {"a": 1},
    b"9" * 5000: Decimal("9" * 5000),
    b"-17": -17,
    b"null": None,
    b'{"a": 1, "b": {"a": 1}}': {"a": 1, "b": {"a": 1}},
}


@pytest.mark.parametrize("line", GOOD_LINES, ids=[str(line[:20]) for line in GOOD_LINES])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_what_json_allows_is_read(tmp_path: Path, name: str, line: bytes) -> None:
    assert read_bytes(tmp_path, name, codecs.BOM_UTF8 + line + b"\n\n" + line) == [
        (1, GOOD_LINES[line]),
        (3, GOOD_LINES[line]),
    ]


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_text_with_another_byte_order_mark_is_read(tmp_path: Path, kind: str, encoding: str) -> None:
    text = ("" if encoding in ("utf-16", "utf-32") else "\ufeff") + PLAIN[kind].decode()
    assert [row for _, row in read_bytes(tmp_path, f"x{kind}", text.encode(encoding))] == ROWS
    cut = refusal(tmp_path, f"x{kind}", text.encode(encoding)[:-1])
    assert re.match(r" is not utf-\d+ text on line \d+; correct encoding, or the file", cut)


def test_a_row_that_is_too_large_is_named_and_not_held(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(b"1\n")
        for _ in range(150):
            file.write(b"x" * MIB)
        file.write(b"x\n2")
    assert read(path) == [(1, 1), (2, ("too_large", "has 157,286,402 bytes, over 32 MiB")), (3, 2)]
    assert peak(path) < 2.5 * MAX_ROW_BYTES


def test_a_row_may_be_as_large_as_the_limit(tmp_path: Path) -> None:
    line = b'"' + b"x" * (MAX_ROW_BYTES - 3) + b'"\n'
    (_, value), (second, problem), (third, last) = read_bytes(tmp_path, "x.jsonl", line + b" " + line + b"1")
    assert (len(value), second, problem[0], third, last) == (MAX_ROW_BYTES - 3, 2, "too_large", 3, 1)


# JSON

ARRAY = b'[{"a": 1},\n\n {"a": 2, "a": %d}, {"a": NaN},\n{"a": "\xff"}, {"a": 4}\n]\n'
ARRAY = ARRAY.replace(b"%d", b"9" * 5000)


def test_a_bad_row_of_an_array_costs_no_other(tmp_path: Path) -> None:
    values = read_bytes(tmp_path, "x.json", ARRAY)
    assert [(n, v[0] if isinstance(v, tuple) else v) for n, v in values] == [
        (1, {"a": 1}),
        (3, "duplicate_key"),
        (3, "not_json"),
        (4, "not_utf8"),
        (4, {"a": 4}),
    ]


def test_one_object_is_one_row_whatever_it_holds(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "x.json", b'\n{"data": [{"a": 1}]}') == [(2, {"data": [{"a": 1}]})]
    assert read_bytes(tmp_path, "x.json", b"{}\n\n{} {}") == [(1, {}), (3, {}), (3, {})]
    assert read_bytes(tmp_path, "x.json", b"[{}, {},\n{}]") == [(1, {}), (2, {}), (3, {})]  # by number
    assert read_bytes(tmp_path, "x.json", b"[ ]") == []


BROKEN = {
    b'[{"a": 1}\n {"b": 2}]': (2, "Expecting ',' delimiter at line 2, column 2"),
    b'[{"a": 1}': (1, "Expecting ',' delimiter at line 1, column 10"),
    b'[{"a": 1},\n,]': (2, "Expecting value at line 2, column 1"),
    b'[{"a": 1},\n{"b":\n  "c': (2, "Unterminated string starting at at line 3, column 3"),
    b'[{"a": 1}] \n{}': (2, "Extra data after the array at line 2, column 1"),
    b'{"a": 1}\n\n{"b" 2}': (3, "Expecting ':' delimiter at line 3, column 6"),
    b'{"a": 1},, {}': (1, "Expecting value at line 1, column 10"),
}


@pytest.mark.parametrize("piece", [1, 5, MIB])
@pytest.mark.parametrize("source", BROKEN, ids=str)
def test_a_syntax_error_ends_a_json_file_with_its_place(
    tmp_path: Path, source: bytes, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", piece)
    line, problem = BROKEN[source]
    assert read_bytes(tmp_path, "x.json", source) == [
        (1, {"a": 1}),
        (line, ("rest_of_file", f"is not JSON: {problem}{REST}")),
    ]


def test_rows_behind_a_break_are_counted_by_the_first_keys_of_the_rows_before_it(tmp_path: Path) -> None:
    good = b'{"a": [{"c": 1}, {"c": 2}], "b": 1}, {"b": 1, "a": []}'
    *_, rest = read_bytes(tmp_path, "x.json", b"[" + good + b', {"a" 1}, ' + good + b", " + good + b"]")
    assert rest[1][0] == "rest_of_file" and "(4 rows)" in rest[1][1]


@pytest.mark.parametrize("source", [b"[" * 100_000, b'{"a": 1, "a": ' + b"[" * 100_000])
def test_deep_nesting_ends_a_json_file(tmp_path: Path, source: bytes) -> None:
    problem = ("not_json", f"is not JSON that can be read: nested too deeply{REST}")
    assert read_bytes(tmp_path, "x.json", b"1\n" + source) == [(1, 1), (2, problem)]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_a_json_file_reads_the_same_in_any_pieces(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_bytes(tmp_path, "x.json", ARRAY)
    numbers = '12 -3.25 1e5 2E+3 -0.5e-1 true "\\ud83d\\udd25é🔥" null 1.5\n[1.5e+2, 17]\n{"é": [1]} 123'
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", piece)
    assert read(tmp_path / "x.json") == whole
    want = [(number, value.value) for number, value in enumerate(read_json_values(numbers), 1)]
    assert read_bytes(tmp_path, "x.json", numbers.encode()) == want


def test_a_long_array_is_not_held(tmp_path: Path) -> None:
    row = b'{"text": "' + b"x" * 1000 + b'"}'
    (tmp_path / "x.json").write_bytes(b"[" + b", ".join([row] * 16_000) + b"}]")
    values = read(tmp_path / "x.json")
    assert len(values) == 16_001
    assert values[-1][1][1].startswith(f"is not JSON: Expecting ',' delimiter at line 1, column {16_000 * 1014}")
    assert peak(tmp_path / "x.json") < 8 * MIB


def test_a_value_that_is_too_large_is_named(tmp_path: Path) -> None:
    row = b'"' + b"x" * MAX_ROW_BYTES + b'"'
    assert read_bytes(tmp_path, "x.json", b"[1,\n" + row + b", 2]") == [
        (1, 1),
        (2, ("too_large", "has 33,554,434 bytes, over 32 MiB")),
        (2, 2),
    ]
    early = ("not_json", f"is not JSON: Expecting ':' delimiter at line 2, column 6{REST}")
    assert read_bytes(tmp_path, "x.json", b'1\n{"a" 1' + row) == [(1, 1), (2, early)]
    problem = ("too_large", f"has over 32 MiB{REST}")
    assert read_bytes(tmp_path, "x.json", b"1\n" + row[:-1] + b" " * 40 * MIB) == [(1, 1), (2, problem)]


# CSV and TSV


def table(text: str) -> bytes:
    """A CSV file of two columns, a and b."""
    return f"a,b\n{text}".encode("utf-8", "surrogateescape")


RECORDS: dict[str, list[tuple[int, Any]]] = {
    "1,2\r\n\r\n  \n3,4": [(2, ["1", "2"]), (5, ["3", "4"])],
    '"x\n\ny","é, ""z"""\n1,2\n': [(2, ["x\n\ny", 'é, "z"']), (5, ["1", "2"])],
    ',\n"",\n 5" pipe , x\n': [(4, [' 5" pipe ', " x"])],
    '1\n1,2,3\n"1\n2"\n1,2\n': [
        (2, ("wrong_columns", "has 1 field, the header has 2")),
        (3, ("wrong_columns", "has 3 fields, the header has 2")),
        (4, ("wrong_columns", "has 1 field, the header has 2")),
        (6, ["1", "2"]),
    ],
    '"a"x,"\nb,c\n"\n1,2\n': [
        (2, ("not_csv", "is not CSV: ',' expected after '\"'; lines 2 to 4 could not be read")),
        (5, ["1", "2"]),
    ],
    'a\rb,"\n"\n1,2\n': [
        (
            2,
            (
                "not_csv",
                "is not CSV: a line ends with CR alone; save it as CSV UTF-8; lines 2 to 3 could not be read",
            ),
        ),
        (4, ["1", "2"]),
    ],
    '1,2\n"3,4\n5,6\n7,8': [
        (2, ["1", "2"]),
        (3, ("not_csv", f"is not CSV: it opens a quote that is never closed{REST}")),
        (4, ("rest_of_file", REST_FROM.format(2, "line 3 is not CSV: it opens a quote that is never closed"))),
    ],
    '1,2\n3,"4': [(2, ["1", "2"]), (3, ("not_csv", "is not CSV: it opens a quote that is never closed"))],
    "1\0,2\n1,2": [(2, ("not_csv", "is not CSV: it has a NUL character on line 2")), (3, ["1", "2"])],
    '1,2\n"3\n\udcff",4\n5,6': [
        (2, ["1", "2"]),
        (3, ("not_utf8", "is not UTF-8 at byte 1 of line 4; lines 3 to 4 could not be read")),
        (5, ["5", "6"]),
    ],
}


@pytest.mark.parametrize("text", RECORDS, ids=ascii)
@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8])
def test_records_of_a_csv_file(tmp_path: Path, text: str, start: bytes) -> None:
    want = [(n, dict(zip("ab", v, strict=True)) if isinstance(v, list) else v) for n, v in RECORDS[text]]
    assert read_bytes(tmp_path, "x.csv", start + table(text)) == want


@pytest.mark.parametrize(
    ("header", "problems"),
    [
        (b",,", [":1 names no column"]),
        (b"\n , \t", [":2 names no column"]),
        (b"a,b,a,b,c", [":1 names the column 'a' twice", ":1 names the column 'b' twice"]),
        (b'"a"b,c', [":1 is not a header: it is not CSV: ',' expected after '\"'"]),
        (b"a,\xff", [":1 is not a header: it is not UTF-8 at byte 3 of line 1"]),
        (
            b"a,b\r1,2\r3,4\r",
            [":1 is not a header: it is not CSV: a line ends with CR alone; save it as CSV UTF-8"],
        ),
    ],
)
def test_a_header_that_names_no_columns_is_refused(tmp_path: Path, header: bytes, problems: list[str]) -> None:
    (tmp_path / "x.csv").write_bytes(header + b"\n1,2,3\n")
    with pytest.raises(DataError) as refused:
        read(tmp_path / "x.csv")
    assert list(refused.value.problems) == [f"{tmp_path / 'x.csv'}{problem}" for problem in problems]
    assert ("set encoding" if b"\xff" in header else "in the first row") in refused.value.hint


def test_a_field_may_be_longer_than_csv_allows_by_itself(tmp_path: Path) -> None:
    csv.field_size_limit(1000)
    assert read_bytes(tmp_path, "x.tsv", b"a\tb\n" + b"x" * MIB + b"\ty") == [(2, {"a": "x" * MIB, "b": "y"})]


def test_a_record_of_empty_fields_is_no_row(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "x.tsv", b"a\tb\n\t\n \n\t\n1\t\n") == [(5, {"a": "1", "b": ""})]
    assert read_bytes(tmp_path, "x.csv", b"a;b\n1;2\n;\n;;;\n3;4\n") == [(2, ROW12), (5, {"a": "3", "b": "4"})]


def test_cr_alone_may_end_all_lines(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "x.csv", b'a,b\r1,2\r"3\r",4') == [(2, ROW12), (3, {"a": "3\n", "b": "4"})]


ROW12 = {"a": "1", "b": "2"}
HUGE = b"x" * (MAX_ROW_BYTES + 1)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (HUGE, "has 33,554,434 bytes, over 32 MiB"),
        (b'"' + HUGE + b'""\n\n",1', "has 33,554,442 bytes, over 32 MiB; lines 3 to 5 could not be read"),
        (b'"\n' + HUGE + b'\n"', "has 33,554,438 bytes, over 32 MiB; lines 3 to 5 could not be read"),
        (b'"\n"",\n' + HUGE + HUGE + b'\n"', "has 67,108,875 bytes, over 32 MiB; lines 3 to 6 could not be read"),
    ],
    ids=["a line", "a quoted field", "a line in quotes", "two pieces"],
)
def test_a_record_that_is_too_large_is_skipped_to_its_end(tmp_path: Path, record: bytes, problem: str) -> None:
    values = read_bytes(tmp_path, "x.csv", b"a,b\n1,2\n" + record + b"\n3,4\n")
    after = 4 + record.count(b"\n")
    assert values == [(2, {"a": "1", "b": "2"}), (3, ("too_large", problem)), (after, {"a": "3", "b": "4"})]


def test_a_quote_that_is_never_closed_is_not_held(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b'a,b\n1,"2\n' + (b"x" * 999 + b"\n") * 60_000)
    (line, (reason, detail)), rest = read(tmp_path / "x.csv")
    assert (line, reason, detail) == (2, "too_large", f"has 60,000,005 bytes, over 32 MiB{REST}")
    assert rest == (3, ("rest_of_file", REST_FROM.format("60,000", "line 2 has 60,000,005 bytes, over 32 MiB")))
    assert peak(tmp_path / "x.csv") < 6 * MAX_ROW_BYTES  # csv.reader holds four bytes a character


# Parquet


def test_parquet_values_become_those_of_python(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "é🔥"}], "score": 0.5, "tags": ["a", None], "meta": {"n": 1}},
        {"messages": None, "score": math.nan, "tags": [], "meta": None},
    ]
    (_, first), (_, second) = read_bytes(tmp_path, "x.parquet", parquet(rows))
    assert first == rows[0]
    assert math.isnan(second.pop("score"))
    assert second == {"messages": None, "tags": [], "meta": None}


def test_rows_are_numbered_through_all_row_groups(tmp_path: Path) -> None:
    rows = [{"n": n} for n in range(2500)]
    assert read_bytes(tmp_path, "x.parquet", parquet(rows, row_group_size=1100)) == list(enumerate(rows, 1))
    assert read_bytes(tmp_path, "x.parquet", parquet(rows[:0])) == []


def test_large_rows_of_parquet_are_not_decoded_all_at_once(tmp_path: Path) -> None:
    rows = [{"text": f"{n}" + "x" * MIB} for n in range(64)]
    (tmp_path / "x.parquet").write_bytes(parquet(rows, use_dictionary=False))
    assert len(read(tmp_path / "x.parquet")) == 64
    assert peak(tmp_path / "x.parquet") < 24 * MIB


def test_a_parquet_row_that_cannot_be_read_costs_no_other(tmp_path: Path) -> None:
    texts = pyarrow.array([b"good", b"\xff", b"again"]).cast(pyarrow.string(), safe=False)
    dates = pyarrow.array([1, 1, 10**12]).cast(pyarrow.timestamp("s"))
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "at": dates}), file)
    first, second, third = read_bytes(tmp_path, "x.parquet", file.getvalue())
    assert (first[0], first[1]["text"]) == (1, "good")
    assert second == (2, ("not_utf8", "has text that is not UTF-8"))
    assert (third[0], third[1][0]) == (3, "not_python")
    assert third[1][1].startswith("has a value that cannot be read: ")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    one = pyarrow.array([1])
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([one, one, one], ["a", "b", "a"]), file)
    message = refusal(tmp_path, "x.parquet", file.getvalue())
    assert message == " names the column 'a' twice; rename one of them"


@pytest.mark.parametrize("data", [b"", b"PAR1", JSONL, parquet(ROWS)[:-1], parquet(ROWS)[1:]])
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, data: bytes) -> None:
    assert refusal(tmp_path, "x.parquet", data).startswith(" is truncated or corrupt before its first row: ")


def test_a_damaged_page_is_found_by_its_checksum(tmp_path: Path) -> None:
    rows = [{"n": n} for n in range(3000)]
    data = parquet(rows, row_group_size=1000, write_page_checksum=True, compression="none", use_dictionary=False)
    place = data.index((2500).to_bytes(8, "little"))
    message = refusal(tmp_path, "x.parquet", data[:place] + b"\xff" + data[place + 1 :])
    assert message.startswith(" is truncated or corrupt after row 1024: ")


# Archives


@pytest.mark.parametrize("packed", PACK)
def test_an_archive_of_several_members_is_read_to_its_end(tmp_path: Path, packed: str) -> None:
    pack = PACK[packed]
    data = pack(JSONL[:20]) + pack(b"") + pack(JSONL[20:]) + pack(b"17")
    assert [v for _, v in read_bytes(tmp_path, f"x.jsonl{packed}", data)] == [*ROWS, 17]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_truncated_archive_is_never_read_as_complete(tmp_path: Path, packed: str, kind: str) -> None:
    pack = PACK[packed]
    first, second = pack(PLAIN[kind] + b"\n"), pack(PLAIN[kind][:-1])
    for length in {*range(len(first) + len(second))} - {len(first)}:
        message = refusal(tmp_path, f"x{kind}{packed}", (first + second)[:length])
        assert message.startswith(" is truncated or corrupt ")


@pytest.mark.parametrize("packed", PACK)
def test_rows_before_the_damage_come_first_and_are_counted(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"x.jsonl{packed}"
    rows = [{"n": n, "text": Random(n).randbytes(50).hex()} for n in range(10_000)]
    data = PACK[packed]("".join(json.dumps(row) + "\n" for row in rows).encode())
    path.write_bytes(data[: len(data) // 2])
    values = read_values(path)
    got: list[object] = []
    with pytest.raises(DataError) as refused:
        got.extend(values)
    match = re.search(r"is truncated or corrupt after row (\d+): the archive is truncated", str(refused.value))
    assert match and 1000 < int(match[1]) < 9000
    assert [v for _, v in read_until_damage(path)] == rows[: int(match[1])]


def read_until_damage(path: Path) -> Iterator[tuple[int, object]]:
    try:
        yield from read_values(path)
    except DataError:
        return


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("change", ["text", "garbage behind", "a changed byte"])
def test_an_archive_with_other_bytes_is_refused(tmp_path: Path, packed: str, change: str) -> None:
    checked = zstandard.ZstdCompressor(write_checksum=True).compress
    data = gzip.compress(JSONL) if packed == ".gz" else checked(JSONL)
    changed = bytes([*data[:30], data[30] ^ 1, *data[31:]])
    damaged = {"text": JSONL, "garbage behind": data + b"garbage", "a changed byte": changed}[change]
    assert refusal(tmp_path, f"x.jsonl{packed}", damaged).startswith(" is truncated or corrupt ")


@pytest.mark.parametrize("packed", PACK)
def test_an_archive_of_one_enormous_row_is_not_held(tmp_path: Path, packed: str) -> None:
    block = PACK[packed](b"x" * 50 * MIB)
    (tmp_path / f"x.jsonl{packed}").write_bytes(block * 4 + PACK[packed](b"\n1"))
    assert read(tmp_path / f"x.jsonl{packed}") == [
        (1, ("too_large", "has 209,715,201 bytes, over 32 MiB")),
        (2, 1),
    ]
    assert peak(tmp_path / f"x.jsonl{packed}") < 3.5 * MAX_ROW_BYTES


# Fuzz


def told(value: object) -> str:
    """The outcome as fuzz.Case names it."""
    if not isinstance(value, RowError):
        return fuzz.VALUE
    assert value.detail and "\n" not in value.detail and len(value.detail) < 200
    return value.reason


@pytest.mark.parametrize("seed", range(3))
def test_every_line_of_a_file_full_of_faults_is_accounted_for(tmp_path: Path, seed: int) -> None:
    cases = fuzz.malformed(seed, 10_000)
    (tmp_path / "x.jsonl").write_bytes(fuzz.jsonl_bytes(cases))
    values = list(read_values(tmp_path / "x.jsonl"))
    rows = [(line, case) for line, case in enumerate(cases, 1) if case.outcome != fuzz.BLANK]
    assert len(values) == sum(1 for case in cases if case.line.strip(b" \t\r"))
    assert [(n, case.what, told(value)) for (n, value), (_, case) in zip(values, rows, strict=True)] == [
        (line, case.what, case.outcome) for line, case in rows
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_every_record_of_a_file_full_of_faults_is_accounted_for(
    tmp_path: Path, seed: int, line_end: bytes
) -> None:
    cases = fuzz.malformed_records(seed, 4000)
    (tmp_path / "x.csv").write_bytes(fuzz.csv_bytes(cases, line_end))
    line, want = 2, []
    for case in cases:
        if case.outcome != fuzz.BLANK:
            want.append((line, case.what, case.outcome))
        line += case.line.count(b"\n") + 1
    values = list(read_values(tmp_path / "x.csv"))
    got = [(n, what, told(value)) for (n, value), (_, what, _) in zip(values, want, strict=True)]
    assert got == want


def test_good_lines_of_the_generator_come_out_as_they_went_in(tmp_path: Path) -> None:
    cases = fuzz.malformed(7, 3000)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(fuzz.jsonl_bytes(cases), 1))
    values = dict(read_values(tmp_path / "x.jsonl.gz"))
    good = {n: case for n, case in enumerate(cases, 1) if case.what == "good"}
    assert {n: values[n] for n in good} == {n: json.loads(case.line) for n, case in good.items()}


def test_the_generator_repeats_itself_and_has_every_fault_in_every_shape() -> None:
    cases = fuzz.malformed(1, 10_000)
    assert cases == fuzz.malformed(1, 10_000) != fuzz.malformed(2, 10_000)
    assert cases[0].what == "good"
    faults = {"good", *fuzz.VALUE_FAULTS, *fuzz.LINE_FAULTS}
    assert {(case.what, case.shape) for case in cases} == {(f, s) for f in faults for s in fuzz.SHAPES}
    assert {case.shape for case in fuzz.malformed(1, 100, ["text"])} == {"text"}
    assert {case.what for case in fuzz.malformed_records(1, 1000)} == {"good", *fuzz.RECORD_FAULTS}
