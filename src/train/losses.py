"""Losses, and their computation without ever holding fp32 logits of all tokens.

To add a loss, enter it in LOSSES and add its name to LossArgs.loss in src/schema.py. It gets the logits of a
chunk of tokens and returns the loss of each. The sum is divided by `total_weight` over all micro-batches and
devices of a step, so one batch of 8 and eight batches of 1 give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch.nn.functional import cross_entropy, linear, log_softmax, nll_loss
from torch.utils.checkpoint import checkpoint

from ..data.store import IGNORE_INDEX
from ..errors import ConfigError
from ..model import packed_attention
from ..schema import LossArgs

CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 32 << 20}  # of the fp32 logits of a chunk
AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL_INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")  # keys of a padded batch that the model takes


@dataclass(frozen=True)
class LossOptions:
    """Parameters of a loss. `weights`: (classes,) fp32, or None for equal weights."""

    label_smoothing: float = 0.0
    gamma: float = 0.0
    weights: torch.Tensor | None = None

    def target_weights(self, targets: torch.Tensor) -> torch.Tensor:
        """The weight of each target, (n,)."""
        if self.weights is None:
            return torch.ones_like(targets, dtype=torch.float32)
        return self.weights.to(targets.device)[targets.clamp(min=0)]


class Loss(NamedTuple):
    """A function of (n, classes) fp32 logits, (n,) targets and the options that returns the (n,) losses.

    `weighted`: whether targets count by their class weight, also in the divisor.
    """

    per_target: Callable[[torch.Tensor, torch.Tensor, LossOptions], torch.Tensor]
    weighted: bool = False


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """torch's definition: with label smoothing, each class of the softer target has its class weight."""
    weights = None if options.weights is None else options.weights.to(logits.device)
    return cross_entropy(logits, targets, weights, reduction="none", label_smoothing=options.label_smoothing)


def _focal(logits: torch.Tensor, targets: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """-(1 - p)^gamma log p: Lin et al. 2017 (arXiv:1708.02002), equation 4.

    With label smoothing, the factor (1 - p)^gamma of the target multiplies the smoothed cross entropy.
    """
    known = -nll_loss(log_softmax(logits, -1), targets, reduction="none")
    missed = -known.expm1()  # 1 - p; of 0, the gradient of a power below 1 is infinite
    return missed.clamp(min=torch.finfo(missed.dtype).eps) ** options.gamma * _cross_entropy(
        logits, targets, options
    )


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy),
    "weighted": Loss(_cross_entropy, weighted=True),
    "focal": Loss(_focal),
}


def class_weights(args: LossArgs, classes: int, ids: Callable[[str], Sequence[int]]) -> torch.Tensor | None:
    """The weight of each class, (classes,), 1 for those that are not named; None if the loss is not weighted.

    Args:
        ids: the classes that a name of `class_weights` stands for: a label, or the tokens of a word.

    Raises: ConfigError for every name that is not exactly one class.
    """
    if not LOSSES[args.loss].weighted:
        return None
    found = {name: ids(name) for name in args.class_weights}
    if wrong := [name for name, each in found.items() if len(each) != 1]:
        raise ConfigError(
            *(f"class_weights: {name!r} is neither a label nor one token" for name in wrong),
            hint="use labels of the classification, or words that this tokenizer encodes as one token",
        )
    weights = torch.ones(classes)
    for name, weight in args.class_weights.items():
        weights[found[name][0]] = weight
    return weights


class Criterion:
    """A loss with its options, the same in training and evaluation."""

    def __init__(self, args: LossArgs, weights: torch.Tensor | None = None) -> None:
        self.loss = LOSSES[args.loss]
        self.options = LossOptions(args.label_smoothing_factor, args.focal_gamma, weights)

    def total_weight(self, targets: torch.Tensor) -> torch.Tensor:
        """The divisor of the summed losses: the number of targets, or the sum of their weights."""
        targets = targets[targets != IGNORE_INDEX]
        return (
            (self.options.target_weights(targets) if self.loss.weighted else torch.ones_like(targets))
            .sum()
            .float()
        )

    def from_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of (n, classes) logits, converted to fp32 in chunks."""
        kept = targets != IGNORE_INDEX
        logits, targets = logits[kept], targets[kept]
        size = chunk_tokens(logits.shape[-1], logits.device)
        parts = zip(logits.split(size), targets.split(size), strict=True)
        return sum((self.from_chunk(chunk, t) for chunk, t in parts), logits.sum() * 0.0)

    def from_chunk(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of a chunk. Its fp32 values are recomputed in the backward pass instead of stored."""
        summed = checkpoint(self._sum, logits, targets, use_reentrant=False, preserve_rng_state=False)
        return cast(torch.Tensor, summed)

    def from_hidden(self, hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of (n, hidden size) last hidden states; the logits of one chunk exist at a time."""
        inputs = [hidden, head.weight, head.bias]
        if not torch.is_grad_enabled():
            inputs = [t if t is None else t.detach() for t in inputs]
        return _FusedHeadLoss.apply(*inputs, targets, self._sum)  # type: ignore[no-any-return]

    def _sum(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss.per_target(logits.float(), targets, self.options).sum()


class _FusedHeadLoss(torch.autograd.Function):
    """Output head and loss, chunk by chunk. The forward pass computes the gradient, so that no logits are stored.

    Hsu et al. 2024 (arXiv:2410.10989), section 3.2.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        hidden_needs_grad, *head_needs_grad = ctx.needs_input_grad[:3]
        trained = [t for t, needed in zip((weight, bias), head_needs_grad, strict=True) if needed]
        sums = [torch.zeros_like(t, dtype=torch.float32) for t in trained]
        size = chunk_tokens(weight.shape[0], hidden.device)
        total = torch.zeros((), device=hidden.device)
        grads = []
        for part, t in zip(hidden.split(size), targets.split(size), strict=True):
            leaves = [part.detach().requires_grad_()] if hidden_needs_grad else []
            with torch.set_grad_enabled(bool(leaves or trained)):
                cost = loss(linear(leaves[0] if leaves else part, weight, bias), t)
            total += cost.detach()
            found = torch.autograd.grad(cost, leaves + trained) if leaves or trained else ()
            grads += found[: len(leaves)]
            for accumulated, g in zip(sums, found[len(leaves) :], strict=True):
                accumulated += g
        ctx.save_for_backward(torch.cat(grads) if grads else hidden.new_zeros(0), *sums)
        ctx.dtypes = [t.dtype for t in trained]
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, *sums = ctx.saved_tensors
        grads = iter([s.mul_(grad).to(d) for s, d in zip(sums, ctx.dtypes, strict=True)])
        weight, bias = (next(grads) if needed else None for needed in ctx.needs_input_grad[1:3])
        return (hidden * grad if ctx.needs_input_grad[0] else None), weight, bias, None, None


def chunk_tokens(classes: int, device: torch.device) -> int:
    """The number of tokens in a chunk."""
    return max(64, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * classes))


