"""Read data files of every kind, row by row.

To add a kind, write a function `(open file, path, options) -> iterator of (position, value)` and enter it in
READERS by its suffix. It reads in bounded memory and skips blank lines only: a row that cannot be read is yielded
as a RowError.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...errors import ConfigError, DataError
from .arrow_rows import read_arrow, read_parquet
from .csv_rows import DELIMITERS, describe_csv, describe_tsv, read_csv, read_tsv
from .json_rows import read_json, read_jsonl
from .stream import (
    ARCHIVES,
    DEFAULTS,
    REST_OF_FILE,
    CorruptFile,
    ReadOptions,
    Values,
    open_data,
    open_text,
    other_encoding,
    other_file,
)
from .text_rows import describe_txt, read_txt
from .xlsx_rows import read_xlsx

__all__ = ["DEFAULTS", "REST_OF_FILE", "ReadOptions", "other_file"]
BELONGS_TO = "belongs_to.json"  # says which training files a folder of evaluation files is for; no data
# Files beside data that describe it: of `datasets` and of LLaMA-Factory.
NO_DATA = {BELONGS_TO, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class Kind(NamedTuple):
    """How files of a kind are read.

    describe: says how a file is read where that depends on its content; empty if there is nothing to say.
    binary: the file is no text, and compressed already.
    by_name: the file is data only where it is named: a folder may hold such files for people.
    """

    read: Callable[[io.BufferedReader, Path, ReadOptions], Values]
    describe: Callable[[io.BufferedReader, Path, ReadOptions], str] = lambda _file, _path, _options: ""
    binary: bool = False
    by_name: bool = False


READERS: dict[str, Kind] = {
    ".jsonl": Kind(read_jsonl),
    ".ndjson": Kind(read_jsonl),
    ".json": Kind(read_json),
    ".csv": Kind(read_csv, describe_csv),
    ".tsv": Kind(read_tsv, describe_tsv),
    ".txt": Kind(read_txt, describe_txt, by_name=True),
    ".parquet": Kind(read_parquet, binary=True),
    ".arrow": Kind(read_arrow, binary=True),
    ".feather": Kind(read_arrow, binary=True),
    ".xlsx": Kind(read_xlsx, binary=True),
}


OTHER_KINDS = {  # what people have instead -> the way out
    (".xls", ".xlsm", ".xlsb", ".ods", ".numbers"): "save it as .xlsx or .csv",
    (".jsonlines", ".jl"): "name it .jsonl",
    (".zip", ".tar", ".tgz", ".7z", ".rar"): "unpack it",
    (".bz2", ".xz", ".lz4"): f"unpack it, or compress it as {' or '.join(ARCHIVES)}",
    (".pkl", ".pickle", ".pt", ".npy", ".npz"): "write its rows to .jsonl: a pickle can run any code",
    (".md", ".pdf", ".docx", ".doc", ".html", ".xml"): "save its text as .txt or .jsonl",
}


def read_options(csv_delimiter: str | None, encoding: str | None) -> ReadOptions:
    """The settings of the same names as readers take them.

    Raises: ConfigError if one of them cannot be used.
    """
    problems = []
    delimiter = next((d for d, name in DELIMITERS.items() if name == csv_delimiter), csv_delimiter or "")
    if csv_delimiter and (len(delimiter) != 1 or delimiter in '"\r\n'):
        known = ", ".join(DELIMITERS.values())
        problems.append(f"csv_delimiter={csv_delimiter}: should be one character, or one of {known}")
    try:
        if encoding:
            "".encode(encoding)  # unlike codecs.lookup, this refuses codecs that are no text encoding
            codecs.getincrementaldecoder(encoding)
    except LookupError:
        problems.append(f"encoding={encoding}: should be the name of a text encoding, such as cp1252 or gb18030")
    if problems:
        raise ConfigError(*problems)
    return ReadOptions(delimiter, encoding or "")


def read_values(path: Path, options: ReadOptions = DEFAULTS) -> Values:
    """`(position, value)` of each row. The position is its first line or, in a table without lines, its number.

    A RowError as value stands for a row that cannot be read, or for the rest of a file.

    Raises: DataError, on iteration, if the file cannot be used: its kind is unknown, it cannot be opened, its
    header does not name the columns, or it is corrupt (after the rows before the corruption).
    """
    kind, rows = READERS[file_kind(path)], 0
    try:
        with open_data(path) if kind.binary else open_text(path, options.encoding) as file:
            for position, value in kind.read(file, path, options):
                rows += 1
                yield position, value
    except CorruptFile as error:
        where = f"after row {rows}" if rows else "before its first row"
        problem = f"{path} is truncated or corrupt {where}: {error}"
        raise DataError(problem, hint="fetch or create the file again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", hint="check the path") from error


def describe(path: Path, options: ReadOptions) -> str:
    """How a file is read, where that depends on its content: `csv_delimiter=semicolon`; else empty.

    Raises: as read_values.
    """
    kind = READERS[file_kind(path)]
    if kind.binary:
        return ""
    try:
        other = other_encoding(path, options.encoding)
        with open_text(path, options.encoding) as file:
            said = kind.describe(file, path, options)
        return ", ".join(filter(None, (other and f"encoding={other}", said)))
    except (CorruptFile, OSError):
        return ""  # read_values says it


def file_kind(path: Path) -> str:
    """The suffix in READERS of a file name, without the suffix of a compression.

    Raises: DataError if the suffix is unknown.
    """
    compressed = path.suffix.lower() in ARCHIVES
    kind = (Path(path.stem) if compressed else path).suffix.lower()
    if kind not in READERS:
        known = f"supported are {', '.join(READERS)}, and text files also with {' or '.join(ARCHIVES)}"
        hint = next((hint for kinds, hint in OTHER_KINDS.items() if kind in kinds), known)
        raise DataError(f"{path} has an unsupported extension", hint=hint)
    if compressed and READERS[kind].binary:
        raise DataError(
            f"{path} is compressed twice: {kind} is compressed already", hint=f"unpack it to {path.stem}"
        )
    return kind


def is_data_file(path: Path) -> bool:
    """Whether a file of this name is data without being named: it has a reader, and is not for people."""
    try:
        return not READERS[file_kind(path)].by_name and path.name not in NO_DATA
    except DataError:
        return False
