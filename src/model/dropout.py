"""Dropout that costs little on a CPU.

PyTorch draws a random number of its own for every value there: of a small model's layer that takes as long as its
matrix product. Sixteen random bits a value are enough, four values to a draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

BITS = 16
LOWEST = -(2**63)


class _FastDropout(torch.autograd.Function):  # type: ignore[misc]
    """Zeroes values by chance, and divides the others by the chance to stay (Srivastava et al. 2014, JMLR 15)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropped: int) -> torch.Tensor:
        draws = torch.empty(-(-x.numel() * BITS // 64), dtype=torch.int64).random_(LOWEST, None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        # in place, as numbers: from a bool the conversion takes ten times as long
        kept = bits.ge_(dropped - 2 ** (BITS - 1)).to(x.dtype).mul_(2**BITS / (2**BITS - dropped))
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = ctx.saved_tensors
        return grad * kept, None


def _dropout_forward(module: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """In the place of nn.Dropout.forward; the chance is rounded to one of 65,536."""
    dropped = round(module.p * 2**BITS)
    if not module.training or not dropped or dropped == 2**BITS or x.device.type != "cpu":
        return nn.Dropout.forward(module, x)
    return _FastDropout.apply(x, dropped)


@contextmanager
def use_fast_dropout(model: nn.Module) -> Iterator[None]:
    """Let the dropout layers of `model` draw few bits, where they are on a CPU."""
    layers = [m for m in model.modules() if type(m) is nn.Dropout and "forward" not in vars(m)]
    for layer in layers:
        layer.forward = partial(_dropout_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
