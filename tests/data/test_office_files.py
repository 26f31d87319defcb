"""Files as people have them: what spreadsheets, pandas, `datasets` and text editors write."""

from __future__ import annotations

import csv
import datetime
import io
import json
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from src.data import prepare
from src.data.chat import ChatTokenizer
from src.data.conversation import RowError
from src.data.readers import DEFAULTS, describe, read_options, read_values
from src.data.sources import data_cache
from src.errors import ConfigError, DataError
from tests.data.fixtures import Maker, load_training_rows

pytest_plugins = ["tests.fixtures", "tests.data.fixtures"]

ROWS = [{"prompt": "What is tea?", "completion": "A drink, hot"}, {"prompt": "Ice?", "completion": "42"}]
LINES = [["prompt", "completion"], *([*row.values()] for row in ROWS)]


def read(path: Path, **settings: str) -> list[tuple[int, Any]]:
    values = read_values(path, read_options(settings.get("csv_delimiter"), settings.get("encoding")))
    return [(n, (v.reason, v.detail) if isinstance(v, RowError) else v) for n, v in values]


def put(folder: Path, name: str, content: str | bytes, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(content.encode(encoding) if isinstance(content, str) else content)
    return path


def refusal(path: Path, **settings: str) -> str:
    with pytest.raises(DataError) as refused:
        read(path, **settings)
    assert refused.value.hint
    return str(refused.value).removeprefix(str(path))


def table(delimiter: str) -> str:
    quoted = [[f'"{text}"' if delimiter in text else text for text in line] for line in LINES]
    return "".join(delimiter.join(line) + "\r\n" for line in quoted)


# CSV


@pytest.mark.parametrize(
    ("delimiter", "name"), [(",", ""), (";", "semicolon"), ("\t", "tab"), ("|", "pipe"), ("~", "~")]
)
def test_the_delimiter_of_a_csv_file_is_found_and_reported(tmp_path: Path, delimiter: str, name: str) -> None:
    setting = {"csv_delimiter": delimiter} if delimiter == "~" else {}
    path = put(tmp_path, "x.csv", table(delimiter))
    assert read(path, **setting) == [(2, ROWS[0]), (3, ROWS[1])]
    assert describe(path, read_options(setting.get("csv_delimiter"), None)) == (name and f"csv_delimiter={name}")
    with_line = put(tmp_path, "y.csv", f"sep={delimiter}\r\n" + table(delimiter))  # Excel's own first line
    assert read(with_line) == [(3, ROWS[0]), (4, ROWS[1])]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("a;c,b\n1;2,3\n4;5,6\n", {"a;c": "1;2", "b": "3"}),  # a draw is the comma's
        ("prompt, if any;completion\nq;a\nq, too;a\n", {"prompt, if any": "q", "completion": "a"}),
        ('a;b\n"x;\ny";1,2\nz;3\n', {"a": "x;\ny", "b": "1,2"}),
        ("text\nno, one; column\n", ("wrong_columns", "has 2 fields, the header has 1")),
        (" a ; b\n1;2\n", {"a": "1", "b": "2"}),
        ('a, b; c|"d|e"\n"x, |y"|1;2\n', {"a, b; c": "x, |y", "d|e": "1;2"}),  # quotes decide
    ],
)
def test_the_delimiter_is_that_under_which_the_rows_have_the_columns(tmp_path: Path, text: str, row: Any) -> None:
    assert read(put(tmp_path, "x.csv", text))[0][1] == row


def test_a_tsv_file_without_a_tab_is_read_as_csv_and_reported(tmp_path: Path) -> None:
    path = put(tmp_path, "x.tsv", table(","))
    assert read(path) == read(path, csv_delimiter="comma") == [(2, ROWS[0]), (3, ROWS[1])]
    assert describe(path, DEFAULTS) == "csv_delimiter=comma"
    tabs = put(tmp_path, "y.tsv", "a, b\tc\nx, y\tz\n")
    assert (read(tabs), describe(tabs, DEFAULTS)) == ([(2, {"a, b": "x, y", "c": "z"})], "")
    assert read(tabs, csv_delimiter="comma") == [(2, {"a": "x", "b\tc": " y\tz"})]


