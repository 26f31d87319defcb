"""Check safetensors files without torch: whether they are complete, and whether all numbers are finite.

The format: the length of a JSON header in 8 bytes, the header (`{name: {dtype, shape, data_offsets}}`), the
bytes of the tensors (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Bits of the exponent: if all are set, the number is infinite or NaN (IEEE 754-2019, 3.4).
EXPONENTS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
BLOCK = 1 << 24  # numbers read at once


def find_weight_problems(path: Path) -> list[str]:
    """The problems of a safetensors file, one message each."""
    if corruption := find_weight_corruption(path):
        return [corruption]
    start, header = _header(path)
    bad = [name for name, about in header.items() if not _finite(path, start, about)]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return [f"{path.name} has numbers that are not finite, in {bad[0]}{more}"] if bad else []


def find_weight_corruption(path: Path) -> str:
    """Why a safetensors file cannot be read, from its header and size; empty if it can."""
    try:
        start, header = _header(path)
    except (OSError, ValueError, struct.error) as error:
        return f"{path.name} is not a readable safetensors file: {error}"
    expected = start + max((about["data_offsets"][1] for about in header.values()), default=0)
    size = path.stat().st_size
    return "" if expected == size else f"{path.name} has {size} bytes instead of the {expected} of its header"


def _header(path: Path) -> tuple[int, dict[str, Mapping[str, Any]]]:
    """The offset of the first tensor, and the header. Raises: ValueError, struct.error."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"a header of {length} bytes is longer than the file")
        header = json.loads(file.read(length))
    return 8 + length, {name: about for name, about in header.items() if name != "__metadata__"}


def _finite(path: Path, start: int, about: Mapping[str, Any]) -> bool:
    dtype, ones = EXPONENTS.get(about["dtype"], ("", 0))
    begin, end = about["data_offsets"]
    if not dtype or begin == end:
        return True
    numbers = np.memmap(path, np.uint8, "r", start + begin, (end - begin,)).view(dtype)
    return all(bool(((block & ones) != ones).all()) for block in _blocks(numbers))


def _blocks(numbers: Any) -> Iterator[Any]:
    for start in range(0, len(numbers), BLOCK):
        yield numbers[start : start + BLOCK]
