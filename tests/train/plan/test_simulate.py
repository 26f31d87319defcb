"""What a plan takes Liger's kernels to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from src.data.store import Example
from src.model.source import Source
from src.schema import TrainConfig
from src.train.plan import simulate
from src.train.plan.estimate import MemoryEstimator

SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4,
)  # fmt: skip
TOKENS = 48


def kept(module: Any, x: torch.Tensor) -> int:
    """Bytes that autograd keeps of a frozen module for the way back to its input."""
    weights = {p.untyped_storage()._cdata for p in module.requires_grad_(False).parameters()}
    held = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        held[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        module(x.requires_grad_())
    return sum(size for storage, size in held.items() if storage not in weights)


def test_a_norm_keeps_its_input_and_a_gated_block_its_two_halves() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16()
    layer = model.model.layers[0]
    x = torch.randn(1, TOKENS, 32, dtype=torch.bfloat16)
    with simulate.liger_kernels(model):
        assert kept(layer.input_layernorm, x) == TOKENS * (32 * 2 + 4)
        assert kept(layer.mlp, x) == TOKENS * 2 * 80 * 2
    assert kept(layer.mlp, x) == TOKENS * 3 * 80 * 2  # without, the activation of the gate as well


def peak(folder: Path, kind: str, with_liger: bool) -> int:
    getattr(transformers, f"{kind}Config")(**SIZES, architectures=[f"{kind}ForCausalLM"]).save_pretrained(folder)
    rows = [Example(list(range(TOKENS)), [True] * TOKENS)] * 4
    cfg = TrainConfig(lora_dropout=0.0, batch_size=4, output_dir=str(folder))
    source = Source(str(folder), folder, None)
    found = MemoryEstimator(source, rows, [], "bfloat16", "cuda", None, 0, with_liger=with_liger)
    return found.memory(cfg, checkpointing=False).peak


@pytest.mark.parametrize(("kind", "known"), [("Llama", True), ("Qwen2", True), ("GPTNeoX", False)])
def test_a_plan_with_liger_is_smaller_for_the_models_that_it_knows(tmp_path: Path, kind: str, known: bool) -> None:
    assert (peak(tmp_path, kind, True) < peak(tmp_path, kind, False)) == known


def test_the_known_models_are_called_as_transformers_calls_them() -> None:
    assert set(CONFIG_MAPPING_NAMES) >= simulate.LIGER_MODEL_TYPES
