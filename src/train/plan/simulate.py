"""Simulates a training step on tensors with a shape and no storage, to measure its memory without the weights.

The architecture is built from config.json on torch's meta device and the tuning method is applied to it. The
forward and backward pass of the training run on fake tensors (torch.FakeTensorMode): every operation returns a
shape and computes nothing. A dispatch mode counts each storage from its creation to its release, so that tensors
saved by autograd, casts by autocast, checkpointing, inputs of adapters and the chunked loss count as in training.
Replacements simulate what a GPU does differently: one attention kernel for all examples, dropout with a mask of
bytes, 4-bit layers that are dequantized to 16 bits during their product, and Liger's kernels.

Liger (arXiv:2410.10989, section 3) computes a norm and a gated activation each in one kernel, which saves its
inputs and little else, and writes gradients in place (liger-kernel 0.8.5, ops/rms_norm.py and ops/swiglu.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AttentionMaskInterface

from ...data.store import IGNORE_INDEX, Example
from ...model import adapters, embeddings, load, methods, packed_attention
from ...model.source import Source
from ...schema import TrainConfig
from .. import losses
from ..collators import build_collator
from ..fit import CPU_SHAPE_MULTIPLE, use_custom_kernels
from ..losses import Objective
from ..parent import find_parent
from .memory import PassMemory, is_four_bit, parameter_bytes

GPU_ATTENTION = "one_kernel"
# The model types of liger-kernel's MODEL_TYPE_TO_APPLY_LIGER_FN of which it replaces every norm and gated block.
LIGER_MODEL_TYPES = frozenset({
    "exaone4", "gemma", "gemma2", "gemma3_text", "granite", "hunyuan_v1_dense", "llama", "ministral", "mistral",
    "olmo2", "olmo3", "qwen2", "qwen3", "smollm3",
})  # fmt: skip


def build_tuned_meta_model(
    cfg: TrainConfig, base: Source, dtype: str, steps: int, labels: Sequence[str] = (), tokenizer: Any = None
) -> Any:
    """The model with the tuning method applied, on the meta device.

    Raises: ModelError if config.json cannot be loaded, or the method cannot be applied.
    """
    model = load.build_meta_model(
        base, dtype, four_bit=methods.METHODS[cfg.method].four_bit, trust_remote_code=cfg.trust_remote_code,
        task=cfg.task, labels=labels,
    )  # fmt: skip
    parent = find_parent(cfg)
    adapter = parent.folder if parent and parent.is_adapter else None
    with torch.device("meta"):
        model.tie_weights()  # as in a model that was loaded: an adapter wraps or copies the tied layers
        embeddings.add_rows(model, tokenizer, cfg)
        model = adapters.apply_method(model, cfg, base, steps=steps, task=cfg.task, parent=adapter)
        if methods.METHODS[cfg.method].config is None:
            model.tie_weights()  # a cast to fp32 separates them on the meta device
    return model


def backward_pass(
    model: Any, examples: Sequence[Example], cfg: TrainConfig, dtype: str, device: str, checkpointing: bool,
    tokenizer: Any, with_liger: bool = False,
) -> PassMemory:  # fmt: skip
    """The peak of the forward and backward pass of one batch.

    With gradient accumulation, the gradients of the micro-batches before exist already.
    Args:
        model: on the meta device; it is unchanged afterwards.
    """
    with _fake_parameters(model) as mode:
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with mode:
            if cfg.gradient_accumulation_steps > 1:
                for p in model.parameters():
                    p.grad = torch.empty_like(p) if p.requires_grad else None
            accumulated = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            loss_of = _loss(model, examples, cfg, dtype, device, tokenizer, with_liger)
            with _StorageTracker(model) as tracker, loss_of as loss:
                loss.backward()
                made = [p.grad.untyped_storage()._cdata for p in model.parameters() if p.grad is not None]
            held = tracker.at_peak({tracker.numbers[key] for key in made})
    return held._replace(gradients=held.gradients + accumulated)


def forward_pass(
    model: Any, examples: Sequence[Example], cfg: TrainConfig, dtype: str, device: str, tokenizer: Any,
    with_liger: bool = False,
) -> PassMemory:  # fmt: skip
    """The peak of the evaluation of one batch."""
    with _fake_parameters(model) as mode:
        model.eval()
        loss = _loss(model, examples, cfg, dtype, device, tokenizer, with_liger)
        with mode, torch.no_grad(), _StorageTracker(model) as tracker, loss:
            pass
    return tracker.at_peak(set())


@contextmanager
def _loss(
    model: Any, examples: Sequence[Example], cfg: TrainConfig, dtype: str, device: str, tokenizer: Any,
    with_liger: bool,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """The loss of the batch as in training. Call backward inside: recomputed activations need the replacements."""
    prompt_learning = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    packed = cfg.task == "causal_lm" and cfg.padding_free and not prompt_learning
    with unset_fake_temporarily():
        collate = build_collator(cfg.task, tokenizer, model, packed, CPU_SHAPE_MULTIPLE if device == "cpu" else 1)
        batch = collate(list(enumerate(examples)))
        labels = int((batch["labels"] != IGNORE_INDEX).sum())
    batch = {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    objective = Objective(model, _CountedCriterion(cfg, labels), dtype, packed, fused=False)
    head = model.get_output_embeddings()
    if packed and type(head) is torch.nn.Linear:  # find_plain_head needs values
        objective.head = head
    computed = adapters.training_precision(model, dtype, use_custom_kernels(cfg.distributed, cfg.torch_compile))
    kernels = liger_kernels(model) if with_liger else nullcontext()
    with objective.attention(model), _device_kernels(device, model, packed), computed, kernels:
        yield objective.summed_loss(model, batch)


class _CountedCriterion(losses.Criterion):
    """Selects logits by their number: selecting those with a label needs values."""

    def __init__(self, cfg: TrainConfig, labels: int) -> None:
        super().__init__(cfg)
        self.labels = labels

    def from_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        size = losses.chunk_tokens(logits.shape[-1], logits.device)
        parts = zip(logits[: self.labels].clone().split(size), targets[: self.labels].split(size), strict=True)
        return sum((self.from_chunk(chunk, t) for chunk, t in parts), logits.sum() * 0.0)


@contextmanager
def _device_kernels(device: str, model: Any, packed: bool) -> Iterator[None]:
    """The operations of `device`. A GPU has one attention kernel, byte masks for dropout, larger loss chunks."""
    before, dropouts = dict(losses.CHUNK_BYTES), [m for m in model.modules() if type(m) is torch.nn.Dropout]
    if device == "cuda":
        losses.CHUNK_BYTES["cpu"] = losses.CHUNK_BYTES["cuda"]
        for module in dropouts:
            module.forward = lambda x, m=module: torch.native_dropout(x, m.p, m.training)[0]
        if packed:
            model.set_attn_implementation(GPU_ATTENTION)
    try:
        yield
    finally:
        losses.CHUNK_BYTES.update(before)
        for module in dropouts:
            module.__dict__.pop("forward", None)


class _FlashAttention(torch.autograd.Function):
    """FlashAttention saves q, k, v, the output and a float per query (arXiv:2307.08691, section 3).

    Its backward pass accumulates the gradient of q in fp32, and first has those of k and v for each head of q.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        q, k, v, *_ = ctx.saved_tensors
        _sums = torch.empty_like(q, dtype=torch.float32)
        _of_heads = [torch.empty_like(q) for t in (k, v) if t.shape[1] != q.shape[1]]
        return tuple(torch.empty_like(t) for t in (q, k, v))


