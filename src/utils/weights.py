"""What a safetensors file holds, read without torch: whether it is whole, and whether every number is finite.

The format: 8 bytes with the length of a JSON header, the header (`{name: {dtype, shape, data_offsets}}`), the
tensors' bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# An IEEE number whose exponent is all ones is infinite or none (IEEE 754-2019, 3.4). bfloat16: fp32's upper half.
EXPONENTS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
BLOCK = 1 << 24  # numbers looked at at once


def find_problems(path: Path) -> list[str]:
    """What is wrong with a safetensors file, one sentence each."""
    if told := find_corruption(path):
        return [told]
    start, header = _header(path)
    bad = [name for name, about in header.items() if not _finite(path, start, about)]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return [f"{path.name} holds numbers that are not finite, in {bad[0]}{more}"] if bad else []


def find_corruption(path: Path) -> str:
    """What keeps a safetensors file from being read, empty if nothing does; no number is looked at."""
    try:
        start, header = _header(path)
    except (OSError, ValueError, struct.error) as error:
        return f"{path.name} is no readable safetensors file: {error}"
    whole = start + max((about["data_offsets"][1] for about in header.values()), default=0)
    size = path.stat().st_size
    return "" if whole == size else f"{path.name} has {size} bytes, and its header speaks of {whole}"


def _header(path: Path) -> tuple[int, dict[str, Mapping[str, Any]]]:
    """Where the tensors begin, and what they are. Raises: ValueError, struct.error."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"its header would have {length} bytes")
        header = json.loads(file.read(length))
    return 8 + length, {name: about for name, about in header.items() if name != "__metadata__"}


def _finite(path: Path, start: int, about: Mapping[str, Any]) -> bool:
    kind, ones = EXPONENTS.get(about["dtype"], ("", 0))
    begin, end = about["data_offsets"]
    if not kind or begin == end:
        return True
    numbers = np.memmap(path, np.uint8, "r", start + begin, (end - begin,)).view(kind)
    return all(bool(((block & ones) != ones).all()) for block in _blocks(numbers))


def _blocks(numbers: Any) -> Iterator[Any]:
    for place in range(0, len(numbers), BLOCK):
        yield numbers[place : place + BLOCK]
