"""A layer and its update computed as one: the same values and gradients as peft's, rounded less."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from src.model import fused_lora

SHAPES = [(7, 24), (2, 5, 24), (1, 3, 2, 24)]


def layer(dtype: torch.dtype = torch.float32, bias: bool = True, **settings: Any) -> Any:
    """A linear layer of 24 inputs and 40 outputs with an update that is not nothing."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["0"], **settings)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 40, bias=bias, dtype=dtype)), config)
    found: Any = model.base_model.model[0]
    nn.init.normal_(found.lora_B["default"].weight)
    return found


def passed(module: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What comes out for x, and every gradient of it; random numbers start anew."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    out = module(x)
    out.backward(torch.linspace(-1, 1, out.numel()).to(out.dtype).view_as(out))
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad} | {
        n: p.grad for n, p in module.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_gives_the_values_and_gradients_of_peft(shape: tuple[int, ...], bias: bool, dropout: float) -> None:
    module, x = layer(bias=bias, lora_dropout=dropout), torch.randn(shape)
    expected = passed(module, x)
    with fused_lora.use_fused_lora(module, "float32"):
        assert "forward" in vars(module)
        torch.testing.assert_close(passed(module, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [False, True])
def test_it_computes_under_autocast_and_checkpointing_what_peft_does(kept: bool) -> None:
    module, x = layer(torch.bfloat16), torch.randn(2, 9, 24, dtype=torch.bfloat16)
    exact = passed(deepcopy(module).double(), x.double())

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return checkpoint(self.module, x, use_reentrant=False) if kept else self.module(x)

    def errors() -> dict[str, float]:
        found = {name.removeprefix("module."): value for name, value in passed(Again(), x).items()}
        return {n: float((found[n].double() - exact[n]).norm() / exact[n].norm()) for n in exact}

    of_peft = errors()
    with fused_lora.use_fused_lora(module, "bfloat16"):
        ours = errors()
    assert all(ours[name] <= 1.2 * of_peft[name] for name in exact), (ours, of_peft)
    assert ours["out"] < of_peft["out"]


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    module, x = layer(), torch.randn(3, 24)
    with fused_lora.use_fused_lora(module, "float32"):
        module(x).sum().backward()
    assert module.lora_A["default"].weight.grad is not None


def test_an_evaluation_has_no_dropout() -> None:
    module, x = layer(lora_dropout=0.5).eval(), torch.randn(3, 24)
    expected = module(x)
    with fused_lora.use_fused_lora(module, "float32"):
        torch.testing.assert_close(module(x), expected)


def test_afterwards_the_layer_is_as_it_was() -> None:
    module = layer()
    with pytest.raises(KeyError), fused_lora.use_fused_lora(module, "float32"):
        raise KeyError
    assert "forward" not in vars(module)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}],
    ids=lambda s: next(iter(s)),
)
def test_a_layer_that_is_more_than_one_update_is_left_to_peft(settings: dict[str, Any]) -> None:
    module = layer(**settings)
    if "bias" in settings:
        module.base_layer.bias.requires_grad_()
    with fused_lora.use_fused_lora(module, "float32"):
        assert "forward" not in vars(module)


def test_a_layer_of_another_precision_a_merged_or_a_disabled_one_is_left_to_peft() -> None:
    merged, disabled = layer(), layer()
    merged.merge()
    disabled.enable_adapters(False)
    for module, dtype in ((layer(), "bfloat16"), (merged, "float32"), (disabled, "float32")):
        with fused_lora.use_fused_lora(module, dtype):
            assert "forward" not in vars(module)


# Dropout of few random bits: as often, as independent and as large as dropout has to be


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_values_are_dropped_independently_with_the_given_probability(p: float) -> None:
    dropout, n = nn.Dropout(p), 400_000
    torch.manual_seed(0)
    with fused_lora.use_fast_dropout(dropout):
        gone = (dropout(torch.ones(n)) == 0).view(-1, 4).double()
        again = (dropout(torch.ones(n)) == 0).view(-1, 4).double()
    spread = (p * (1 - p) / (n / 4)) ** 0.5  # of the mean of one of the four values that share a draw
    assert ((gone.mean(0) - p).abs() < 5 * spread).all()
    together = torch.corrcoef(torch.cat([gone, again], dim=1).T) - torch.eye(8)
    assert together.abs().max() < 5 / (n / 4) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 64)])
def test_what_stays_is_scaled_and_the_gradient_takes_the_same_way(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    dropout, x = nn.Dropout(0.25), torch.ones(shape, dtype=dtype, requires_grad=True)
    with fused_lora.use_fast_dropout(dropout):
        out = dropout(x)
        out.backward(torch.full_like(out, 2))
    scale = torch.tensor(1 / 0.75, dtype=dtype)
    assert set(out.detach().flatten().tolist()) <= {0.0, scale.item()}
    torch.testing.assert_close(x.grad, 2 * out.detach())


def test_the_same_seed_drops_the_same_values() -> None:
    dropout, x = nn.Dropout(0.5), torch.ones(1000)
    with fused_lora.use_fast_dropout(dropout):
        torch.manual_seed(3)
        first = dropout(x)
        assert not torch.equal(dropout(x), first)
        torch.manual_seed(3)
        assert torch.equal(dropout(x), first)


def test_nothing_is_dropped_by_chance_nought_or_in_an_evaluation_and_all_by_chance_one() -> None:
    x = torch.randn(50)
    for dropout, expected in ((nn.Dropout(0.0), x), (nn.Dropout(0.5).eval(), x), (nn.Dropout(1.0), 0 * x)):
        with fused_lora.use_fast_dropout(dropout):
            assert torch.equal(dropout(x), expected)


def test_afterwards_the_dropout_layer_is_as_it_was() -> None:
    dropout = nn.Dropout(0.5)
    with fused_lora.use_fast_dropout(dropout):
        assert "forward" in vars(dropout)
    assert "forward" not in vars(dropout)