def _flash_attention(module: Any, *qkv: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    return _FlashAttention.apply(*packed_attention.cast_to_autocast(*qkv[:3])), None


AttentionInterface.register(GPU_ATTENTION, _flash_attention)
AttentionMaskInterface.register(GPU_ATTENTION, lambda *_, **__: None)


class _FourBitMatmul(torch.autograd.Function):
    """x W^T with 4-bit W, which is dequantized to the dtype of x for the product, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, features: int) -> torch.Tensor:
        ctx.features, ctx.inputs = features, x.shape[-1]
        return x @ x.new_empty(features, ctx.inputs).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad @ grad.new_empty(ctx.features, ctx.inputs), None


def _four_bit_linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Replaces bitsandbytes' Linear4bit.forward."""
    return _FourBitMatmul.apply(x.to(module.compute_dtype), module.out_features).to(x.dtype)


@contextmanager
def _fake_parameters(model: Any) -> Iterator[FakeTensorMode]:
    """Replace the meta parameters by fake tensors on the CPU, which operations and autocast accept."""
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), {}
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]

    def fake(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is not None and id(t) not in made:
            like = (
                torch.empty(parameter_bytes(t), dtype=torch.uint8, device="meta") if is_four_bit(t) else t.detach()
            )
            tensor = FakeTensor(mode, like, torch.device("cpu"))
            is_parameter = isinstance(t, torch.nn.Parameter)
            made[id(t)] = torch.nn.Parameter(tensor, requires_grad=t.requires_grad) if is_parameter else tensor
        return None if t is None else made[id(t)]

    for module, parameters, buffers in before:
        module._parameters = {n: fake(p) for n, p in parameters.items()}
        module._buffers = {n: fake(b) for n, b in buffers.items()}
        if any(p is not None and is_four_bit(p) for p in parameters.values()):
            module.forward = partial(_four_bit_linear, module)
    try:
        yield mode
    finally:
        model.gradient_checkpointing_disable()
        for module, parameters, buffers in before:
            module._parameters, module._buffers = parameters, buffers
            module.__dict__.pop("forward", None)


class _StorageTracker(TorchDispatchMode):
    """Records every storage from the operation that creates it to its release."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        self.classes = head.weight.shape[0] if head is not None else 0
        existing = [
            *model.parameters(),
            *model.buffers(),
            *(p.grad for p in model.parameters() if p.grad is not None),
        ]
        self.numbers = {t.untyped_storage()._cdata: -1 for t in existing}  # of live storages; -1: existed before
        self.changes: list[tuple[int, int]] = []  # (number of a storage, bytes), negative at its release
        self.logits: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for made in tree_iter(found):
            if isinstance(made, torch.Tensor):
                self._track(made)
        return found

    def _track(self, made: torch.Tensor) -> None:
        storage = made.untyped_storage()
        if storage._cdata in self.numbers:
            return
        number, size = len(self.changes), storage.nbytes()
        self.numbers[storage._cdata] = number
        self.changes.append((number, size))
        if made.ndim and made.shape[-1] == self.classes:
            self.logits.add(number)
        weakref.finalize(storage, self._release, storage._cdata, number, size)

    def _release(self, key: int, number: int, size: int) -> None:
        if self.numbers.get(key) == number:
            del self.numbers[key]
            self.changes.append((number, -size))

    def at_peak(self, gradients: set[int]) -> PassMemory:
        """The live bytes at the peak, by part."""
        live = list(accumulate(size for _, size in self.changes))
        then = live.index(max(live)) + 1 if live else 0
        shares = {"activations": 0, "logits": 0, "gradients": 0}
        for number, size in self.changes[:then]:
            part = "gradients" if number in gradients else "logits" if number in self.logits else "activations"
            shares[part] += size
        return PassMemory(**shares)


class _LigerNorm(torch.autograd.Function):
    """Saves its input and one number per row; writes the gradient in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad, torch.empty_like(ctx.saved_tensors[1]) if ctx.needs_input_grad[1] else None


class _LigerGate(torch.autograd.Function):
    """Saves gate and up; writes their gradients in place."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return ctx.saved_tensors


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return _LigerNorm.apply(x, module.weight)  # type: ignore[no-any-return]


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_LigerGate.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-any-return]


def _liger_forward(module: torch.nn.Module) -> Any:
    """The replacement of the module's forward; None if Liger does not replace it."""
    if type(module).__name__.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
        return _norm
    return _gated if all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")) else None


@contextmanager
def liger_kernels(model: Any) -> Iterator[None]:
    """Make `model` save what it saves with Liger's kernels, if Liger knows its type."""
    known = model.config.model_type in LIGER_MODEL_TYPES
    changed = [(m, by) for m in model.modules() if (by := _liger_forward(m))] if known else []
    for module, by in changed:
        module.forward = partial(by, module)
    try:
        yield
    finally:
        for module, _ in changed:
            del module.forward
