"""The loss of a batch: padded or laid end to end, fused or not, with noise or without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from src.data.store import Example
from src.schema import LossArgs
from src.train.collators import PackedCollator, PaddingCollator
from src.train.losses import Criterion
from src.train.objective import NeftuneNoise, Objective

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


def summed(model: Any, collate: Any, end_to_end: bool, fused: bool = True, dtype: str = "float32") -> torch.Tensor:
    objective = Objective(model, Criterion(LossArgs()), dtype, end_to_end, fused)
    assert (objective.head is not None) == (fused and end_to_end)
    batch = collate(ROWS)
    with objective.attention(model):
        return objective.summed(model, batch)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_every_way_gives_the_loss_that_the_model_itself_gives(build: Any) -> None:
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


def test_every_way_gives_the_same_gradients() -> None:
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


def test_noise_has_the_size_that_each_row_by_its_length_gets_and_only_in_training() -> None:
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
