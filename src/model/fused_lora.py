"""A frozen linear layer and its low-rank update as one operation, while a model is trained.

peft adds the update to the layer's output in three passes over it, and its gradient to the layer's input in
another. Here the product that makes the update adds it in the output's own memory, and likewise on the way back:
the same sum, rounded once.
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


class _FusedLora(torch.autograd.Function):  # type: ignore[misc]
    """y = x W^T + bias + scaling (z A^T) B^T, for frozen W: LoRA (arXiv:2106.09685), equation 3.

    x is (tokens, in), and z what dropout has left of it, or None where that is all of it. A and B may be of more
    bits than x: they are computed on in those of x.
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
    """In the place of peft's Linear.forward, of the one adapter `name`."""
    flat = x.to(dtype).flatten(0, -2)
    dropout, base = layer.lora_dropout[name], layer.base_layer
    dropped = dropout(flat) if layer.training and getattr(dropout, "p", 0.0) else None
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    out = _FusedLora.apply(flat, dropped, base.weight, base.bias, a, b, layer.scaling[name])
    return out.unflatten(0, x.shape[:-1])


def _fusable_adapter(module: nn.Module, dtype: torch.dtype) -> str | None:
    """The adapter's name, of a layer that is a frozen linear one and one plain update of it; None of others."""
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
    """Let the layers of `model` that are a frozen linear one and its update compute both at once, in `dtype`.

    The weights of such a layer must be where the layer is: not with hooks that fetch them, as ZeRO-3 has them.
    """
    wanted: torch.dtype = getattr(torch, dtype)
    updates = [(layer, name) for layer in model.modules() if (name := _fusable_adapter(layer, wanted))]
    for layer, name in updates:
        layer.forward = partial(_lora_forward, layer, name, wanted)
    try:
        yield
    finally:
        for layer, _ in updates:
            del layer.forward
