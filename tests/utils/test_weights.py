"""Damage of safetensors files is seen without torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from src.utils.weights import find_weight_problems

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    good = torch.randn(7, 5).to(dtype)
    good[0, 0] = torch.finfo(dtype).max
    save_file({"a": good, "ids": torch.full((3,), -1)}, tmp_path / "x.safetensors")
    assert find_weight_problems(tmp_path / "x.safetensors") == []
    broken = good.clone()
    broken[-1, -1] = bad
    save_file({"a": good, "b": broken}, tmp_path / "x.safetensors")
    assert find_weight_problems(tmp_path / "x.safetensors") == [
        "x.safetensors has numbers that are not finite, in b"
    ]


def test_a_truncated_file_is_not_readable(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert find_weight_problems(path) == [
        f"x.safetensors has {len(whole) - 1} bytes instead of the {len(whole)} of its header"
    ]
    for torn in (b"", whole[:4], whole[:20], b"\xff" * 30):
        path.write_bytes(torn)
        assert find_weight_problems(path)[0].startswith("x.safetensors is not a readable safetensors file")
