"""Packed examples give the results of single ones, in every architecture that supports packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode

from src.model import packed_attention

SIZES: dict[str, Any] = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
WIDE = SIZES | {"head_dim": 16}
OLD: dict[str, Any] = dict(
    vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
)
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
CAN = {
    "Llama": SIZES, "Mistral": SIZES | {"sliding_window": 4}, "Qwen2": SIZES, "Qwen3": WIDE, "Gemma": WIDE,
    "Gemma2": WIDE | WINDOW | {"attn_logit_softcapping": 1.0}, "Phi3": SIZES, "GPT2": OLD, "Granite": SIZES,
    "GPTNeoX": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, "Mixtral": SIZES, "Cohere": SIZES,
}  # fmt: skip
CANNOT = {
    "Bloom": dict(vocab_size=128, hidden_size=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "Mamba": dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, bos_token_id=1, eos_token_id=2),
}


def built(name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(hf, head)(getattr(hf, f"{name}Config")(**settings))
    for parameter in model.parameters():  # so that attention matters: fresh weights are near nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def together(model: Any, rows: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    lengths = [len(r) for r in rows]
    with packed_attention.use_packed_attention(model):
        packed_attention.set_row_lengths(lengths)
        out = model(
            input_ids=torch.cat(rows)[None], position_ids=packed_attention.position_ids(lengths), use_cache=False
        ).logits
    return out[0].split(lengths)


@pytest.mark.parametrize("name", CAN)
def test_packed_examples_have_the_logits_of_single_ones(name: str) -> None:
    model = built(name, CAN[name]).eval()
    assert packed_attention.why_unsupported(model) is None
    rows = [torch.randint(3, 128, (n,)) for n in (9, 2, 14)]
    model.set_attn_implementation("eager")  # what it is by its own words
    expected = [model(input_ids=r[None], use_cache=False).logits[0] for r in rows]
    for got, alone in zip(together(model, rows), expected, strict=True):
        torch.testing.assert_close(got, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CAN)
def test_packed_examples_have_the_gradients_of_single_ones(name: str) -> None:
    model = built(name, CAN[name]).eval()
    rows = [torch.randint(3, 128, (n,)) for n in (9, 14)]
    weight = model.get_input_embeddings().weight
    model.set_attn_implementation("eager")
    alone = sum(model(input_ids=r[None], use_cache=False).logits[0].logsumexp(-1).sum() for r in rows)
    (expected,) = torch.autograd.grad(alone, weight)
    (got,) = torch.autograd.grad(sum(t.logsumexp(-1).sum() for t in together(model, rows)), weight)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CANNOT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_rows_is_found_out(name: str, dtype: torch.dtype) -> None:
    assert packed_attention.why_unsupported(built(name, CANNOT[name], dtype)) is not None


def test_the_attention_of_a_model_is_restored_afterwards() -> None:
    model = built("Llama", SIZES)
    before = model.config._attn_implementation
    with packed_attention.use_packed_attention(model):
        assert model.config._attn_implementation == packed_attention.NAME
    assert model.config._attn_implementation == before


def test_a_batch_without_row_lengths_is_rejected() -> None:
    model = built("Llama", SIZES)
    packed_attention.set_row_lengths([3])
    with (
        packed_attention.use_packed_attention(model),
        pytest.raises(ValueError, match="does not fit examples"),
    ):
        model(input_ids=torch.ones(2, 4, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize("shared", [1, 4], ids=["a head each", "shared heads"])
@pytest.mark.parametrize("window", [None, 64], ids=["", "windowed"])
def test_the_kernel_is_called_with_valid_arguments_forward_and_backward(shared: int, window: int | None) -> None:
    with FakeTensorMode():  # it checks shapes and types, and computes nothing
        shapes = [(1, heads, 300, 64) for heads in (8, 8 // shared, 8 // shared)]
        q, k, v = leaves = [torch.empty(shape, requires_grad=True) for shape in shapes]
        packed_attention.set_row_lengths([200, 99, 1])
        with torch.autocast("cpu", torch.bfloat16):
            taken = packed_attention.cast_to_autocast(q, k, v)
            out = packed_attention._attend_varlen(*taken, 0.1, window)
        assert (out.shape, out.dtype) == ((1, 300, 8, 64), torch.bfloat16)
        out.sum().backward()
        assert [t.grad.shape for t in leaves if t.grad is not None] == shapes


def test_without_autocast_nothing_is_rounded() -> None:
    tensors = torch.ones(2), torch.ones(2, dtype=torch.float16)
    assert [t.dtype for t in packed_attention.cast_to_autocast(*tensors)] == [torch.float32, torch.float16]
