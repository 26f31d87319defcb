"""One training step on tensors that have a shape and no storage: what it would hold, and not a weight is loaded.

The architecture is built from config.json on torch's meta device, the tuning method is applied to it there, and
the forward and backward pass of the training run on it as fake tensors (torch.FakeTensorMode): every operation
answers with a shape, and none computes. Each storage that would be made is counted from its birth to its end, so
that what autograd saves, autocast's casts of weights, checkpointing, the adapters' inputs and the chunked loss
are the training's own. What differs on a GPU is put in its place: one attention kernel for all rows, dropout
that keeps a mask of bytes, and 4-bit layers whose weights exist in 16 bits while they are multiplied.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AttentionMaskInterface

from src.data.store import IGNORE_INDEX, Example
from src.model import adapters, load, methods, packed_attention
from src.model.source import Source
from src.schema import TrainConfig
from src.train import losses
from src.train.collate_tasks import COLLATORS
from src.train.collators import PackedCollator, PaddingCollator
from src.train.fit import CPU_SHAPE_MULTIPLE, use_custom_kernels
from src.train.objective import Objective
from src.train.plan import simulate_liger

GPU_ATTENTION = "one_kernel"
# nf4 keeps half a byte a weight, 8 bits for each block of 64, and 32 bits for each 256 blocks: QLoRA
# (arXiv:2305.14314), section 3, "Double Quantization".
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class ParameterBytes(NamedTuple):
    """Parameters, those that are trained, and bytes: of the base, of the adapter, of one gradient."""

    parameters: int
    trainable: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    largest_bytes: int


class PassMemory(NamedTuple):
    """Bytes at the peak of a pass, besides the weights."""

    activations: int
    logits: int
    gradients: int


def build_meta_model(cfg: TrainConfig, base: Source, dtype: str, steps: int, labels: Sequence[str] = ()) -> Any:
    """The model with the tuning method applied, on the meta device.

    Raises: ModelError if config.json cannot be had, or the method not be applied.
    """
    model = load.shell(
        base, dtype, four_bit=methods.METHODS[cfg.method].four_bit, trust_remote_code=cfg.trust_remote_code,
        task=cfg.task, labels=labels,
    )  # fmt: skip
    with torch.device("meta"):
        model = adapters.apply(model, cfg, base, steps=steps, task=cfg.task)
        model.tie_weights()
    return model


def measure_parameters(model: Any) -> ParameterBytes:
    """What the parameters of a skeleton would take."""
    total = sum(p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in trained)
    updates = sum(_bytes(p) for p in trained)
    whole = sum(_bytes(p) for p in model.parameters())
    adapter = 0 if trainable == total else updates
    return ParameterBytes(total, trainable, whole - adapter, adapter, updates, max(_bytes(p) for p in trained))


def _bytes(parameter: torch.Tensor) -> int:
    if _is_four_bit(parameter):
        return int(parameter.numel() * NF4_BYTES)
    return parameter.numel() * parameter.element_size()


def _is_four_bit(parameter: torch.Tensor) -> bool:
    return type(parameter).__name__ == "Params4bit"


def backward_pass(
    model: Any, examples: Sequence[Example], cfg: TrainConfig, dtype: str, device: str, checkpointing: bool,
    tokenizer: Any, with_liger: bool = False,
) -> PassMemory:  # fmt: skip
    """What the forward and backward pass of one batch holds at its peak. `model` is a skeleton, and stays one.

    Where batches are accumulated, the gradients of those before are there already.
    """
    with _fake_parameters(model) as mode:
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with mode:
            if cfg.gradient_accumulation_steps > 1:
                for p in model.parameters():
                    p.grad = torch.empty_like(p) if p.requires_grad else None
            there = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            loss_of = _loss(model, examples, cfg, dtype, device, tokenizer, with_liger)
            with _StorageTracker(model) as seen, loss_of as loss:
                loss.backward()
                made = [p.grad.untyped_storage()._cdata for p in model.parameters() if p.grad is not None]
            held = seen.at_peak({seen.numbers[key] for key in made})
    return held._replace(gradients=held.gradients + there)


def forward_pass(
    model: Any, examples: Sequence[Example], cfg: TrainConfig, dtype: str, device: str, tokenizer: Any,
    with_liger: bool = False,
) -> PassMemory:  # fmt: skip
    """What the evaluation of one batch holds at its peak."""
    with _fake_parameters(model) as mode:
        model.eval()
        loss = _loss(model, examples, cfg, dtype, device, tokenizer, with_liger)
        with mode, torch.no_grad(), _StorageTracker(model) as seen, loss:
            pass
    return seen.at_peak(set())


@contextmanager
def _loss(
    model: Any, examples: Sequence[Example], cfg: TrainConfig, dtype: str, device: str, tokenizer: Any,
    with_liger: bool,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """The loss of the batch as the training computes it; backward belongs inside, where recomputing needs it."""
    prompts = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    end_to_end = cfg.task == "causal_lm" and cfg.padding_free and not prompts
    with unset_fake_temporarily():
        batch = _collate(model, examples, cfg, device, tokenizer, end_to_end)
        labels = int((batch["labels"] != IGNORE_INDEX).sum())
    batch = {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    objective = Objective(model, _CountedCriterion(cfg, labels), dtype, end_to_end, fused=False)
    head = model.get_output_embeddings()
    if end_to_end and type(head) is torch.nn.Linear:  # its trial of the head needs numbers
        objective.head = head
    computed = adapters.as_trained(model, dtype, use_custom_kernels(cfg))
    kernels = simulate_liger.kernels(model) if with_liger else nullcontext()
    with objective.attention(model), _device_kernels(device, model, end_to_end), computed, kernels:
        yield objective.summed(model, batch)


def _collate(
    model: Any, examples: Sequence[Example], cfg: TrainConfig, device: str, tokenizer: Any, end_to_end: bool
) -> dict[str, Any]:
    """The batch of the training."""
    if end_to_end:
        collate: Any = PackedCollator(CPU_SHAPE_MULTIPLE if device == "cpu" else 1)
    elif cfg.task == "causal_lm":
        collate = PaddingCollator(tokenizer.pad_token_id)
    else:
        collate = COLLATORS[cfg.task](tokenizer, model)
    return dict(collate(list(enumerate(examples))))


class _CountedCriterion(losses.Criterion):
    """Picks logits by their number: which ones have a label needs numbers."""

    def __init__(self, cfg: TrainConfig, labels: int) -> None:
        super().__init__(cfg)
        self.labels = labels

    def of_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        size = losses._chunk_tokens(logits.shape[-1], logits.device)
        parts = zip(logits[: self.labels].clone().split(size), targets[: self.labels].split(size), strict=True)
        return sum((self.of_chunk(chunk, t) for chunk, t in parts), logits.sum() * 0.0)


@contextmanager
def _device_kernels(device: str, model: Any, end_to_end: bool) -> Iterator[None]:
    """On a GPU one kernel attends, dropout keeps a mask of bytes, and the loss takes larger chunks."""
    before, dropouts = dict(losses.CHUNK_BYTES), [m for m in model.modules() if type(m) is torch.nn.Dropout]
    if device == "cuda":
        losses.CHUNK_BYTES["cpu"] = losses.CHUNK_BYTES["cuda"]
        for module in dropouts:
            module.forward = lambda x, m=module: torch.native_dropout(x, m.p, m.training)[0]
        if end_to_end:
            model.set_attn_implementation(GPU_ATTENTION)
    try:
        yield
    finally:
        losses.CHUNK_BYTES.update(before)
        for module in dropouts:
            module.__dict__.pop("forward", None)


class _FlashAttention(torch.autograd.Function):
    """What FlashAttention keeps: q, k, v, the output and a float a query (arXiv:2307.08691, section 3).

    On the way back it adds the gradient of q up in fp32, and has those of k and v for each head of q first.
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
    return _FlashAttention.apply(*packed_attention.as_autocast_has_them(*qkv[:3])), None


