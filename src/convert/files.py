"""Turn JSON files of any layout, and ChatGPT and Claude exports, into JSONL: one JSON object per line.

Rows are written from the text of the source, so that numbers come out exactly as they went in.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..data.readers import NO_DATA
from . import chatgpt, claude
from .chatgpt import chatgpt_conversations, left_out_summary
from .json_text import JsonValue, fits_utf8, one_line, read_json_values
from .row_lists import wrapped_rows

TYPE_NAMES = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
CORRECT_IT = "Correct it and run the command again; nothing was written for this file."


class Export(NamedTuple):
    """The conversations that a program exports: how they are recognised, and read as a tree of messages.

    key: what every conversation of it has.
    """

    recognises: Callable[[object], bool]
    key: str
    as_tree: Callable[[Any], object] = lambda conversation: conversation


EXPORTS = {
    "ChatGPT": Export(chatgpt.is_conversation, "mapping"),
    "Claude": Export(claude.is_conversation, "chat_messages", claude.as_tree),
}


@dataclass(frozen=True)
class ConversionResult:
    """What was done with one file.

    status: `ok`, `converted`, `would convert`, `up to date`, `skipped` or `refused`.
    rows: the number of JSONL rows; 0 if refused or skipped.
    detail: the text after the path, which begins with `:line:column: ` if a position is known.
    """

    path: Path
    status: str
    rows: int
    detail: str

    def __str__(self) -> str:
        return f"{self.path}{self.detail}"


class ConversionError(Exception):
    """A file that cannot be converted. `position` is `:line:column`, `:line` or empty."""

    def __init__(self, fact: str, remedy: str, position: str = "") -> None:
        super().__init__(f"{position}: {fact}. {remedy}")


def convert_tree(paths: Iterable[Path], *, force: bool = False, check: bool = False) -> list[ConversionResult]:
    """Convert every `.json` and `.jsonl` file of `paths`, which are files or folders to search recursively.

    Returns: one result per file, sorted by path. A refused file does not stop the others.
    """
    found: dict[Path, ConversionResult | None] = {}
    for path in paths:
        for file, result in _find(path):
            found.setdefault(file, result)
    distinct = {os.path.abspath(file) if found[file] else os.path.realpath(file): file for file in found}
    jsonl_first = sorted(distinct.values(), key=lambda file: (file.suffix.lower() != ".jsonl", file))
    results = [found[file] or convert_file(file, force=force, check=check) for file in jsonl_first]
    return sorted(results, key=lambda result: result.path)


def convert_file(path: Path, *, force: bool = False, check: bool = False) -> ConversionResult:
    """Convert one file: `x.jsonl` in place, `x.json` to `x.jsonl` in the same folder.

    A bad file raises nothing: its result has the status `refused` and says where and why.

    Args:
        force: replace an `x.jsonl` that differs, and keep it as `x.jsonl.orig`.
        check: write nothing.
    """
    try:
        return _convert(Path(os.path.realpath(path)) if path.is_symlink() else path, force, check)
    except ConversionError as refusal:
        return ConversionResult(path, "refused", 0, str(refusal))
    except OSError as error:
        return _unusable(path, error)


def exit_code(results: Iterable[ConversionResult]) -> int:
    """2 if a file was refused, else 1 if `check` found something to convert, else 0."""
    statuses = {result.status for result in results}
    return 2 if "refused" in statuses else int("would convert" in statuses)


def summary(results: Sequence[ConversionResult]) -> str:
    """`3 files: 2 ok, 1 converted`."""
    counts = Counter(result.status for result in results)
    files = "1 file" if len(results) == 1 else f"{len(results)} files"
    return f"{files}: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))


def _find(path: Path) -> Iterator[tuple[Path, ConversionResult | None]]:
    """The files to convert under `path`, with a result for those that are skipped or cannot be read."""
    if not path.is_dir():
        yield path, None
        return
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(path, onerror=unreadable.append):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        wanted = [name for name in names if name.lower().endswith((".json", ".jsonl")) and name[0] != "."]
        wanted = [name for name in wanted if name not in NO_DATA]
        for file in (Path(folder, name) for name in subfolders + wanted):
            if file.is_symlink():
                detail = ": skipped, a symbolic link. Give the path of its target to convert it."
                yield file, ConversionResult(file, "skipped", 0, detail)
            elif file.name in wanted:
                yield file, None
    for error in unreadable:
        yield Path(error.filename), _unusable(Path(error.filename), error)


def _unusable(path: Path, error: OSError) -> ConversionResult:
    detail = f": {error.strerror or error}. Check the path, its permissions and the free space."
    return ConversionResult(path, "refused", 0, detail)


def _convert(path: Path, force: bool, check: bool) -> ConversionResult:
    raw, in_place = _read(path), path.suffix.lower() == ".jsonl"
    text = _decode(raw)
    values, wrapped = _unwrapped(_objects(text))
    export = _export_of(values)
    if in_place and not export and not wrapped and _is_jsonl(text, values):
        bom = "; it starts with a byte order mark, which is kept" if raw.startswith(b"\xef\xbb\xbf") else ""
        return ConversionResult(path, "ok", len(values), f": ok ({_rows(len(values))}){bom}")
    rows, note = _export_rows(values, export) if export else ([one_line(v.source) for v in values], wrapped)
    data = "".join(row + "\n" for row in rows).encode()
    target = path if in_place else path.with_suffix(".jsonl")
    if not in_place and _is_current(target, data, force):
        return ConversionResult(path, "up to date", len(rows), f": up to date ({_rows(len(rows))} in {target})")
    done = f" ({_rows(len(rows))})" + ("" if in_place else f" to {target}")
    if check:
        return ConversionResult(path, "would convert", len(rows), f": would be converted{done}{note}")
    kept = _write(target, data, like=path)
    kept_as = f", {'original' if in_place else 'old rows'} kept as {kept}" if kept else ""
    return ConversionResult(path, "converted", len(rows), f": converted{done}{kept_as}{note}")


def _unwrapped(values: list[JsonValue]) -> tuple[list[JsonValue], str]:
    """The rows inside the only object of a file, and a note that says so; else `values` and no note.

    Raises: ConversionError if it holds several lists of rows.
    """
    is_export = any(export.recognises(value.value) for export in EXPORTS.values() for value in values)
    lists, others = wrapped_rows(values[0]) if len(values) == 1 and not is_export else ({}, [])
    if len(lists) > 1:
        fact = f"the object holds several lists of rows: {', '.join(lists)}"
        raise ConversionError(fact, "Put each list into a file of its own.", f":{values[0].line}")
    for key, rows in lists.items():
        return rows, f"; the rows of {key}" + (f"; left out: {', '.join(others)}" if others else "")
    return values, ""


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _read(path: Path) -> bytes:
    if path.exists() and path.suffix.lower() not in (".json", ".jsonl"):
        raise ConversionError("not a .json or .jsonl file", "Rename it if it holds JSON.")
    if path.exists() and not path.is_file():
        raise ConversionError("not a regular file", "Give a file or a folder.")
    raw = path.read_bytes()
    if not raw.strip(b"\xef\xbb\xbf \t\r\n"):
        raise ConversionError("the file is empty", "Fill it or delete it.")
    return raw


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        fact = f"byte 0x{raw[error.start]:02x} is not UTF-8 text"
        raise ConversionError(fact, "Save the file as UTF-8 and run the command again.", f":{line}") from None


def _objects(text: str) -> list[JsonValue]:
    """All values of `text`.

    Raises: ConversionError unless there is at least one, and all are objects.
    """
    try:
        values = list(read_json_values(text))
    except json.JSONDecodeError as error:
        raise ConversionError(error.msg, CORRECT_IT, f":{error.lineno}:{error.colno}") from None
    for line, value, _ in values:
        if not isinstance(value, dict):
            kind = TYPE_NAMES.get(type(value), "a number")
            raise ConversionError(
                f"{kind} where an object is needed", "Make each row an object, {...}.", f":{line}"
            )
    if not values:
        raise ConversionError("the array is empty", "Fill it or delete the file.", ":1")
    return values


def _is_jsonl(text: str, values: Sequence[JsonValue]) -> bool:
    lines = [value.line for value in values]
    alone = len(set(lines)) == len(lines) and not any("\n" in v.source or "\r" in v.source for v in values)
    return alone and not text.lstrip().startswith("[")


def _export_of(values: Sequence[JsonValue]) -> str:
    """The program whose export the values are, a key of EXPORTS; empty if they are none.

    Raises: ConversionError if a file mixes its conversations with other objects.
    """
    known = [(name, export) for name, export in EXPORTS.items() if any(export.recognises(v.value) for v in values)]
    for name, export in known:
        for line, value, _ in values:
            if isinstance(value, dict) and export.key not in value:
                fact = f"this object is not a {name} conversation, while others in the file are"
                raise ConversionError(fact, "Put the two kinds into separate files.", f":{line}")
        return name
    return ""


def _export_rows(values: Sequence[JsonValue], name: str) -> tuple[list[str], str]:
    """The rows of an export, and a note on what was omitted."""
    found = chatgpt_conversations(EXPORTS[name].as_tree(value.value) for value in values)
    without = "".join(f"\n  no row from {reason}" for reason in found.without_row)
    left_out = left_out_summary(found.left_out)
    note = (f"; left out: {left_out}" if left_out else "") + without
    if not found.rows:
        raise ConversionError("no conversation has a question and an answer", "Nothing was written" + note)
    rows = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in found.rows]
    rows = [row if fits_utf8(row) else json.dumps(json.loads(row)) for row in rows]
    return rows, note


def _is_current(target: Path, data: bytes, force: bool) -> bool:
    """Whether `target` already holds `data`.

    Raises: ConversionError if it holds other content and `force` is not set.
    """
    if not os.path.lexists(target):
        return False
    if target.read_bytes() == data:
        return True
    if target.is_symlink():
        raise ConversionError(
            f"{target} is a symbolic link to other rows", "Remove the link; nothing was written."
        )
    if not force:
        fact = f"{target} exists and holds other rows, so it was not replaced"
        raise ConversionError(
            fact, f"Move {target.name} away, or use --force, which keeps it as {target.name}.orig."
        )
    return False


def _write(target: Path, data: bytes, *, like: Path) -> Path | None:
    """Write `data` to `target` atomically. Returns: the backup of an existing file, or None."""
    mode = stat.S_IMODE((target if target.exists() else like).stat().st_mode)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        kept = _keep(target) if target.exists() else None
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)
    return kept


def _keep(path: Path) -> Path:
    """Back `path` up under the first free name of `.orig`, `.orig.2`, `.orig.3`, ..."""
    number = 1
    while True:
        kept = path.with_name(f"{path.name}.orig" + (f".{number}" if number > 1 else ""))
        try:
            _link_or_copy(path, kept)
            return kept
        except FileExistsError:
            number += 1


def _link_or_copy(path: Path, new: Path) -> None:
    try:
        os.link(path, new)
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        with open(path, "rb") as source, open(new, "xb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
        shutil.copystat(path, new)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