def test_a_set_delimiter_is_taken_by_its_name_or_as_it_is(tmp_path: Path) -> None:
    path = put(tmp_path, "x.csv", "a;b,c\n1;2,3\n")
    assert (
        read(path, csv_delimiter="semicolon") == read(path, csv_delimiter=";") == [(2, {"a": "1", "b,c": "2,3"})]
    )
    with pytest.raises(
        ConfigError, match="csv_delimiter=both: should be one character, or one of comma"
    ) as refused:
        read_options("both", "klingon")
    assert "encoding=klingon: should be the name of a text encoding" in str(refused.value)


def test_columns_without_a_name_may_be_empty_or_row_numbers(tmp_path: Path) -> None:
    path = put(
        tmp_path, "x.csv", ",prompt,completion,,\n0,q,a,,\n1,q,a,,,,\n2,q,a, b,\nx,q,a,,\n3,q,a,,,more\n4,q\n"
    )
    row = {"prompt": "q", "completion": "a"}
    unnamed = "has a value in column {}, which the first row does not name"
    assert read(path) == [
        (2, row),
        (3, row),
        (4, ("wrong_columns", unnamed.format(4))),  # the rest of an answer with a comma
        (5, ("wrong_columns", unnamed.format(1))),
        (6, ("wrong_columns", "has 6 fields, the header has 5")),
        (7, ("wrong_columns", "has 2 fields, the header has 5")),
    ]
    assert describe(path, DEFAULTS) == "row numbers in the first column left out and 2 empty columns left out"


WORDS = [
    *(
        "tea;",
        "coffee,",
        "milk",
        "|bar\ttab",
        "plain",
        '"quoted"',
        "3,5",
        "1;2",
        "it's",
        "é",
        "日本",
        "new\nline",
        "a|b",
    ),
    *("x;y;z", ",,,", ";;;", "||", "42"),
]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_any_csv_file_that_python_writes_is_read_back(tmp_path: Path, delimiter: str) -> None:
    for seed in range(60):
        rng = Random(f"{delimiter}{seed}")
        columns = rng.choice([["prompt", "completion"], ["instruction", "input", "output"]])
        index, empty = rng.choice([(True, 0), (False, 0), (False, 2)])
        rows = [
            [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in columns] for _ in range(rng.randint(1, 30))
        ]
        text = io.StringIO()
        quoting, end = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), rng.choice(["\n", "\r\n"])
        writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end)
        writer.writerow([""] * index + columns + [""] * empty)
        writer.writerows([str(number)] * index + row + [""] * empty for number, row in enumerate(rows))
        path = put(tmp_path, "x.csv", text.getvalue(), rng.choice(["utf-8", "utf-8-sig", "utf-16"]))
        assert [row for _, row in read(path)] == [dict(zip(columns, row, strict=True)) for row in rows], seed


# Encodings


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.json", "x.txt"])
def test_text_in_another_encoding_is_read_with_the_setting(tmp_path: Path, name: str) -> None:
    text = {"csv": "text\ngrün € ß\n", "txt": "grün € ß\n"}.get(name[2:], '{"text": "grün € ß"}\n')
    path = put(tmp_path, name, text, "cp1252")
    assert [row for _, row in read(path, encoding="cp1252")] == [{"text": "grün € ß"}]
    assert describe(path, read_options(None, "cp1252")).startswith("encoding=cp1252")
    assert "not UTF-8" in str(read(path)) or "not_utf8" in str(read(path))
    in_utf8 = put(tmp_path, f"utf8-{name}", text)  # as evaluation files beside it may be
    assert [row for _, row in read(in_utf8, encoding="cp1252")] == [{"text": "grün € ß"}]
    assert refusal(put(tmp_path, name, b"\n\n\x81"), encoding="cp1252").startswith(
        " is not cp1252 text on line 3; "
    )


