"""Losses, and how they are computed without ever holding vocabulary x tokens in fp32.

To add a loss, enter it in LOSSES and name it in LossArgs.loss of src/schema.py: it gets the logits of a chunk of
tokens and says what each costs. Sums are divided by `total_weight` over the whole batch, accumulated and on every
device, so that one batch of 8 and eight of 1 give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch.nn.functional import cross_entropy, linear, log_softmax, nll_loss
from torch.utils.checkpoint import checkpoint

from src.data.store import IGNORE_INDEX
from src.errors import ConfigError
from src.schema import LossArgs

CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 32 << 20}  # of fp32 logits held at once


@dataclass(frozen=True)
class LossOptions:
    """What a loss may be told. `weights`: (classes,) fp32, or None where every class weighs the same."""

    label_smoothing: float = 0.0
    gamma: float = 0.0
    weights: torch.Tensor | None = None

    def weight_of(self, targets: torch.Tensor) -> torch.Tensor:
        """(n,) the weight of each target."""
        if self.weights is None:
            return torch.ones_like(targets, dtype=torch.float32)
        return self.weights.to(targets.device)[targets.clamp(min=0)]


class Loss(NamedTuple):
    """`each(logits, targets, knobs)`: (n, classes) fp32 and (n,) to the (n,) losses; `weighted`: by class."""

    each: Callable[[torch.Tensor, torch.Tensor, LossOptions], torch.Tensor]
    weighted: bool = False


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, knobs: LossOptions) -> torch.Tensor:
    return cross_entropy(logits, targets, reduction="none", label_smoothing=knobs.label_smoothing)


def _weighted(logits: torch.Tensor, targets: torch.Tensor, knobs: LossOptions) -> torch.Tensor:
    return _cross_entropy(logits, targets, knobs) * knobs.weight_of(targets)


def _focal(logits: torch.Tensor, targets: torch.Tensor, knobs: LossOptions) -> torch.Tensor:
    """-(1 - p)^gamma log p: Lin et al. 2017 (arXiv:1708.02002), equation 4."""
    known = -nll_loss(log_softmax(logits, -1), targets, reduction="none")
    return -((1 - known.exp()) ** knobs.gamma) * known


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy),
    "weighted": Loss(_weighted, weighted=True),
    "focal": Loss(_focal),
}


def class_weights(args: LossArgs, classes: int, ids: Callable[[str], Sequence[int]]) -> torch.Tensor | None:
    """(classes,) the weights of `class_weights`, 1 where none is given; None if the loss has no use for them.

    Raises: ConfigError naming what is not one class, by the `ids` of its name.
    """
    if not LOSSES[args.loss].weighted:
        return None
    found = {name: ids(name) for name in args.class_weights}
    if wrong := [name for name, each in found.items() if len(each) != 1]:
        raise ConfigError(
            *(f"class_weights: {name!r} is no label, or not one token" for name in wrong),
            hint="name labels of a classification, or words that are one token of this tokenizer",
        )
    weights = torch.ones(classes)
    for name, weight in args.class_weights.items():
        weights[found[name][0]] = weight
    return weights


class Criterion:
    """One loss with its knobs, as the training and the evaluation compute it."""

    def __init__(self, args: LossArgs, weights: torch.Tensor | None = None) -> None:
        self.loss = LOSSES[args.loss]
        self.knobs = LossOptions(args.label_smoothing_factor, args.focal_gamma, weights)

    def total_weight(self, targets: torch.Tensor) -> torch.Tensor:
        """What the summed losses of `targets` are divided by: their number, or their weights' sum."""
        targets = targets[targets != IGNORE_INDEX]
        return (self.knobs.weight_of(targets) if self.loss.weighted else torch.ones_like(targets)).sum().float()

    def of_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of (n, classes) logits, of which fp32 copies are made a chunk at a time."""
        kept = targets != IGNORE_INDEX
        logits, targets = logits[kept], targets[kept]
        size = _chunk_tokens(logits.shape[-1], logits.device)
        parts = zip(logits.split(size), targets.split(size), strict=True)
        return sum((self.of_chunk(chunk, t) for chunk, t in parts), logits.sum() * 0.0)

    def of_chunk(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of a chunk, whose fp32 values are made anew on the way back, not kept until then."""
        summed = checkpoint(self._sum, logits, targets, use_reentrant=False, preserve_rng_state=False)
        return cast(torch.Tensor, summed)

    def of_hidden(self, hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of (n, hidden size) last hidden states, whose logits exist a chunk at a time only."""
        inputs = [hidden, head.weight, head.bias]
        if not torch.is_grad_enabled():
            inputs = [t if t is None else t.detach() for t in inputs]
        return _FusedHeadLoss.apply(*inputs, targets, self._sum)  # type: ignore[no-any-return]

    def _sum(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss.each(logits.float(), targets, self.knobs).sum()


class _FusedHeadLoss(torch.autograd.Function):
    """Output head and loss in one, chunk by chunk; the gradient is computed on the way forward.

    So that no logits have to be kept for the way back (Hsu et al. 2024, arXiv:2410.10989, section 3.2).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        of_hidden, *of_head = ctx.needs_input_grad[:3]
        wanted = [t for t, needed in zip((weight, bias), of_head, strict=True) if needed]
        sums = [torch.zeros_like(t, dtype=torch.float32) for t in wanted]
        size = _chunk_tokens(weight.shape[0], hidden.device)
        total = torch.zeros((), device=hidden.device)
        grads = []
        for part, t in zip(hidden.split(size), targets.split(size), strict=True):
            leaves = [part.detach().requires_grad_()] if of_hidden else []
            with torch.set_grad_enabled(bool(leaves or wanted)):
                cost = loss(linear(leaves[0] if leaves else part, weight, bias), t)
            total += cost.detach()
            found = torch.autograd.grad(cost, leaves + wanted) if leaves or wanted else ()
            grads += found[: len(leaves)]
            for whole, g in zip(sums, found[len(leaves) :], strict=True):
                whole += g
        ctx.save_for_backward(torch.cat(grads) if grads else hidden.new_zeros(0), *sums)
        ctx.dtypes = [t.dtype for t in wanted]
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, *sums = ctx.saved_tensors
        wanted = iter([s.mul_(grad).to(d) for s, d in zip(sums, ctx.dtypes, strict=True)])
        weight, bias = (next(wanted) if needed else None for needed in ctx.needs_input_grad[1:3])
        return (hidden * grad if ctx.needs_input_grad[0] else None), weight, bias, None, None


def _chunk_tokens(classes: int, device: torch.device) -> int:
    """How many tokens' fp32 logits are held at once."""
    return max(64, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * classes))


@contextmanager
def capture_hidden_states(head: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Let the model hand over its last hidden states in place of logits: they are in the list afterwards."""
    caught: list[torch.Tensor] = []

    def catch(hidden: torch.Tensor) -> torch.Tensor:
        caught.append(hidden)
        return hidden[..., :1]

    head.forward = catch  # type: ignore[method-assign]
    try:
        yield caught
    finally:
        del head.forward


def find_plain_head(model: Any) -> torch.nn.Linear | None:
    """The output head where the logits are nothing but what it makes of the hidden states, else None.

    A model may scale or cap its logits; a trial on a few tokens shows it.
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
            with capture_hidden_states(head) as caught:
                model(input_ids=ids, use_cache=False)
            own = linear(caught[0], head.weight, head.bias)
    except Exception:  # whatever a model of unknown make answers: its logits are taken as they are
        return None
    finally:
        model.train(training)
    return head if own.shape == logits.shape and torch.allclose(own.float(), logits.float(), atol=1e-4) else None
