"""Attention for padding-free batches: examples are concatenated into one row, and each attends to itself only.

A batch is one row of T tokens, whose position ids restart with each example. `set_row_lengths` sets the lengths of
the examples, which the attention of `use_packed_attention` reads. On a GPU it calls one variable-length kernel
(flash-attn if installed, else PyTorch's); on a CPU it calls scaled_dot_product_attention once for each example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "rows_end_to_end"
# largest relative difference between the logits of packed and of single examples
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
PROBE_LENGTHS = (5, 3, 7)
# FlashAttention supports head sizes that are multiples of 8 up to 256, on Ampere or newer GPUs.
HEAD_SIZES = range(8, 257, 8)
MIN_CAPABILITY = (8, 0)
HAS_FLASH_ATTN = find_spec("flash_attn") is not None
# Newer versions of PyTorch need the argument for grouped-query attention; 2.11 detects it.
TAKES_ENABLE_GQA = "enable_gqa" in signature(varlen_attn).parameters


@dataclass
class _PackedRows:
    """Lengths of the examples in the current batch, kept for the recomputation of activations in backward."""

    lengths: tuple[int, ...] = ()
    read: bool = False
    ends: torch.Tensor | None = None  # (rows + 1,) int32 on the device, from 0

    def on(self, device: torch.device) -> torch.Tensor:
        if self.ends is None or self.ends.device != device:
            ends = torch.tensor([0, *self.lengths]).cumsum(0)
            self.ends = ends.to(device, torch.int32, non_blocking=True)
        return self.ends


_rows = _PackedRows()


def set_row_lengths(lengths: Sequence[int]) -> None:
    """Set the lengths of the concatenated examples for the next forward pass."""
    global _rows
    _rows = _PackedRows(tuple(lengths))


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each example, with the signature of transformers' AttentionInterface.

    Args:
        query: (1, heads, T, head size); key and value may have fewer heads (grouped-query attention).
    Returns: (1, T, heads, head size), and None for the attention weights.
    Raises: ValueError if the lengths do not add up to T.
    """
    if query.shape[0] != 1 or sum(_rows.lengths) != query.shape[2]:
        raise ValueError(f"a query of shape {tuple(query.shape)} does not fit examples of lengths {_rows.lengths}")
    _rows.read = True
    if query.is_cuda:
        query, key, value = cast_to_autocast(query, key, value)
        if softcap is None and not dropout and _kernel_supports(query, value):
            return _attend_varlen(query, key, value, scaling, sliding_window), None
    with _no_autocast_on_cpu(query.device):
        parts = (_fp32_on_cpu(t).split(_rows.lengths, dim=2) for t in (query, key, value))
        rows = [
            _attend_row(q, k, v, scaling, dropout, sliding_window, softcap) for q, k, v in zip(*parts, strict=True)
        ]
    return torch.cat(rows, dim=2).transpose(1, 2).to(query.dtype), None


def cast_to_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast the tensors to the dtype of autocast, if it is enabled.

    In full training the norms have fp32 weights, so queries and keys are fp32, and autocast does not cover the
    variable-length kernel.
    """
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return tuple(t.to(dtype) for t in tensors)


def _kernel_supports(query: torch.Tensor, value: torch.Tensor) -> bool:
    size = query.shape[3]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[3]
        and size in HEAD_SIZES
        and _capability(query.device) >= MIN_CAPABILITY
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _no_autocast_on_cpu(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU, compute in fp32: at 100 tokens twice as fast as bfloat16.

    The bfloat16 kernels are compiled and cached for every length, at about 5 MB each.
    """
    return torch.autocast("cpu", enabled=False) if device.type == "cpu" else nullcontext()


def _fp32_on_cpu(t: torch.Tensor) -> torch.Tensor:
    return t.float() if t.device.type == "cpu" else t


def _attend_row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, dropout: float,
    sliding_window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Attention of one example of L tokens: (1, heads, L, head size)."""
    length = q.shape[2]
    windowed = sliding_window is not None and length > sliding_window
    grouped = q.shape[1] != k.shape[1]
    if softcap is None and not windowed:
        return scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position[None, :]
    mask = distance >= 0
    if sliding_window is not None:
        mask &= distance < sliding_window
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling, enable_gqa=grouped)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (scaling if scaling is not None else q.shape[3] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)  # Gemma 2 (arXiv:2408.00118), section 2
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ v


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    """Attention of all examples in one kernel call: (1, heads, T, head size) to (1, T, heads, head size)."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    ends, longest = _rows.on(query.device), max(_rows.lengths)
    left = sliding_window - 1 if sliding_window is not None else -1
    if HAS_FLASH_ATTN:
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q, k, v, ends, ends, longest, longest, softmax_scale=scaling, causal=True, window_size=(left, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    else:
        groups = {"enable_gqa": True} if TAKES_ENABLE_GQA else {}
        out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(left, 0), **groups)
    return out.unsqueeze(0)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextmanager
def use_packed_attention(model: Any) -> Iterator[None]:
    """Make `attend` the attention of `model` inside."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def why_unsupported(model: Any) -> str | None:
    """Why `model` does not support packed examples; None if a trial gives the same logits.

    The trial compares the logits of short examples, single and packed. It detects layers that mix neighbouring
    examples, such as state spaces, convolutions, or position biases over the whole row.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(sum(PROBE_LENGTHS), device=model.device).mul_(7).add_(3) % vocabulary
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            single = [model(input_ids=row[None], use_cache=False).logits[0] for row in ids.split(PROBE_LENGTHS)]
            with use_packed_attention(model):
                set_row_lengths(PROBE_LENGTHS)
                packed = model(
                    input_ids=ids[None], position_ids=position_ids(PROBE_LENGTHS).to(ids.device), use_cache=False
                ).logits[0]
    except Exception as error:  # any error of an unknown architecture
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        return f"{type(model).__name__} does not support packed examples ({reason})"
    finally:
        model.train(training)
    if not _rows.read:
        return f"{type(model).__name__} does not use transformers' attention interface"
    expected = torch.cat(single).float()
    difference = (packed.float() - expected).norm() / expected.norm().clamp(min=1e-12)
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
    if difference <= tolerance:
        return None
    return f"examples would affect each other in {type(model).__name__} (relative difference {difference:.2g})"


def position_ids(lengths: Sequence[int]) -> torch.Tensor:
    """(1, T): 0, 1, 2 ... for every example."""
    return torch.cat([torch.arange(n) for n in lengths])[None]
