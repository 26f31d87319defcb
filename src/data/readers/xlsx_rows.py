"""Read XLSX workbooks row by row: the one sheet that has rows, with its values as Excel saves them to CSV."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree
from zipfile import BadZipFile, ZipFile

from ...errors import DataError
from ..conversation import RowError
from .columns import Columns
from .stream import CorruptFile, ReadOptions, Values

OLD_FORMAT = b"\xd0\xcf\x11\xe0"  # how .xls files begin, and encrypted .xlsx files
MAX_UNPACKED = 4 << 30  # bytes of a workbook; one that unpacks to more is no table of texts
# What openpyxl raises for a workbook that is damaged, or that another program wrote in its own way.
DAMAGE = (LookupError, ValueError, TypeError, AttributeError, BadZipFile, OSError, SyntaxError)
Cells = Sequence[Any]  # the cells of a row
Gaps = dict[int, list[tuple[int, str]]]  # by row: the column, and why a cell that shows a text there has none


def read_xlsx(file: io.BufferedReader, path: Path, _options: ReadOptions) -> Values:
    """Each row after the first one that is not empty as `{column: text}`, at its number in the sheet."""
    gaps: Gaps = {}
    rows = _sheet_rows(file, path, gaps)
    line, header = next(rows, (0, ()))
    if not line:
        return
    columns = Columns(_without_end(_texts(header)), f"{path}:{line}")
    width = len(columns.names)
    for number, cells in rows:
        try:
            if missing := [why for column, why in gaps.get(number, []) if column <= width]:
                raise RowError("wrong_columns", missing[0])
            texts = _without_end(_texts(cells))
        except RowError as error:
            yield number, error
        else:
            yield number, columns.row([*texts, *[""] * (width - len(texts))])


def _sheet_rows(file: io.BufferedReader, path: Path, gaps: Gaps) -> Iterator[tuple[int, Cells]]:
    """`(number, cells)` of each row that is not empty, of the only sheet that has any. Adds its gaps to `gaps`.

    Raises: DataError if several sheets have rows, or this is no workbook that can be read.
    """
    import openpyxl

    _check(file, path)
    try:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        filled = [sheet for sheet in book.worksheets if next(_filled(sheet), None)]
        if len(filled) > 1:
            names = ", ".join(sheet.title for sheet in filled)
            fact = f"{path} has several sheets with rows: {names}"
            raise DataError(fact, hint="keep one of them, or save each as .csv")
        for sheet in filled:
            with ZipFile(file) as parts, parts.open(sheet._worksheet_path) as source:
                gaps.update(_gaps(source))
            yield from _filled(sheet)
    except DAMAGE as error:
        raise CorruptFile(f"it is no workbook that can be read: {error}") from error


def _check(file: io.BufferedReader, path: Path) -> None:
    if file.peek(4).startswith(OLD_FORMAT):
        raise DataError(
            f"{path} is a workbook of the old format .xls, or has a password",
            hint="save it as .xlsx without a password",
        )
    try:
        with ZipFile(file) as parts:
            unpacked = sum(part.file_size for part in parts.infolist())
    except BadZipFile as error:
        raise CorruptFile(str(error)) from error
    if unpacked > MAX_UNPACKED:
        raise DataError(f"{path} unpacks to {unpacked:,} bytes", hint="save it as .csv")
    file.seek(0)


def _filled(sheet: Any) -> Iterator[tuple[int, Cells]]:
    sheet.reset_dimensions()  # which some programs write wrongly
    for number, cells in enumerate(sheet.iter_rows(), 1):
        if any(cell.value not in (None, "") for cell in cells):
            yield number, cells


def _gaps(source: IO[bytes]) -> Gaps:
    """The cells of a sheet that openpyxl reads as empty although people see a text in them."""
    from openpyxl.utils.cell import coordinate_to_tuple, range_boundaries

    found: Gaps = {}
    for _, element in ElementTree.iterparse(source):
        kind = element.tag.rpartition("}")[2]
        if kind == "c" and _lacks_value(element):
            row, column = coordinate_to_tuple(element.get("r", "A1"))
            why = f"has a formula without its value in the cell {element.get('r')}: save the file in Excel once"
            found.setdefault(row, []).append((column, why))
        elif kind == "mergeCell":
            left, top, right, bottom = range_boundaries(element.get("ref", "A1"))
            why = f"has merged cells, {element.get('ref')}: unmerge them and fill in each"
            for row in range(top, bottom + 1):
                column = left if row > top else left + 1
                found.setdefault(row, []).extend([(column, why)] if column <= right else [])
        if kind == "row":
            element.clear()  # its cells have been seen
    return found


def _lacks_value(cell: ElementTree.Element) -> bool:
    """Whether a cell has a formula that no program has calculated."""
    parts = {part.tag.rpartition("}")[2]: part for part in cell}
    return "f" in parts and cell.get("t") != "str" and ("v" not in parts or not parts["v"].text)


def _texts(cells: Cells) -> list[str]:
    return [_text(cell) for cell in cells]


def _without_end(texts: list[str]) -> list[str]:
    """The texts without the empty ones at the end, of which a sheet has any number."""
    while texts and not texts[-1].strip():
        texts.pop()
    return texts


def _text(cell: Any) -> str:
    """The value of a cell, with numbers of at most 15 digits, as Excel shows them."""
    value = cell.value
    if value is None:
        return ""
    if cell.data_type == "e":
        raise RowError("wrong_columns", f"has the error {value} in the cell {cell.coordinate}")
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return format(value, ".15g")
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return value.isoformat(sep=" ") if isinstance(value, datetime.datetime) else str(value)
