"""Check safetensors files without torch: whether they are complete, and whether all numbers are finite.

The format: the length of a JSON header in 8 bytes, the header (`{name: {dtype, shape, data_offsets}}`), the
bytes of the tensors (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Bits of the exponent: if all are set, the number is infinite or NaN (IEEE 754-2019, 3.4).
EXPONENTS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "U8": 8, "I8": 8, "BOOL": 8}
BLOCK = 1 << 24  # numbers read at once


def find_weight_problems(path: Path) -> list[str]:
    """The problems of a safetensors file, one message each."""
    if corruption := find_weight_corruption(path):
        return [corruption]
    start, header = read_header(path)
    bad = [name for name, about in header.items() if not _finite(path, start, about)]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return [f"{path.name} has numbers that are not finite, in {bad[0]}{more}"] if bad else []


def find_weight_corruption(path: Path) -> str:
    """Why a safetensors file cannot be read, from its header and size; empty if it can."""
    try:
        start, header = read_header(path)
    except (OSError, ValueError) as error:
        return f"{path.name} is not a readable safetensors file: {error}"
    expected = start + max((about["data_offsets"][1] for about in header.values()), default=0)
    size = path.stat().st_size
    if expected != size:
        return f"{path.name} has {size} bytes instead of the {expected} of its header"
    return next((f"{path.name} has another size of {name} than its shape" for name, about in header.items()
                 if not _fits_shape(about)), "")  # fmt: skip


def read_header(path: Path) -> tuple[int, dict[str, Mapping[str, Any]]]:
    """The offset of the first tensor, and `{name: {dtype, shape, data_offsets}}`. Raises: OSError, ValueError."""
    with path.open("rb") as file:
        first, size = file.read(8), path.stat().st_size
        if len(first) < 8:
            raise ValueError(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", first)
        if length > size:
            raise ValueError(f"a header of {length} bytes is longer than the file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    tensors = {name: about for name, about in header.items() if name != "__metadata__"}
    if wrong := next((name for name, about in tensors.items() if not _is_tensor(about)), None):
        raise ValueError(f"its header does not describe {wrong}")
    return 8 + length, tensors


def _is_tensor(about: Any) -> bool:
    """Whether an entry of a header has a dtype, a shape, and the two ends of its bytes."""
    if not isinstance(about, Mapping) or not isinstance(about.get("dtype"), str):
        return False
    lists = [about.get("shape"), about.get("data_offsets")]
    numbers = all(isinstance(each, list) and all(type(n) is int and n >= 0 for n in each) for each in lists)
    return numbers and len(about["data_offsets"]) == 2


def _fits_shape(about: Mapping[str, Any]) -> bool:
    bits = BITS.get(about["dtype"])
    begin, end = about["data_offsets"]
    return bits is None or math.prod(about["shape"]) * bits == 8 * (end - begin)


def _finite(path: Path, start: int, about: Mapping[str, Any]) -> bool:
    import numpy as np

    dtype, ones = EXPONENTS.get(about["dtype"], ("", 0))
    begin, end = about["data_offsets"]
    if not dtype or begin == end:
        return True
    numbers = np.memmap(path, np.uint8, "r", start + begin, (end - begin,)).view(dtype)
    return all(bool(((block & ones) != ones).all()) for block in _blocks(numbers))


def _blocks(numbers: Any) -> Iterator[Any]:
    for start in range(0, len(numbers), BLOCK):
        yield numbers[start : start + BLOCK]