AttentionInterface.register(GPU_ATTENTION, _flash_attention)
AttentionMaskInterface.register(GPU_ATTENTION, lambda *_, **__: None)


class _FourBitMatmul(torch.autograd.Function):
    """x W^T with 4-bit W, which exists in the precision of x while it is multiplied, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, features: int) -> torch.Tensor:
        ctx.features, ctx.inputs = features, x.shape[-1]
        return x @ x.new_empty(features, ctx.inputs).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad @ grad.new_empty(ctx.features, ctx.inputs), None


def _four_bit_linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """In the place of bitsandbytes' Linear4bit.forward."""
    return _FourBitMatmul.apply(x.to(module.compute_dtype), module.out_features).to(x.dtype)


@contextmanager
def _fake_parameters(model: Any) -> Iterator[FakeTensorMode]:
    """Make the skeleton's parameters fake tensors of the CPU: operations and autocast take them for real."""
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), {}
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]

    def fake(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is not None and id(t) not in made:
            like = torch.empty(_bytes(t), dtype=torch.uint8, device="meta") if _is_four_bit(t) else t.detach()
            ghost = FakeTensor(mode, like, torch.device("cpu"))
            is_parameter = isinstance(t, torch.nn.Parameter)
            made[id(t)] = torch.nn.Parameter(ghost, requires_grad=t.requires_grad) if is_parameter else ghost
        return None if t is None else made[id(t)]

    for module, parameters, buffers in before:
        module._parameters = {n: fake(p) for n, p in parameters.items()}
        module._buffers = {n: fake(b) for n, b in buffers.items()}
        if any(p is not None and _is_four_bit(p) for p in parameters.values()):
            module.forward = partial(_four_bit_linear, module)
    try:
        yield mode
    finally:
        model.gradient_checkpointing_disable()
        for module, parameters, buffers in before:
            module._parameters, module._buffers = parameters, buffers
            module.__dict__.pop("forward", None)


class _StorageTracker(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        self.classes = head.weight.shape[0] if head is not None else 0
        held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self.numbers = {t.untyped_storage()._cdata: -1 for t in held}  # of the living; -1: there before
        self.changes: list[tuple[int, int]] = []  # the number of a storage, and its bytes, negative at its end
        self.logits: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for made in tree_iter(found):
            if isinstance(made, torch.Tensor):
                self._follow(made)
        return found

    def _follow(self, made: torch.Tensor) -> None:
        storage = made.untyped_storage()
        if storage._cdata in self.numbers:
            return
        number, size = len(self.changes), storage.nbytes()
        self.numbers[storage._cdata] = number
        self.changes.append((number, size))
        if made.ndim and made.shape[-1] == self.classes:
            self.logits.add(number)
        weakref.finalize(storage, self._gone, storage._cdata, number, size)

    def _gone(self, key: int, number: int, size: int) -> None:
        if self.numbers.get(key) == number:
            del self.numbers[key]
            self.changes.append((number, -size))

    def at_peak(self, gradients: set[int]) -> PassMemory:
        """What was alive when most bytes were."""
        live = list(accumulate(size for _, size in self.changes))
        then = live.index(max(live)) + 1 if live else 0
        shares = {"activations": 0, "logits": 0, "gradients": 0}
        for number, size in self.changes[:then]:
            part = "gradients" if number in gradients else "logits" if number in self.logits else "activations"
            shares[part] += size
        return PassMemory(**shares)
