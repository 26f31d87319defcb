"""Load rows from data files: each row is usable, or rejected with file, line and reason.

Files are read in one pass, on every core and in bounded memory. The result is cached, so that the same files under
the same settings are read once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import MAX_LISTED, DataError
from ..schema import ColumnArgs, DataFormat
from ..utils.files import sha256, write_json
from ..utils.logs import log
from ..utils.secrets import credentials, redact
from ..utils.workers import cores, map_ordered
from . import duplicates
from .column_mapping import choose_translation, strategy_of
from .contamination import EvaluationRows
from .formats import (
    FORMATS,
    Message,
    Rejection,
    Row,
    RowError,
    Translation,
    count_formats,
    evaluation_messages,
    to_messages,
    tools_of,
)
from .readers import ReadOptions, describe, read_options, read_values
from .sources import DataPart
from .store import Array, RowStore, build_once, content_key, write_lines

BATCH = 500  # values that a process receives at once
MAX_DETAIL = 500  # characters
DETECT_ROWS = 100  # first rows of a file by which its format is detected
REMEDIES = {"not_utf8": "set encoding, which is cp1252 for most files that Excel writes"}  # by reason
MARKS = {  # how files begin whose names say something else -> the remedy
    b"\x1f\x8b": "it is compressed with gzip: name it {name}.gz",
    b"PAR1": "it is a Parquet file: name it {stem}.parquet",
    b"ARROW1": "it is an Arrow file: name it {stem}.arrow",
    b"PK": "it is an Excel workbook or another ZIP archive: name it {stem}.xlsx, or unpack it",
}
BY_COLUMN = "name the columns with question_key and answer_key, or set data_format"
SMALL = 8 << 20  # bytes; with smaller files, further processes cost more than they save


class RowBatch(NamedTuple):
    file: int
    values: list[tuple[int, Any]]  # (line, value)


class ParsedBatch(NamedTuple):
    """The result of a batch: JSON lines of the usable rows, their fingerprints, rejections and contamination."""

    file: int
    rows_in: int
    lines: list[bytes]
    rejected: list[tuple[int, int, str, int, str]]  # (file, line, reason, rows, detail)
    fingerprints: Array
    overlaps: list[tuple[int, duplicates.Kind, float, str, int]]  # index into lines, then as in HeldOutMatch


def read_rows(path: Path, data_format: DataFormat | None = None) -> list[Row]:
    """All rows of a small file. Without a format it is an evaluation file.

    Raises: DataError naming the bad rows.
    """
    translate = FORMATS[data_format].translate if data_format else evaluation_messages
    rows, rejected = [], []
    for line, value in read_values(path):
        try:
            rows.append(Row(path, line, _messages(value, translate), tools_of(value)))
        except RowError as error:
            rejected.append(Rejection(path, line, error.reason, error.detail, error.rows))
    if rejected:
        raise_rejected(rejected, f"data_format={data_format}" if data_format else "", "fix the rows")
    return rows


def raise_rejected(
    rejected: Sequence[Rejection], setting: str | Mapping[Path, str], hint: str, also: Iterable[str] = ()
) -> None:
    """Raises: DataError with the problems `also`, the first rejected rows, and the number of further ones.

    `setting`, or that of its file, is shown behind each row.
    """
    settings = [setting if isinstance(setting, str) else setting[r.file] for r in rejected[:MAX_LISTED]]
    listed = [f"{r} ({shown})" if shown else str(r) for r, shown in zip(rejected, settings, strict=False)]
    more = len(rejected) - len(listed)
    raise DataError(*also, *listed, *([f"... and {more} more"] if more else []), hint=hint)


def load_rows(
    parts: Sequence[DataPart], held_out: EvaluationRows, dedup_threshold: float, cache: Path, workers: int | None
) -> RowStore:
    """The rows of all `parts`, from the cache where possible.

    Raises: DataError if a file cannot be read, or its format cannot be detected.
    """
    files: list[dict[str, Any]] = [
        {"file": str(file), "sha256": sha256(file), "part": number, "format": part.data_format}
        for number, part in enumerate(parts)
        for file in part.files
    ]
    columns = [part.columns for part in parts]
    key = content_key(
        files=files,
        columns=columns,
        held_out=held_out.identity,
        near=dedup_threshold,
        secrets=sorted(credentials()),  # rows that hold one are rejected
    )

    def build(folder: Path) -> None:
        for file in files:
            part = parts[file["part"]]
            file["read_as"] = describe(Path(file["file"]), options_of(part.columns))
            file["format"] = resolve_format(Path(file["file"]), part.data_format, part.columns)
        _write_rows(folder, files, columns, held_out, dedup_threshold, workers)

    build_once(cache / "rows" / key, build)
    return RowStore(cache / "rows" / key)


def _write_rows(
    folder: Path, files: list[dict[str, Any]], columns: Sequence[ColumnArgs], held_out: EvaluationRows,
    dedup_threshold: float, workers: int | None,
) -> None:  # fmt: skip
    """Write the row store of `files` to `folder`."""
    small = sum(Path(f["file"]).stat().st_size for f in files) < SMALL
    processes = 1 if small else workers or cores()
    with duplicates.FingerprintSpool(folder) as spool:
        _parse_files(folder, files, columns, held_out, spool, processes)
        first_rows = np.cumsum([0, *(f["usable"] for f in files[:-1])]).tolist()
        write_json(folder / "about.json", {"files": files, "first_rows": first_rows})
        store = RowStore(folder)
        found = spool.duplicates(lambda row: _full_text(store.row(row).messages), dedup_threshold, processes)
        write_lines(folder / "duplicates.jsonl", (_duplicate_row(store, d) for d in found))


def _parse_files(
    folder: Path, files: list[dict[str, Any]], columns: Sequence[ColumnArgs], held_out: EvaluationRows,
    spool: duplicates.FingerprintSpool, processes: int,
) -> None:  # fmt: skip
    """Write the rows, rejections and contamination of `files`. Adds the counts `rows_in` and `usable` to each."""
    translations = [choose_translation(columns[f["part"]], f["format"]) for f in files]
    secrets = {text: name for value, name in credentials().items() for text in _json_forms(value)}
    sizes: list[Array] = [np.zeros(1, np.int64)]
    first = 0  # row of the batch

    def work(batch: RowBatch) -> ParsedBatch:
        return _parse_batch(batch, translations[batch.file], held_out, secrets)

    for file in files:
        file.update(rows_in=0, usable=0)
    with (
        (folder / "rows.jsonl").open("wb") as rows,
        (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected,
        (folder / "contamination.jsonl").open("w", encoding="utf-8") as overlaps,
    ):
        for parsed in map_ordered(work, _batches(files, columns), processes):
            files[parsed.file]["rows_in"] += parsed.rows_in
            files[parsed.file]["usable"] += len(parsed.lines)
            sizes.append(np.fromiter(map(len, parsed.lines), np.int64, len(parsed.lines)))
            spool.add(parsed.fingerprints)
            rows.writelines(parsed.lines)
            rejected.writelines(_line(_shortened(redact(r))) for r in parsed.rejected)
            overlaps.writelines(_line(redact([first + i, *rest])) for i, *rest in parsed.overlaps)
            first += len(parsed.lines)
    np.save(folder / "places.npy", np.cumsum(np.concatenate(sizes)))


def _json_forms(secret: str) -> set[str]:
    """The forms that a text takes in a line of JSON: escaped once, or twice in JSON text (arguments of calls)."""
    texts = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return {json.dumps(text, ensure_ascii=False)[1:-1] for text in texts}


def options_of(columns: ColumnArgs) -> ReadOptions:
    return read_options(columns.csv_delimiter, columns.encoding)


def _batches(files: Sequence[dict[str, Any]], columns: Sequence[ColumnArgs]) -> Iterator[RowBatch]:
    for number, file in enumerate(files):
        values = iter(read_values(Path(file["file"]), options_of(columns[file["part"]])))
        while batch := list(islice(values, BATCH)):
            yield RowBatch(number, batch)


def _parse_batch(
    batch: RowBatch, translate: Translation, held_out: EvaluationRows, secrets: Mapping[str, str]
) -> ParsedBatch:
    """Parse the values of a batch.

    Args:
        secrets: names of the environment's credentials, by their value in JSON form.
    """
    lines: list[bytes] = []
    accepted: list[list[Message]] = []
    rejected: list[tuple[int, int, str, int, str]] = []
    for line, value in batch.values:
        try:
            turns = _messages(value, translate)
            written = _line([batch.file, line, turns, tools_of(value)])
            held = [name for secret, name in secrets.items() if secret in written]
            if held:  # a model can reveal what it was trained on
                raise RowError("secret", f"holds the value of the environment variable {held[0]}")
            lines.append(written.encode())
            accepted.append(turns)
        except RowError as error:
            rejected.append((batch.file, line, error.reason, error.rows, error.detail))
    texts = [_full_text(turns) for turns in accepted]
    found = duplicates.fingerprints(texts)
    matches = held_out.matches(accepted, dict(zip(texts, found, strict=True)))
    overlaps = [(i, m.kind, m.similarity, m.file, m.line) for i, m in enumerate(matches) if m]
    rows_in = len(lines) + sum(rows for _, _, _, rows, _ in rejected)
    return ParsedBatch(batch.file, rows_in, lines, rejected, found, overlaps)


def _messages(value: object, translate: Translation) -> list[Message]:
    if isinstance(value, RowError):
        raise value
    return to_messages(value, translate)


def _full_text(turns: Sequence[Message]) -> str:
    return "\n".join(turn["content"] for turn in turns)


def _duplicate_row(store: RowStore, found: duplicates.Duplicate) -> list[Any]:
    earlier = store.row(found.earlier)
    return list(redact([found.row, found.kind, found.similarity, str(earlier.file), earlier.line]))


def _shortened(rejected: Sequence[Any]) -> list[Any]:
    """A rejection with a detail that is short and valid Unicode, although it may quote the row."""
    *location, detail = rejected
    detail = detail.encode(errors="replace").decode()
    return [*location, detail if len(detail) <= MAX_DETAIL else f"{detail[:MAX_DETAIL]} ..."]


_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)  # json.dumps would create one a line


def _line(value: object) -> str:
    return _ENCODER.encode(value) + "\n"


# Format detection


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
        return "messages"
    name, number = found.most_common(1)[0]
    if (name, number) != ("messages", len(rows)):
        log.info("%s: data_format=auto found %s (%d of the first %d rows)", path, name, number, len(rows))
    return name


def explain_misfit(first: Rejection, rows_in: int, data_format: str, options: ReadOptions) -> str:
    """One sentence that says why no row of a file can be used, and the remedy.

    Args:
        first: the rejection of its first row.
        data_format: the format or the strategy by which the rows were read.
    """
    rows = _first_values(first.file, options)
    found = count_formats(rows).most_common(1)
    fact, remedy = f"line {first.line} {first.detail}", "fix the rows"
    if all(isinstance(row, RowError) for row in rows):
        remedy = _other_file(first) or remedy
    elif data_format not in FORMATS:
        fact, remedy = f"{fact}; {_columns(rows)}", "name others with question_key and answer_key"
    elif found and found[0][0] != data_format:
        fact, remedy = f"{fact}; its rows look like {found[0][0]}", f"set data_format={found[0][0]}"
    elif not found:
        fact, remedy = f"{fact}; {_columns(rows)}", BY_COLUMN
    return f"{first.file}: none of its {rows_in:,} rows can be used as {data_format}: {fact}; {remedy}"


def _first_values(path: Path, options: ReadOptions) -> list[object]:
    return [value for _, value in islice(read_values(path, options), DETECT_ROWS)]


def _columns(rows: list[object]) -> str:
    keys = sorted({str(key) for row in rows if isinstance(row, dict) for key in row})
    return f"its rows have {', '.join(keys[:12])}" if keys else "it has no row with columns"


def _other_file(first: Rejection) -> str:
    """The remedy for a file whose content does not match its name; empty if none is known."""
    path = first.file
    with path.open("rb") as file:
        begin = file.read(4096).lstrip()
    other = next((kind for mark, kind in MARKS.items() if begin.startswith(mark)), None)
    if other:
        return other.format(name=path.name, stem=path.stem)
    if first.reason in REMEDIES:
        return REMEDIES[first.reason]
    return "make convert turns multi-line JSON into one row a line" if begin[:1] in (b"[", b"{") else ""
