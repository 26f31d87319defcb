"""Faster LoRA layers for training: a frozen linear layer fused with its update, and a fast dropout.

peft adds the low-rank update to the layer's output in three passes over it, and adds the gradient to that of the
input in another. The fused operation accumulates both in place in a matrix product: the same sum, rounded once.

On a CPU, PyTorch's dropout draws one random number for each value, which in a small model takes as long as the
layer's matrix product. `use_fast_dropout` needs 16 random bits for each value and draws four values at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

BITS = 16  # random bits for each value of a dropout
LOWEST = -(2**63)


class _FusedLora(torch.autograd.Function):  # type: ignore[misc]
    """y = x W^T + bias + scaling (z A^T) B^T with frozen W: LoRA (arXiv:2106.09685), equation 3.

    Args:
        x: (tokens, in).
        z: x after dropout, or None without dropout.
        a, b: (rank, in) and (out, rank); cast to the dtype of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, z: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
        a: torch.Tensor, b: torch.Tensor, scaling: float,
    ) -> torch.Tensor:  # fmt: skip
        read = x if z is None else z
        down, up = a.to(x.dtype), b.to(x.dtype)
        low = read @ down.t()
        ctx.save_for_backward(read, low, weight, down, up)
        ctx.scaling, ctx.types = scaling, (a.dtype, b.dtype)
        return linear(x, weight, bias).addmm_(low, up.t(), alpha=scaling)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        read, low, weight, down, up = ctx.saved_tensors
        of_low = (grad @ up).mul_(ctx.scaling)
        of_a = (of_low.t() @ read).to(ctx.types[0])
        of_b = (grad.t() @ low).mul_(ctx.scaling).to(ctx.types[1])
        of_x = grad @ weight if ctx.needs_input_grad[0] else None
        of_z = of_low @ down if ctx.needs_input_grad[1] else None
        if of_x is not None and of_z is None:
            of_x.addmm_(of_low, down)
        return of_x, of_z, None, None, of_a, of_b, None


def _lora_forward(layer: Any, name: str, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    """Replaces peft's Linear.forward for the adapter `name`."""
    flat = x.to(dtype).flatten(0, -2)
    dropout, base = layer.lora_dropout[name], layer.base_layer
    dropped = dropout(flat) if layer.training and getattr(dropout, "p", 0.0) else None
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    out = _FusedLora.apply(flat, dropped, base.weight, base.bias, a, b, layer.scaling[name])
    return out.unflatten(0, x.shape[:-1])


def _fusable_adapter(module: nn.Module, dtype: torch.dtype) -> str | None:
    """The name of the only adapter of a frozen linear layer with a plain LoRA update; None for any other layer."""
    if type(module) is not Linear or type(module.base_layer) is not nn.Linear or module.lora_variant:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    frozen = not any(p.requires_grad for p in module.base_layer.parameters())
    if len(names) != 1 or module.merged or module.disable_adapters or not frozen:
        return None
    biased = module.lora_B[names[0]].bias is not None
    return names[0] if module.base_layer.weight.dtype == dtype and not biased else None


@contextmanager
def use_fused_lora(model: nn.Module, dtype: str) -> Iterator[None]:
    """Compute the frozen linear layers of `model` and their LoRA updates in one operation, in `dtype`, inside.

    The layers must hold their own weights: hooks that gather sharded weights, as ZeRO-3 has, are not called.
    """
    compute: torch.dtype = getattr(torch, dtype)
    fusable = [(layer, name) for layer in model.modules() if (name := _fusable_adapter(layer, compute))]
    for layer, name in fusable:
        layer.forward = partial(_lora_forward, layer, name, compute)
    try:
        yield
    finally:
        for layer, _ in fusable:
            del layer.forward


class _FastDropout(torch.autograd.Function):  # type: ignore[misc]
    """Zeroes values at random and divides the others by the keep probability (Srivastava et al. 2014, JMLR 15)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropped: int) -> torch.Tensor:
        draws = torch.empty(-(-x.numel() * BITS // 64), dtype=torch.int64).random_(LOWEST, None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        # in place, as integers: converting a bool tensor takes ten times as long
        kept = bits.ge_(dropped - 2 ** (BITS - 1)).to(x.dtype).mul_(2**BITS / (2**BITS - dropped))
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = ctx.saved_tensors
        return grad * kept, None


def _dropout_forward(module: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """Replaces nn.Dropout.forward; the probability is rounded to a multiple of 1 / 65,536."""
    dropped = round(module.p * 2**BITS)
    if not module.training or not dropped or dropped == 2**BITS or x.device.type != "cpu":
        return nn.Dropout.forward(module, x)
    return _FastDropout.apply(x, dropped)


@contextmanager
def use_fast_dropout(model: nn.Module) -> Iterator[None]:
    """Use the fast dropout in the dropout layers of `model` inside; on a GPU they are unchanged."""
    layers = [m for m in model.modules() if type(m) is nn.Dropout and "forward" not in vars(m)]
    for layer in layers:
        layer.forward = partial(_dropout_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