@pytest.mark.parametrize("encoding", ["utf-16-le", "shift_jis", "gb18030"])
def test_an_encoding_may_have_several_bytes_a_character(tmp_path: Path, encoding: str) -> None:
    rows = "".join(f'{{"text": "{n} 日本"}}\n' for n in range(50_000))  # more than one buffer
    path = put(tmp_path, "x.jsonl", rows, encoding)
    assert [row["text"] for _, row in read(path, encoding=encoding)] == [f"{n} 日本" for n in range(50_000)]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_binary_file_under_the_name_of_a_table_is_refused_by_what_it_is(tmp_path: Path, suffix: str) -> None:
    path = workbook(tmp_path / "x.xlsx", rows=LINES).rename(tmp_path / f"x.{suffix}")
    assert "is not CSV; it is an Excel workbook or another ZIP archive: name it x.xlsx" in refusal(path)


# Workbooks


def workbook(path: Path, **sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_the_sheet_with_rows_is_read_as_its_csv_file(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 5, 1)
    values = [
        [],
        [None, *LINES[0], "more", None],
        [0, *LINES[1], None],
        [1, "q", 42, 0.1 + 0.7],
        [2, "q", True, day],
    ]
    path = workbook(tmp_path / "x.xlsx", empty=[], rows=values)
    assert read(path) == [
        (3, {**ROWS[0], "more": ""}),
        (4, {"prompt": "q", "completion": "42", "more": "0.8"}),
        (5, {"prompt": "q", "completion": "TRUE", "more": "2026-05-01"}),
    ]
    assert read(workbook(tmp_path / "x.xlsx", empty=[])) == []


def test_an_error_in_a_cell_costs_its_row_only(tmp_path: Path) -> None:
    path = workbook(tmp_path / "x.xlsx", rows=[*LINES[:2], ["q", "#N/A"], LINES[2]])
    assert read(path) == [(2, ROWS[0]), (3, ("wrong_columns", "has the error #N/A in the cell B3")), (4, ROWS[1])]


def test_a_cell_that_shows_a_text_is_never_read_as_empty(tmp_path: Path) -> None:
    head = ["instruction", "input", "output"]
    rows = [["q1", "=A1", "a"], ["q2", "m", "b"], ["q3", None, "c"], ["q4", None, "d"], ["q5", None, "e"]]
    path = workbook(tmp_path / "x.xlsx", rows=[head, *rows])
    book = openpyxl.load_workbook(path)
    for merged in ("B3:B4", "A5:B5", "F6:G7"):
        book.active.merge_cells(merged)
    book.save(path)
    formula = "has a formula without its value in the cell B2: save the file in Excel once"
    merged = "has merged cells, {}: unmerge them and fill in each"
    assert read(path) == [
        (2, ("wrong_columns", formula)),
        (3, {"instruction": "q2", "input": "m", "output": "b"}),
        (4, ("wrong_columns", merged.format("B3:B4"))),
        (5, ("wrong_columns", merged.format("A5:B5"))),
        (6, {"instruction": "q5", "input": "", "output": "e"}),  # beside the table
    ]


def test_a_title_above_the_table_is_no_header(make: Maker) -> None:
    book = workbook(make.folder / "x.xlsx", rows=[["My data"], [], *LINES])
    told = []
    for path in (book, put(make.folder, "x.csv", "My data,\n" + table(","))):
        with pytest.raises(DataError) as refused:
            make.read(dataset_path=str(path), data_format="auto", eval_path="none")
        told.append(str(refused.value).rpartition("; ")[2])
    assert told == ["the first row names the columns: remove what stands above it"] * 2


def test_a_workbook_that_cannot_be_read_is_refused_with_a_remedy(tmp_path: Path) -> None:
    several = refusal(workbook(tmp_path / "x.xlsx", first=LINES, second=LINES))
    assert several == " has several sheets with rows: first, second; keep one of them, or save each as .csv"
    old = refusal(put(tmp_path, "x.xlsx", b"\xd0\xcf\x11\xe0 and more"))
    assert old == " is a workbook of the old format .xls, or has a password; save it as .xlsx without a password"
    assert " is truncated or corrupt before its first row" in refusal(put(tmp_path, "x.xlsx", b"PK\3\4"))
    data = workbook(tmp_path / "y.xlsx", rows=LINES).read_bytes()
    assert " is truncated or corrupt " in refusal(put(tmp_path, "x.xlsx", data[:-400]))


# Arrow


def test_numbers_and_times_of_a_table_are_texts_as_in_a_workbook(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 5, 1)
    cells = {
        "price": [Decimal("12.50"), None],
        "day": [day.date(), None],
        "at": [day, day.replace(hour=9)],
        "inner": [[{"price": Decimal("1E+2")}, None], None],
    }
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == [
        (1, {"price": "12.50", "day": "2026-05-01", "at": "2026-05-01", "inner": [{"price": "100"}, None]}),
        (2, {"price": None, "day": None, "at": "2026-05-01 09:00:00", "inner": None}),
    ]


@pytest.mark.parametrize("create", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_arrow_files_are_read_in_both_formats(tmp_path: Path, create: Any) -> None:
    rows = [{"n": n, "messages": [{"role": "user", "content": "é"}]} for n in range(3000)]
    with create(tmp_path / "x.arrow", (whole := pyarrow.Table.from_pylist(rows)).schema) as writer:
        writer.write_table(whole, max_chunksize=1100)
    assert read(tmp_path / "x.arrow") == list(enumerate(rows, 1))
    data = (tmp_path / "x.arrow").read_bytes()
    assert " is truncated or corrupt " in refusal(put(tmp_path, "x.arrow", data[: len(data) // 2]))


# Text and JSON


def test_a_text_file_has_a_document_a_line_or_a_paragraph(tmp_path: Path) -> None:
    lines = put(tmp_path, "x.txt", "\ufeffOne.\r\n\r\n Two.\n")
    assert read(lines) == [(1, {"text": "One."}), (3, {"text": " Two."})]
    assert describe(lines, DEFAULTS) == "one row a line"
    paragraphs = put(tmp_path, "y.txt", "One\ngoes on.\n \n\nTwo\nas well.")
    assert read(paragraphs) == [(1, {"text": "One\ngoes on."}), (5, {"text": "Two\nas well."})]
    assert describe(paragraphs, DEFAULTS) == "one row a paragraph"
    assert refusal(put(tmp_path, "z.txt", '{"a": 1}\n')) == " holds JSON; name it z.jsonl"
    assert refusal(put(tmp_path, "z.txt", "id\tQuestion\tAnswer\r\n")) == " holds a table; name it z.csv"


def test_json_lines_may_be_separated_by_commas_or_be_one_array(tmp_path: Path) -> None:
    assert read(put(tmp_path, "x.jsonl", '{"a": 1},\n{"a": 2} , \n')) == [
        (1, {"a": 1}),
        (2, {"a": 2}),
    ]
    extra = ("not_json", "is not JSON: Extra data at column 9")
    assert read(put(tmp_path, "x.jsonl", '{"a": 1},,\n')) == [(1, extra)]
    assert read(put(tmp_path, "x.jsonl", '[\n{"a": 1},\n{"a": 2}\n]\n')) == [(2, {"a": 1}), (3, {"a": 2})]
    assert read(put(tmp_path, "x.jsonl", '[{"a": 1}, {"a": 2}]')) == [(1, {"a": 1}), (2, {"a": 2})]
    assert read(put(tmp_path, "x.json", '{"a": 1},\n{"a": 2},\n')) == [(1, {"a": 1}), (2, {"a": 2})]
    assert read(put(tmp_path, "x.json", '[{"a": 1},\n{"a": 2},\n]')) == [(1, {"a": 1}), (2, {"a": 2})]
    assert read(put(tmp_path, "x.jsonl", '[1]\n{"a": 2}\n')) == [(1, [1]), (2, {"a": 2})]


@pytest.mark.parametrize("indent", [None, 1])
def test_the_rows_behind_a_break_are_counted(tmp_path: Path, indent: int | None) -> None:
    rows = [{"id": n, "messages": [{"role": "user", "content": "{"}], "more": {"id": n}} for n in range(100)]
    text = json.dumps(rows, indent=indent).replace('"id": 40,', '"id" 40,')
    values = list(read_values(put(tmp_path, "x.json", text)))
    assert [value["id"] for _, value in values[:40] if isinstance(value, dict)] == list(range(40))
    broken, rest = (value for _, value in values[40:])
    assert isinstance(broken, RowError) and isinstance(rest, RowError)
    assert (broken.reason, broken.rows, rest.reason) == ("not_json", 1, "rest_of_file")
    assert rest.rows == 59


def test_a_quote_that_is_closed_late_counts_the_lines_that_it_takes(tmp_path: Path) -> None:
    text = io.StringIO()
    text.write('a,b\n"open,1\n' + "x,1\n" * 10 + '"y",1\nz,1\n')
    values = list(read_values(put(tmp_path, "x.csv", text.getvalue())))
    assert [(n, v.reason, v.rows) if isinstance(v, RowError) else (n, v) for n, v in values] == [
        (2, "not_csv", 12),
        (14, {"a": "z", "b": "1"}),
    ]


# In the data report


def make_report(make: Maker, **settings: Any) -> dict[str, Any]:
    """The data report of a training run, also where bad rows would stop it."""
    cfg = make.config(**settings)
    data, chat = load_training_rows(cfg), ChatTokenizer(make.tokenizer)
    cache = data_cache(cfg.cache_dir, cfg.output_dir)
    return prepare.tokenize(data, chat, cfg, task=cfg.task, cache=cache, seed=cfg.seed).report


def test_the_rest_of_a_broken_file_is_counted_and_never_skipped(make: Maker) -> None:
    (make.folder / "data").mkdir()
    text = "prompt,completion\nq1,a\nq2,b\n" + '"open,c\n' + "".join(f"q{n},d\n" for n in range(997))
    path = put(make.folder / "data", "train.csv", text)
    report = make_report(make, dataset_path=str(path), eval_path="none")
    assert (report["rows_in"], report["rows_trained"]) == (1000, 2)
    assert report["rejected_by_reason"] == {"rest_of_file": 997, "not_csv": 1}
    assert [row.get("rows") for row in report["rejected"]] == [None, 997]
    for how in ("refuse", "skip"):
        with pytest.raises(DataError, match=r"csv:5 and the rest of the file \(997 rows\) could not") as refused:
            make.read(dataset_path=str(path), eval_path="none", on_bad_row=how)
        assert "or set on_bad_row=skip" not in refused.value.hint
    cut = put(make.folder / "data", "cut.json", json.dumps(ROWS)[:-30])
    with pytest.raises(DataError, match=r"cut\.json:1 is not JSON.*; the rest of the file could not be read"):
        make.read(dataset_path=str(cut), eval_path="none", on_bad_row="skip")
    put(make.folder / "data", "train.csv", text.replace('"open', "open"))
    assert make_report(make, dataset_path=str(path), eval_path="none")["rows_trained"] == 1000


def test_how_a_file_is_read_and_what_its_name_says_are_in_the_report(make: Maker) -> None:
    (make.folder / "data").mkdir()
    put(make.folder / "data", "train.csv", ";prompt;completion\n0;grün?;ja\n", "cp1252")
    put(make.folder / "data", "dev.csv", "prompt,completion\nblau?,nein\n")
    report = make_report(make, dataset_pattern="*.csv", eval_path="none", encoding="cp1252")
    read_as = "encoding=cp1252, csv_delimiter=semicolon, row numbers in the first column left out"
    assert [file.get("read_as") for file in report["files"]] == [None, read_as]
    assert [file.get("like_held_out") for file in report["files"]] == [True, None]
    assert report["findings"] == [
        "1 file trained on, named like a held-out split: dev.csv "
        "(dataset_pattern chooses the training files, and eval_path names evaluation files)"
    ]


def test_files_that_are_left_out_empty_or_missing_are_findings(make: Maker) -> None:
    (make.folder / "data").mkdir()
    for number in (0, 2):
        put(make.folder / "data", f"train-0000{number}-of-00003.jsonl", json.dumps(ROWS[number // 2]))
    put(make.folder / "data", "empty.jsonl", "")
    assert make_report(make, eval_path="none")["findings"] == [
        "1 file without a row: empty.jsonl (fetch or create the file again, or remove it)",
        "1 file missing of a numbered series: train-00001-of-00003.jsonl (fetch the rest of the data set)",
    ]
    other = put(make.folder / "data", "more.csv", table(","))  # the rows are the same: the tokens are not
    report = make_report(make, eval_path="none")
    assert report["not_matched"] == [str(other)]
    assert report["findings"][0] == (
        f"1 file of the data folder not trained on: {other} "
        "(dataset_pattern chooses the training files; dataset_path may be one file)"
    )