@contextmanager
def capture_hidden_states(head: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Append the last hidden states to the yielded list, and make the model return a slice instead of logits."""
    captured: list[torch.Tensor] = []

    def capture(hidden: torch.Tensor) -> torch.Tensor:
        captured.append(hidden)
        return hidden[..., :1]

    head.forward = capture  # type: ignore[method-assign]
    try:
        yield captured
    finally:
        del head.forward


def find_plain_head(model: Any) -> torch.nn.Linear | None:
    """The output head if the logits are exactly its output, else None.

    A model may scale or cap its logits, so a forward pass on a few tokens checks it.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return None
    ids = torch.arange(8, device=model.device)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            with capture_hidden_states(head) as captured:
                model(input_ids=ids, use_cache=False)
            own = linear(captured[0], head.weight, head.bias)
    except Exception:  # remote code may raise anything: then the loss uses the logits of the model
        return None
    finally:
        model.train(training)
    return head if own.shape == logits.shape and torch.allclose(own.float(), logits.float(), atol=1e-4) else None


class NeftuneNoise:
    """NEFTune: in training, uniform noise of size alpha / sqrt(L d) on the embeddings (L tokens, d dimensions).

    Jain et al. 2023 (arXiv:2310.05914), algorithm 1. L is the length of each example; the Trainer's own
    implementation uses that of the padded batch.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: list[int] = []
        model.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, module: torch.nn.Module, _: Any, embedded: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        lengths = torch.tensor(self.lengths, device=embedded.device)
        each = lengths.repeat_interleave(lengths)[None, :, None] if len(embedded) == 1 else lengths[:, None, None]
        size = self.alpha / (each * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * size.to(embedded.dtype)


class Objective:
    """The loss of a batch: a forward pass that computes logits only where there is a label."""

    def __init__(
        self, model: Any, criterion: Criterion, dtype: str, packed: bool, fused: bool = True,
        noise: float | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            packed: whether batches come from PackedCollator.
            fused: whether the output head may be computed together with the loss. It must not where its weights
                are sharded over devices.
            noise: alpha of NEFTune.
        """
        self.noise = NeftuneNoise(model, noise) if noise else None
        self.criterion, self.packed = criterion, packed
        self.device_type, self.autocast_dtype = model.device.type, AUTOCAST_DTYPES.get(dtype)
        self.head = find_plain_head(model) if fused and packed else None

    def autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.autocast_dtype)

    def attention(self, model: Any) -> AbstractContextManager[None]:
        """The context in which `model` must get the batches."""
        return packed_attention.use_packed_attention(model) if self.packed else nullcontext()

    def summed_loss(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The sum of the losses of all labels of a batch, a scalar."""
        if self.noise:
            self.noise.lengths = batch.get("lengths") or batch["attention_mask"].sum(1).tolist()
        with self.autocast():
            if not self.packed:
                return self._padded_loss(model, batch)
            packed_attention.set_row_lengths(batch["lengths"])
            inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
            inputs |= {"logits_to_keep": batch["target_positions"], "use_cache": False}
            if self.head is None:
                logits = model(**inputs).logits
                return self.criterion.from_logits(logits.flatten(0, 1), batch["labels"])
            with capture_hidden_states(self.head) as captured:
                model(**inputs)
            return self.criterion.from_hidden(captured[0].flatten(0, 1), self.head, batch["labels"])

    def _padded_loss(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        labels = batch["labels"]
        logits = model(**{key: batch[key] for key in MODEL_INPUTS if key in batch}).logits
        if labels.dim() == 1:  # one label for each example
            return self.criterion.from_logits(logits, labels)
        logits = logits[:, -labels.shape[1] :]  # virtual tokens come before the example
        return self.criterion.from_logits(logits.flatten(0, 1), labels.flatten())
