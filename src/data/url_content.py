"""What the body of an HTTP response is, by its first bytes: an HTML page, or a data file of a kind."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import DataError
from .readers import READERS, file_kind
from .readers.stream import ARCHIVES

BEGIN = 1 << 16  # bytes that are looked at
MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
SHEETS = (b"[Content_Types].xml", b"xl/")  # in the directory of a ZIP archive that is a workbook
TABLES = {b"\t": ".tsv", b",": ".csv", b";": ".csv"}
MARKUP = re.compile(rb"<(!doctype html|html|head|body|script|meta|\?xml)\b", re.IGNORECASE)
TITLE = re.compile(rb"<title[^>]*>(.*?)</title", re.IGNORECASE | re.DOTALL)
SHOWS_A_CUT = {".gz", ".zst", ".parquet", ".arrow", ".feather", ".xlsx", ".json"}  # kinds whose readers notice one


def refuse_page(begin: bytes, content_type: str, name: str, shown: str) -> None:
    """Raises: DataError if a body that begins with `begin` is a web page, not the data file `name`."""
    text = begin.lstrip(b"\xef\xbb\xbf \r\n\t")
    said = content_type.lower().startswith("text/html") and text.startswith(b"<")
    markup = MARKUP.match(text)
    if not said and (not markup or _kind(name) == ".txt"):
        return
    title = TITLE.search(text)
    words = " ".join(title[1].decode(errors="replace").split())[:60] if title else ""
    what = "an XML document" if markup and markup[1] == b"?xml" and not said else "an HTML page"
    raise DataError(
        f"{shown} returned {what}{f' ({words})' if words else ''}, not a data file",
        hint="open the address in a browser: it may need a login, or show the file instead of sending it "
        "(then use its raw or download address)",
    )


def shows_a_cut(name: str) -> bool:
    """Whether a reader notices that a file of this name was cut off, wherever that is."""
    return Path(name).suffix.lower() in SHOWS_A_CUT


def data_name(file: Path, name: str) -> str:
    """`name`, with the suffix that the content of `file` tells if it has none of a data file."""
    if _kind(name):
        return name
    with file.open("rb") as opened:
        suffix = suffix_of(opened.read(BEGIN)) or ""
    archive = Path(suffix).suffix if suffix.count(".") > 1 else ""
    return name.removesuffix(archive) + suffix


def suffix_of(begin: bytes) -> str | None:
    """The suffix of a data file that begins with `begin`, up to BEGIN bytes; None if it is of no known kind.

    >>> suffix_of(b'{"a": 1}\\n{"a": 2}\\n'), suffix_of(b'[{"a": 1}]'), suffix_of(b"a;b\\n1;2\\n"), suffix_of(b"?")
    ('.jsonl', '.json', '.csv', None)
    """
    magic = next((suffix for mark, suffix in MAGIC.items() if begin.startswith(mark)), "")
    if magic in ARCHIVES:
        try:
            inner = suffix_of(ARCHIVES[magic]().decompress(begin))
        except Exception:  # each decompressor has errors of its own
            return None
        return inner + magic if inner and not READERS[inner].binary else None
    if magic or begin.startswith(b"PK\3\4"):
        return magic or (".xlsx" if any(mark in begin for mark in SHEETS) else None)
    return None if b"\0" in begin else _text_suffix(begin.removeprefix(b"\xef\xbb\xbf").lstrip())


def _text_suffix(text: bytes) -> str | None:
    first, _, rest = text.partition(b"\n")
    if text.startswith(b"{"):
        try:
            json.loads(first)
        except ValueError:  # an object over several lines, or a row that is longer than BEGIN
            return ".json" if rest else ".jsonl"
        return ".jsonl"
    if text.startswith(b"["):
        return ".json"
    second = rest.partition(b"\n")[0]
    return next((kind for mark, kind in TABLES.items() if mark in first and mark in second), None)


def _kind(name: str) -> str:
    """The kind of data file of a name; empty if it is none."""
    try:
        return file_kind(Path(name))
    except DataError:
        return ""
