"""What Liger's kernels keep for the way back, on tensors that have a shape and no storage.

Liger (arXiv:2410.10989, section 3) computes a norm and a gated activation each in one kernel, which keeps its
inputs and little else, and writes gradients where those came from. Read off liger-kernel 0.8.5, ops/rms_norm.py
and ops/swiglu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

# Of liger-kernel's MODEL_TYPE_TO_APPLY_LIGER_FN those whose every norm and gated block it replaces.
LIGER_MODEL_TYPES = frozenset({
    "exaone4", "gemma", "gemma2", "gemma3_text", "granite", "hunyuan_v1_dense", "llama", "ministral", "mistral",
    "olmo2", "olmo3", "qwen2", "qwen3", "smollm3",
})  # fmt: skip


class _Norm(torch.autograd.Function):
    """Keeps its input and one number a row; the gradient takes the place of the one that came."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad, torch.empty_like(ctx.saved_tensors[1]) if ctx.needs_input_grad[1] else None


class _Gated(torch.autograd.Function):
    """Keeps gate and up; their gradients take their place."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return ctx.saved_tensors


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return _Norm.apply(x, module.weight)  # type: ignore[no-any-return]


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-any-return]


def _liger_forward(module: nn.Module) -> Any:
    """What stands in the place of the forward of `module`; None where Liger leaves it."""
    if type(module).__name__.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
        return _norm
    return _gated if all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")) else None


@contextmanager
def kernels(model: Any) -> Iterator[None]:
    """Let a simulated `model` keep what it would with Liger's kernels, where Liger knows it."""
    known = model.config.model_type in LIGER_MODEL_TYPES
    changed = [(m, by) for m in model.modules() if (by := _liger_forward(m))] if known else []
    for module, by in changed:
        module.forward = partial(by, module)
    try:
        yield
    finally:
        for module, _ in changed:
            del module.forward
