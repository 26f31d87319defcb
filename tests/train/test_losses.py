"""Losses equal torch's own, chunk by chunk, with the gradients of unchunked logits; the loss of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from src.data.store import IGNORE_INDEX, Example
from src.schema import LossArgs
from src.train import losses
from src.train.collators import PackedCollator, PaddingCollator
from src.train.losses import LOSSES, Criterion, NeftuneNoise, Objective, find_plain_head

CLASSES, TOKENS, SIZE = 50, 300, 16
SMALL: dict[str, Any] = dict(
    vocab_size=64, hidden_size=SIZE, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor]:
    """Hidden states, a head, and targets of which some are ignored; chunks of 64 tokens."""
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 64 * 4 * CLASSES)
    torch.manual_seed(0)
    targets = torch.randint(CLASSES, (TOKENS,))
    targets[::7] = IGNORE_INDEX
    return torch.randn(TOKENS, SIZE, requires_grad=True), torch.nn.Linear(SIZE, CLASSES), targets


def criterion(loss: str, **args: Any) -> Criterion:
    weights = torch.linspace(0.5, 2, CLASSES) if loss == "weighted" else None
    return Criterion(LossArgs(loss=loss, **args), weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hidden_states_and_logits_give_the_same_loss_and_gradients(
    parts: tuple[Any, ...], loss: str, smoothing: float
) -> None:
    hidden, head, targets = parts
    how = criterion(loss, label_smoothing_factor=smoothing)
    leaves = [hidden, head.weight, head.bias]
    fused = how.from_hidden(hidden, head, targets)
    from_hidden = torch.autograd.grad(fused * 0.5, leaves)
    plain = how.from_logits(head(hidden), targets)
    from_logits = torch.autograd.grad(plain * 0.5, leaves)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-6)
    for one, other in zip(from_hidden, from_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_torch(parts: tuple[Any, ...], smoothing: float) -> None:
    hidden, head, targets = parts
    how = criterion("cross_entropy", label_smoothing_factor=smoothing)
    mean = how.from_hidden(hidden, head, targets) / how.total_weight(targets)
    assert mean.item() == pytest.approx(
        cross_entropy(head(hidden), targets, label_smoothing=smoothing).item(), rel=1e-5
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_weighted_cross_entropy_is_that_of_torch(parts: tuple[Any, ...], smoothing: float) -> None:
    hidden, head, targets = parts
    how = criterion("weighted", label_smoothing_factor=smoothing)
    mean = how.from_hidden(hidden, head, targets) / how.total_weight(targets)
    expected = cross_entropy(head(hidden), targets, how.options.weights, label_smoothing=smoothing)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-5)


def test_focal_loss_of_gamma_0_is_cross_entropy_and_a_higher_one_counts_the_known_less(
    parts: tuple[Any, ...],
) -> None:
    hidden, head, targets = parts
    plain, zero, two = (
        criterion(name, focal_gamma=gamma).from_hidden(hidden, head, targets).item()
        for name, gamma in (("cross_entropy", 2.0), ("focal", 0.0), ("focal", 2.0))
    )
    assert zero == pytest.approx(plain, rel=1e-5)
    assert two < plain
    p = torch.tensor([0.25])
    logits = torch.stack([p.log(), (1 - p).log()], dim=-1)
    how = criterion("focal", focal_gamma=2.0)
    assert how.from_logits(logits, torch.tensor([0])).item() == pytest.approx(0.75**2 * -p.log().item(), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_focal_factor_multiplies_the_smoothed_cross_entropy(parts: tuple[Any, ...], gamma: float) -> None:
    hidden, head, targets = parts
    kept = targets != IGNORE_INDEX
    logits, known = head(hidden)[kept], targets[kept]
    smoothed = cross_entropy(logits, known, reduction="none", label_smoothing=0.3)
    p = logits.softmax(-1).gather(1, known[:, None])[:, 0]
    how = criterion("focal", focal_gamma=gamma, label_smoothing_factor=0.3)
    expected = ((1 - p) ** gamma * smoothed).sum()
    assert how.from_hidden(hidden, head, targets).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_a_certain_token_is_finite(gamma: float, smoothing: float) -> None:
    logits = torch.tensor([[100.0, 0.0, 0.0], [17.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    how = criterion("focal", focal_gamma=gamma, label_smoothing_factor=smoothing)
    how.from_logits(logits, torch.zeros(3, dtype=torch.long)).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_no_label_at_all_is_a_loss_of_nothing_that_can_go_backwards(parts: tuple[Any, ...]) -> None:
    hidden, head, _ = parts
    for targets in (torch.full((TOKENS,), IGNORE_INDEX), torch.zeros(0, dtype=torch.long)):
        how = criterion("cross_entropy")
        loss = how.from_hidden(hidden[: len(targets)], head, targets) + how.from_logits(
            head(hidden[: len(targets)]), targets
        )
        loss.backward()
        assert loss.item() == 0
        assert how.total_weight(targets).item() == 0


def test_no_more_than_a_chunk_of_logits_exists_at_a_time(parts: tuple[Any, ...]) -> None:
    hidden, head, targets = parts
    seen: list[int] = []
    how = criterion("cross_entropy")
    summed = how._sum
    how._sum = lambda logits, t: (seen.append(len(logits)), summed(logits, t))[1]  # type: ignore[method-assign,func-returns-value]
    how.from_hidden(hidden, head, targets).backward()
    assert seen == [64, 64, 64, 64, 44]


def test_no_fp32_copy_of_16_bit_logits_is_saved_for_the_backward_pass(parts: tuple[Any, ...]) -> None:
    hidden, head, targets = parts
    logits = head(hidden).to(torch.bfloat16)
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = criterion("cross_entropy").from_logits(logits, targets)
    assert [t.shape for t in kept if t.dtype == torch.float32 and t.numel() >= CLASSES] == []
    loss.backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_a_head_is_fused_only_where_logits_are_nothing_but_its_product() -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert find_plain_head(llama) is llama.lm_head
    assert find_plain_head(CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))) is None
    llama.lm_head = torch.nn.Sequential(llama.lm_head)
    assert find_plain_head(llama) is None


# --- the loss of a batch ------------------------------------------------------------------------------------

ROWS = [
    (number, Example(list(range(3, 3 + n)), [False] * (n // 2) + [True] * (n - n // 2)))
    for number, n in enumerate((9, 4, 13))
]


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def summed(model: Any, collate: Any, packed: bool, fused: bool = True, dtype: str = "float32") -> torch.Tensor:
    objective = Objective(model, Criterion(LossArgs()), dtype, packed, fused)
    assert (objective.head is not None) == (fused and packed)
    batch = collate(ROWS)
    with objective.attention(model):
        return objective.summed_loss(model, batch)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_every_strategy_gives_the_loss_of_the_model(build: Any) -> None:
    model = build()
    expected = 0.0
    for _, row in ROWS:
        out = model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels]))
        expected += out.loss.item() * sum(row.loss_mask[1:])
    ways = {
        "fused": summed(model, PackedCollator(), True),
        "filled up": summed(model, PackedCollator(16), True),
        "not fused": summed(model, PackedCollator(), True, fused=False),
        "padded": summed(model, PaddingCollator(0), False),
    }
    for way, loss in ways.items():
        assert loss.item() == pytest.approx(expected, rel=1e-5), way


def test_every_strategy_gives_the_same_gradients() -> None:
    model = llama()
    found = []
    for loss in (
        summed(model, PackedCollator(16), True),
        summed(model, PackedCollator(), True, fused=False),
        summed(model, PaddingCollator(0), False),
    ):
        model.zero_grad()
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_the_loss_is_nearly_the_same() -> None:
    model = llama()
    exact = summed(model, PackedCollator(), True).item()
    assert summed(model, PackedCollator(), True, dtype="bfloat16").item() == pytest.approx(exact, rel=2e-2)


def test_noise_scales_with_the_length_of_each_example_and_only_in_training() -> None:
    model = llama()
    embedding = model.get_input_embeddings()
    noise = NeftuneNoise(model, alpha=5.0)
    lengths = [100, 400]
    ids = torch.zeros(1, 500, dtype=torch.long)
    plain = embedding.weight[0]
    noise.lengths = lengths
    model.train()
    apart = (embedding(ids)[0] - plain).split(lengths)
    for part, length in zip(apart, lengths, strict=True):
        bound = 5.0 / (length * 32) ** 0.5
        assert part.abs().max().item() == pytest.approx(bound, rel=1e-2)
        assert part.abs().mean().item() == pytest.approx(bound / 2, rel=5e-2)
    both = embedding(torch.zeros(2, 50, dtype=torch.long)) - plain  # padded to 50
    assert both[0].abs().max() > 1.8 * both[1].abs().max()
    model.eval()
    assert torch.equal(embedding(ids)[0, 7], plain)
