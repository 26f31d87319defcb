"""Detect the format of a file (`data_format=auto`), and say why no row of a file can be used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..schema import ColumnArgs, DataFormat
from ..utils.logs import log
from .column_mapping import strategy_of
from .columns import ANSWERS, CONTEXTS, REQUESTS, TURNS
from .conversation import Rejection, RowError
from .formats import FORMATS, count_formats
from .readers import REST_OF_FILE, ReadOptions, other_file, read_options, read_values
from .refusals import REMEDIES
from .source_row import SourceRow, is_harmless, parsed

DETECT_ROWS = 100  # first rows of a file by which its format is detected, without those that cannot be read
MAX_UNREADABLE = 1000  # rows that cannot be read, after which no others are looked for
MAX_COLUMNS = 12  # columns that are listed
READING_REMEDIES = {  # by reason
    "not_utf8": "set encoding, which is cp1252 for most files that Excel writes",
    "too_large": "split these rows into shorter conversations or documents",
}
# Reasons of rows that cannot be read, whatever their format. Their columns are not known.
UNREADABLE = {"too_large", "not_utf8", "not_json", "not_csv", "not_python", "duplicate_key", REST_OF_FILE}
EXPORT_KEYS = {"mapping", "chat_messages"}  # of a conversation that ChatGPT or Claude exports
DELIMITER = "set csv_delimiter to the character between its columns"
BY_COLUMN = "name the columns with question_key and answer_key, or set data_format"
NO_ANSWER = "name the column of the answer with answer_key; prompts alone, as for RL, are not supported"
AS_TEXT = "name the column of the request with question_key, or set data_format=text to train on {} alone"


def resolve_format(path: Path, data_format: DataFormat, columns: ColumnArgs) -> str:
    """The format of a file: the strategy of the column settings, else `data_format`, else the detected one.

    A file whose first rows have the columns of no format is read as messages: its rows are then rejected with the
    reason, together with those of the other files.
    """
    if strategy_of(columns):
        return str(strategy_of(columns))
    if data_format != "auto":
        return data_format
    rows = _first_values(path, options_of(columns))
    found = count_formats(rows)
    if not found:
        return "prompt_completion" if _has(rows, REQUESTS) else "messages"
    name, number = found.most_common(1)[0]
    if (name, number) != ("messages", len(rows)):
        log.info("%s: data_format=auto found %s (%d of the first %d rows)", path, name, number, len(rows))
    return name


def telling(rejections: Sequence[Rejection]) -> Rejection:
    """The first rejection that tells why no row of a file can be used: of those that have most rows.

    They are rows that cannot be read, or rows of a layout that cannot be used. The others do not explain the file.
    """
    unreadable = [rejection for rejection in rejections if rejection.reason in UNREADABLE]
    readable = [rejection for rejection in rejections if rejection.reason not in UNREADABLE]
    return max(readable, unreadable, key=lambda group: sum(rejection.rows for rejection in group))[0]


def explain_misfit(first: Rejection, rows_in: int, data_format: str, options: ReadOptions) -> str:
    """One sentence that says why no row of a file can be used, and the remedy.

    Args:
        first: the rejection that `telling` selects.
        data_format: the format or the strategy by which the rows were read.
    """
    rows = _first_values(first.file, options)
    found = count_formats(rows).most_common(1)
    fact, remedy = f"line {first.line} {first.detail}", "fix the rows"
    if first.reason in UNREADABLE or all(isinstance(row, RowError) for row in rows):
        remedy = _other_file(first) or remedy
    elif first.reason in REMEDIES:
        remedy = REMEDIES[first.reason]
    elif remedy_of_layout := _convertible(rows) or _other_layout(rows):
        fact, remedy = f"{fact}; {_columns(rows)}", remedy_of_layout
    elif first.reason == "no_assistant_turn":
        remedy = "give rows with an answer"
    elif data_format not in FORMATS:
        fact, remedy = f"{fact}; {_columns(rows)}", "name others with question_key and answer_key"
    elif found and found[0][0] != data_format:
        fact, remedy = f"{fact}; its rows look like {found[0][0]}", f"set data_format={found[0][0]}"
    elif not found:
        remedy = NO_ANSWER if _has(rows, REQUESTS) else DELIMITER if _is_undivided(first.file, rows) else BY_COLUMN
        if remedy == BY_COLUMN and (answer := _has(rows, ANSWERS)):
            remedy = AS_TEXT.format(answer)
        if remedy == NO_ANSWER and (context := _has(rows, CONTEXTS[1:])) and (asked := _has(rows, REQUESTS)):
            remedy = f"{remedy}; user_prompt='{{{context}}} {{{asked}}}' adds the {context}"
        fact = f"{fact}; {_columns(rows)}"
    elif first.reason in ("no_completion", "no_prompt", "no_output"):
        fact, remedy = f"{fact}; {_columns(rows)}", BY_COLUMN
    used = "read" if first.reason == "too_large" else f"used as {data_format}"
    return f"{first.file}: none of its {rows_in:,} rows can be {used}: {fact}; {remedy}"


def _convertible(rows: list[object]) -> str:
    """The remedy for the export of a chat program, and for one object that holds rows; empty for other rows."""
    row = rows[0] if rows and isinstance(rows[0], dict) else {}
    if EXPORT_KEYS & row.keys():
        return "make convert turns exports of ChatGPT and Claude into rows"
    if len(rows) != 1 or not row:
        return ""
    if all(map(_is_column, row.values())) or {"columns", "data"} <= row.keys():
        return "it holds columns, not rows: pandas writes rows with to_json(orient='records')"
    lists = [value for value in row.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if any(not _is_turn(value[0]) for value in lists) and not any(SourceRow(row).find(name) for name in TURNS):
        return "make convert takes the rows out of the object"
    by_key = len(row) == sum(count_formats(each for each in row.values() if isinstance(each, dict)).values())
    return "it holds rows by key: write them as a list, or one a line" if by_key else ""


def _other_layout(rows: list[object]) -> str:
    """The remedy for rows that are single turns, or hold turns under a name of their own; empty for other rows."""
    objects = [row for row in rows if isinstance(row, dict)]
    if objects and all(map(_is_turn, objects)):
        return "each row is one turn: give a conversation a row, as a list under messages"
    found = next((path for row in objects for path in _turns_paths(row)), "")
    return f"set question_key={found}, which holds turns" if found else ""


def _turns_paths(row: dict[str, Any]) -> Iterator[str]:
    """The columns of a row, and the paths into them, that hold a list of turns and have no known name."""
    for name, value in row.items():
        inner = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {}
        for path, each in {str(name): value, **inner}.items():
            turns = parsed(each)
            if isinstance(turns, list) and turns and _is_turn(turns[0]) and path.lower() not in TURNS:
                yield path


def _is_turn(value: object) -> bool:
    names = {str(key).lower() for key in value} if isinstance(value, dict) else set()
    return bool(names & {"role", "from"}) and bool(names & {"content", "value", "text", "parts"})


def _is_column(value: object) -> bool:
    """Whether a value holds those of all rows, in a list or by row number."""
    if isinstance(value, list):
        return bool(value) and not isinstance(value[0], list | dict)
    return isinstance(value, dict) and "0" in value


def _is_undivided(path: Path, rows: list[object]) -> bool:
    """Whether a CSV file has one column, whose name holds more than one word."""
    names = {name for row in rows if isinstance(row, dict) for name in row}
    return (
        path.name.lower().endswith((".csv", ".tsv"))
        and len(names) == 1
        and bool(re.search(r"\w\W\w", names.pop()))
    )


def _has(rows: list[object], names: tuple[str, ...]) -> str | None:
    """The first of the columns `names` that a row has."""
    found = (SourceRow(row).find(*names) for row in rows if isinstance(row, dict))
    return next(filter(None, found), None)


def options_of(columns: ColumnArgs) -> ReadOptions:
    return read_options(columns.csv_delimiter, columns.encoding)


def _first_values(path: Path, options: ReadOptions) -> list[object]:
    """The first rows of a file that can be read, or the errors of its first rows if there is none."""
    readable, errors = list[object](), list[object]()
    for _, value in islice(read_values(path, options), MAX_UNREADABLE + DETECT_ROWS):
        (errors if isinstance(value, RowError) else readable).append(value)
        if len(readable) == DETECT_ROWS or len(errors) == MAX_UNREADABLE:
            break
    return readable or errors


def _columns(rows: list[object]) -> str:
    """The columns of the rows, and the paths to texts inside of them, as question_key and answer_key take them."""
    keys = {path for row in rows if isinstance(row, dict) for path in _paths(row)}
    shown = sorted(keys, key=lambda key: (is_harmless(key), key))[:MAX_COLUMNS]
    return f"its rows have {', '.join(shown)}" if keys else "it has no row with columns"


def _paths(row: dict[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        inner = value if isinstance(value, dict) else {}
        if isinstance(value, list) and _is_text(value):
            yield f"{name}[0]"
            continue
        texts = [f"{name}.{key}" for key, each in inner.items() if isinstance(each, str)]
        lists = [f"{name}.{key}[0]" for key, each in inner.items() if isinstance(each, list) and _is_text(each)]
        yield from [*texts, *lists] or [str(name)]


def _is_text(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], str)


def _other_file(first: Rejection) -> str:
    """The remedy for a file whose content does not match its name; empty if none is known."""
    path = first.file
    with path.open("rb") as file:
        begin = file.read(4096).lstrip()
    if other := other_file(begin, path):
        return other
    if first.reason in READING_REMEDIES:
        return READING_REMEDIES[first.reason]
    if "the header has" in first.detail or "the first row does not name" in first.detail:
        return "the first row names the columns: remove what stands above it"  # such as a title
    if first.reason != "not_json" or begin[:1] not in (b"[", b"{"):
        return ""
    if re.match(rb"\{\s*'", begin):
        return "its rows are written as Python prints them: json.dumps writes JSON"
    whole = begin.split(b"\n", 1)[0].rstrip().endswith(b"}")
    return "" if whole else "make convert turns multi-line JSON into one row a line"
