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
from ..utils.secrets import credentials, redact_secrets
from ..utils.workers import cores, map_ordered
from . import duplicates
from .column_mapping import choose_translation
from .contamination import EvaluationRows
from .detect import options_of, resolve_format
from .eval_rows import AS_WRITTEN, Reading, evaluation_translation, parse_evaluation_row
from .formats import (
    FORMATS,
    Conversation,
    ParsedRow,
    Rejection,
    Row,
    RowError,
    Translation,
    parse_row,
)
from .readers import describe, read_values
from .row_text import have_same_turns, row_structure, row_text
from .sources import DataPart
from .store import Array, RowStore, build_once, content_key, write_lines

BATCH = 500  # values that a process receives at once
MAX_DETAIL = 500  # characters
SMALL = 8 << 20  # bytes; with smaller files, further processes cost more than they save


class RowBatch(NamedTuple):
    file: int
    values: list[tuple[int, Any]]  # (line, value)


class UnreadKey(NamedTuple):
    """A column or key that is not read: in how many usable rows it holds a value, and the first of their lines."""

    rows: int
    line: int


class ParsedBatch(NamedTuple):
    """The result of a batch: JSON lines of the usable rows, their fingerprints, rejections and contamination."""

    file: int
    rows_in: int
    lines: list[bytes]
    rejected: list[tuple[int, int, str, int, str]]  # (file, line, reason, rows, detail)
    fingerprints: Array
    overlaps: list[tuple[int, duplicates.Kind, float, str, int]]  # index into lines, then as in HeldOutMatch
    unread: dict[str, UnreadKey]


def read_rows(path: Path, data_format: DataFormat | None = None, reading: Reading = AS_WRITTEN) -> list[Row]:
    """All rows of a small file. Without a format it is an evaluation file, whose rows are read by `reading`.

    Raises: DataError naming the bad rows.
    """
    translate = FORMATS[data_format].translate if data_format else evaluation_translation(reading.columns)
    rows, rejected = [], []
    for line, value in read_values(path, options_of(reading.columns)):
        try:
            found = _parse(value, translate) if data_format else parse_evaluation_row(value, reading, translate)
            rows.append(Row(path, line, found.messages, found.tools, found.template_kwargs))
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
        {
            "file": str(file),
            "sha256": sha256(file),
            "part": number,
            "format": part.data_format,
            "like_held_out": file in part.like_held_out,
        }
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
        unread = _parse_files(folder, files, columns, held_out, spool, processes)
        first_rows = np.cumsum([0, *(f["usable"] for f in files[:-1])]).tolist()
        write_json(folder / "about.json", {"files": files, "first_rows": first_rows, "unread": unread})
        store = RowStore(folder)
        found = spool.duplicates(lambda row: row_text(store.row(row).conversation), dedup_threshold, processes)
        write_lines(folder / "duplicates.jsonl", filter(None, (_duplicate_row(store, d) for d in found)))


def _parse_files(
    folder: Path, files: list[dict[str, Any]], columns: Sequence[ColumnArgs], held_out: EvaluationRows,
    spool: duplicates.FingerprintSpool, processes: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the rows, rejections and contamination of `files`. Adds the counts `rows_in` and `usable` to each.

    Returns: the columns and keys that are not read, each with its rows and the first of them.
    """
    translations = [choose_translation(columns[f["part"]], f["format"]) for f in files]
    secrets = {text: name for value, name in credentials().items() for text in _json_forms(value)}
    sizes: list[Array] = [np.zeros(1, np.int64)]
    first = 0  # row of the batch
    unread: dict[str, dict[str, Any]] = {}

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
            rejected.writelines(_line(_shortened(redact_secrets(r))) for r in parsed.rejected)
            overlaps.writelines(_line(redact_secrets([first + i, *rest])) for i, *rest in parsed.overlaps)
            first += len(parsed.lines)
            for key, (number, line) in parsed.unread.items():
                entry = unread.setdefault(
                    key, {"key": key, "rows": 0, "example": f"{files[parsed.file]['file']}:{line}"}
                )
                entry["rows"] += number
    np.save(folder / "places.npy", np.cumsum(np.concatenate(sizes)))
    return sorted(unread.values(), key=lambda entry: (-entry["rows"], entry["key"]))


def _json_forms(secret: str) -> set[str]:
    """The forms that a text takes in a line of JSON: escaped once, or twice in JSON text (arguments of calls)."""
    texts = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return {json.dumps(text, ensure_ascii=False)[1:-1] for text in texts}


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
    accepted: list[Conversation] = []
    rejected: list[tuple[int, int, str, int, str]] = []
    unread: dict[str, UnreadKey] = {}
    for line, value in batch.values:
        try:
            parsed = _parse(value, translate)
            conversation = [parsed.messages, parsed.tools, parsed.template_kwargs]
            while conversation[-1] is None:
                conversation.pop()
            written = _line([batch.file, line, *conversation])
            held = [name for secret, name in secrets.items() if secret in written]
            if held:  # a model can reveal what it was trained on
                raise RowError("secret", f"holds the value of the environment variable {held[0]}")
            lines.append(written.encode())
            accepted.append(Conversation(parsed.messages, parsed.tools, parsed.template_kwargs))
            for key in parsed.unread:
                before = unread.get(key, UnreadKey(0, line))
                unread[key] = before._replace(rows=before.rows + 1)
        except RowError as error:
            rejected.append((batch.file, line, error.reason, error.rows, error.detail))
    texts, structures = list(map(row_text, accepted)), list(map(row_structure, accepted))
    found = duplicates.fingerprints(texts, structures)
    known = {text: f for text, other, f in zip(texts, structures, found, strict=True) if not other}
    matches = held_out.matches([conversation.messages for conversation in accepted], known)
    overlaps = [(i, m.kind, m.similarity, m.file, m.line) for i, m in enumerate(matches) if m]
    rows_in = len(lines) + sum(rows for _, _, _, rows, _ in rejected)
    return ParsedBatch(batch.file, rows_in, lines, rejected, found, overlaps, unread)


def _parse(value: object, translate: Translation) -> ParsedRow:
    if isinstance(value, RowError):
        raise value
    return parse_row(value, translate)


def _duplicate_row(store: RowStore, found: duplicates.Duplicate) -> list[Any] | None:
    earlier = store.row(found.earlier)
    if not have_same_turns(store.row(found.row).conversation, earlier.conversation, found.kind):
        return None
    return list(redact_secrets([found.row, found.kind, found.similarity, str(earlier.file), earlier.line]))


def _shortened(rejected: Sequence[Any]) -> list[Any]:
    """A rejection with a detail that is short and valid Unicode, although it may quote the row."""
    *location, detail = rejected
    detail = detail.encode(errors="replace").decode()
    return [*location, detail if len(detail) <= MAX_DETAIL else f"{detail[:MAX_DETAIL]} ..."]


_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)  # json.dumps would create one a line


def _line(value: object) -> str:
    return _ENCODER.encode(value) + "\n"
