"""The columns of a table: what its first row names, and the values of the other rows under these names.

A column without a name may be empty (Excel writes commas for cells that were once used) or, as the first one, hold
row numbers (the index that pandas writes). Any other value in it is text that nobody named, and refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import DataError
from ...utils.units import count
from ..conversation import RowError


class Columns:
    """The columns that a header names.

    Raises: DataError if it is no header, names no column, or two columns alike.
    """

    def __init__(self, header: Sequence[str] | RowError, place: str) -> None:
        if isinstance(header, RowError):
            is_encoded = header.reason == "not_utf8" or "NUL" in header.detail  # as of UTF-16 without its mark
            remedy = "set encoding" if is_encoded else "name each column in the first row"
            raise DataError(f"{place} is not a header: it {header.detail}", hint=remedy)
        names = [name.strip() for name in header]
        twice = sorted({name for name in names if name and names.count(name) > 1})
        problems = [f"{place} names the column {name!r} twice" for name in twice]
        if not any(names):
            problems.append(f"{place} names no column")
        if problems:
            raise DataError(*problems, hint="give each column a distinct name in the first row")
        self.names = names
        self._all_named = all(names)

    def row(self, record: Sequence[str]) -> dict[str, str] | RowError:
        """The values of a record by the names of their columns."""
        if len(record) == len(self.names) and self._all_named:
            return dict(zip(self.names, record, strict=True))
        surplus = [value for value in record[len(self.names) :] if value.strip()]
        if len(record) < len(self.names) or surplus:
            fields = "1 field" if len(record) == 1 else f"{len(record)} fields"
            return RowError("wrong_columns", f"has {fields}, the header has {len(self.names)}")
        for number, (name, value) in enumerate(zip(self.names, record, strict=False), 1):
            if not name and value.strip() and not (number == 1 and value.strip().isdigit()):
                return RowError(
                    "wrong_columns", f"has a value in column {number}, which the first row does not name"
                )
        return {name: value for name, value in zip(self.names, record, strict=False) if name}

    def left_out(self) -> str:
        """What is said of the columns without a name; empty if there are none."""
        first = not self.names[0]
        others = self.names.count("") - first
        said = ["row numbers in the first column left out"] if first else []
        said += [f"{count(others, 'empty column')} left out"] if others else []
        return " and ".join(said)
