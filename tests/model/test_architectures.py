"""Adapters over small models of many families: every linear layer but the head is reached, and learns."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEED_FORWARD
from torch import nn
from transformers.pytorch_utils import Conv1D

from src.model import adapters, load, methods
from src.model.source import Source
from src.schema import MethodArgs

pytest_plugins = ["tests.fixtures"]

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
       "eos_token_id": 2}  # fmt: skip
FAMILIES = {
    "Llama": SIZES,
    "Mistral": SIZES,
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Gemma2": SIZES,
    "Gemma3Text": SIZES,
    "Phi3": SIZES,
    "GPTNeoX": {k: v for k, v in SIZES.items() if k not in {"num_key_value_heads", "head_dim"}},
    "GPT2": GPT,
}
CLASSES = {"Gemma3Text": "Gemma3", "GPT2": "GPT2LMHead"}  # where the model is not named as its settings are
TARGETED = [name for name, method in methods.METHODS.items() if "lora_target_modules" in method.keys]
ROWS = torch.arange(3, 35).view(2, 16)


@cache
def settings_of(family: str) -> Any:
    return getattr(transformers, f"{family}Config")(**FAMILIES[family])


def model_of(family: str) -> Any:
    load.seed_everything(0)
    name = CLASSES.get(family, family)
    kind = getattr(transformers, f"{name}Model" if name.endswith("LMHead") else f"{name}ForCausalLM")
    model = kind(settings_of(family))
    model.config.use_cache = False
    return model


def linear_layers(model: Any) -> set[str]:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def tuned(model: Any, method: str, **others: Any) -> Any:
    args = MethodArgs(**{"method": method, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **others})
    return adapters.apply_method(model, args, Source("base", None, None), steps=20)


def layers_with_an_update(model: Any) -> set[str]:
    return {n for n, m in model.get_base_model().named_modules() if hasattr(m, "base_layer")}


@pytest.mark.parametrize("method", [m for m in TARGETED if not methods.METHODS[m].four_bit])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_reaches_every_linear_layer_but_the_head_and_learns(family: str, method: str) -> None:
    model = model_of(family)
    expected = linear_layers(model)
    adapted = tuned(model, method)
    assert layers_with_an_update(adapted) == expected
    adapted.train()
    free = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(free.values(), lr=0.05)
    for _ in range(2):  # B, and AdaLoRA's E, start at zero: until they move, nothing else has a gradient
        optimizer.zero_grad()
        adapted(input_ids=ROWS, labels=ROWS).loss.backward()
        optimizer.step()
    still = [n for n, p in free.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_whose_input_is_scaled_lead_out_of_the_feed_forward_block(family: str) -> None:
    model = model_of(family)
    known = FEED_FORWARD.get(model.config.model_type, ["down_proj"])
    expected = {n for n in linear_layers(model) if n.endswith(tuple(known))}
    assert set(methods.feed_forward_outputs(model)) == expected and len(expected) == 2
    adapted = tuned(model, "ia3")
    found = {n for n, m in adapted.get_base_model().named_modules() if getattr(m, "is_feedforward", False)}
    assert found == expected


def test_layers_with_one_name_in_two_blocks_are_distinguished() -> None:
    adapted = tuned(model_of("GPT2"), "ia3", lora_target_modules=["c_proj"])
    inputs = {n: m.is_feedforward for n, m in adapted.get_base_model().named_modules() if hasattr(m, "base_layer")}
    assert inputs == {
        f"transformer.h.{i}.{part}.c_proj": part == "mlp" for i in range(2) for part in ("attn", "mlp")
    }


@pytest.mark.parametrize("named", [["up_proj"], ".*up_proj"])
def test_the_layers_with_scaled_inputs_can_be_named(named: Any) -> None:
    adapted = tuned(model_of("Llama"), "ia3", peft={"feedforward_modules": named})
    found = {n for n, m in adapted.get_base_model().named_modules() if getattr(m, "is_feedforward", False)}
    assert found == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prefix", "p_tuning", "prompt"])
def test_virtual_tokens_learn(family: str, method: str) -> None:
    adapted = tuned(model_of(family), method).train()
    adapted(input_ids=ROWS, attention_mask=torch.ones_like(ROWS), labels=ROWS).loss.backward()
    free = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert free and all(p.grad is not None and p.grad.abs().max() > 0 for p in free.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_of_each_family_merges(family: str) -> None:
    adapted = tuned(model_of(family), "lora")
    load.seed_everything(1)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    adapted.eval()
    with torch.inference_mode():
        before = adapted(input_ids=ROWS).logits
        after = methods.merge(adapted)(input_ids=ROWS).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
