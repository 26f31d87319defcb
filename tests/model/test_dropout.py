"""Dropout of few random bits: as often, as independent and as large as dropout has to be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from src.model import fused_lora


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_values_are_dropped_independently_with_the_given_probability(p: float) -> None:
    layer, n = nn.Dropout(p), 400_000
    torch.manual_seed(0)
    with fused_lora.use_fast_dropout(layer):
        gone = (layer(torch.ones(n)) == 0).view(-1, 4).double()
        again = (layer(torch.ones(n)) == 0).view(-1, 4).double()
    spread = (p * (1 - p) / (n / 4)) ** 0.5  # of the mean of one of the four values that share a draw
    assert ((gone.mean(0) - p).abs() < 5 * spread).all()
    together = torch.corrcoef(torch.cat([gone, again], dim=1).T) - torch.eye(8)
    assert together.abs().max() < 5 / (n / 4) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 64)])
def test_what_stays_is_scaled_and_the_gradient_takes_the_same_way(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer, x = nn.Dropout(0.25), torch.ones(shape, dtype=dtype, requires_grad=True)
    with fused_lora.use_fast_dropout(layer):
        out = layer(x)
        out.backward(torch.full_like(out, 2))
    scale = torch.tensor(1 / 0.75, dtype=dtype)
    assert set(out.detach().flatten().tolist()) <= {0.0, scale.item()}
    torch.testing.assert_close(x.grad, 2 * out.detach())


def test_the_same_seed_drops_the_same_values() -> None:
    layer, x = nn.Dropout(0.5), torch.ones(1000)
    with fused_lora.use_fast_dropout(layer):
        torch.manual_seed(3)
        first = layer(x)
        assert not torch.equal(layer(x), first)
        torch.manual_seed(3)
        assert torch.equal(layer(x), first)


def test_nothing_is_dropped_by_chance_nought_or_in_an_evaluation_and_all_by_chance_one() -> None:
    x = torch.randn(50)
    for layer, expected in ((nn.Dropout(0.0), x), (nn.Dropout(0.5).eval(), x), (nn.Dropout(1.0), 0 * x)):
        with fused_lora.use_fast_dropout(layer):
            assert torch.equal(layer(x), expected)


def test_afterwards_the_layer_is_as_it_was() -> None:
    layer = nn.Dropout(0.5)
    with fused_lora.use_fast_dropout(layer):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)
