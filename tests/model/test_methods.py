"""Tuning methods: each of the table trains, is saved, and comes back as the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from src.config import MethodArgs
from src.data.chat import Chat
from src.errors import ModelError
from src.model import load, methods
from src.model.source import Source, locate, locate_tuned
from src.train.pipeline import save
from tests.fixtures import ANSWER, ROOT, World, chat

pytest_plugins = ["tests.fixtures"]

LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def args(method: str, **others: Any) -> MethodArgs:
    return MethodArgs(**{"method": method, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **others})


def base(tiny: Path, method: str = "lora") -> tuple[Any, Source]:
    return load.load_base(locate(str(tiny)), "float32", "cpu", four_bit=methods.METHODS[method].four_bit)


def tuned(tiny: Path, given: MethodArgs, **others: Any) -> Any:
    model, source = base(tiny, given.method)
    load.seed_everything(0)
    return methods.apply(model, given, source, **others)


def batch(tokenizer: Any) -> torch.Tensor:
    return torch.tensor(
        [tokenizer.apply_chat_template(chat("Top of feed rate?", ANSWER)["messages"])["input_ids"]]
    )


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("method", methods.METHODS)
def test_each_method_trains_a_step_and_comes_back_from_disk_as_the_same_model(
    tiny: Path, tokenizer: Any, tmp_path: Path, method: str
) -> None:
    ids = batch(tokenizer)
    model = tuned(tiny, args(method))
    before = logits(model, ids)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):  # an adapter's B starts at zero: the first step moves nothing but B
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = logits(model, ids)
    moved = (after - before).abs().max()
    assert moved > 0.5

    save(model, Chat(tokenizer), tmp_path / "model")
    again, _, _ = load.load_tuned(locate_tuned(tmp_path / "model"), "float32", "cpu")
    # A 4-bit base is rounded; its adapter is evaluated on the base as it is.
    tolerance = 0.2 if methods.METHODS[method].four_bit else 1e-6
    torch.testing.assert_close(logits(again, ids), after, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", [m for m in methods.METHODS if m != "full"])
def test_before_its_first_step_an_adapter_changes_nothing(tiny: Path, tokenizer: Any, method: str) -> None:
    ids = batch(tokenizer)
    untouched = logits(base(tiny, method)[0], ids)
    torch.testing.assert_close(logits(tuned(tiny, args(method)), ids), untouched, rtol=0, atol=1e-5)


def test_each_method_can_be_asked_for_and_has_a_preset() -> None:
    assert set(get_args(get_type_hints(MethodArgs)["method"])) == set(methods.METHODS)
    assert {p.stem for p in (ROOT / "configs" / "method").glob("*.yaml")} == set(methods.METHODS)


def test_the_methods_are_what_they_are_called(tiny: Path) -> None:
    def settings(method: str) -> Any:
        return tuned(tiny, args(method)).peft_config["default"]

    assert (settings("lora").use_rslora, settings("lora").use_dora) == (False, False)
    assert settings("rslora").use_rslora
    assert settings("dora").use_dora
    assert any("4bit" in type(m).__name__ for m in tuned(tiny, args("qlora")).modules())
    assert all(p.requires_grad for p in tuned(tiny, args("full")).parameters())


@pytest.mark.parametrize("method", [m for m in methods.METHODS if m != "full"])
def test_an_adapter_freezes_the_base(tiny: Path, method: str) -> None:
    model = tuned(tiny, args(method))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_full_weights_are_trained_in_32_bits(tiny: Path) -> None:
    model, source = load.load_base(locate(str(tiny)), "bfloat16", "cpu")
    model = methods.apply(model, args("full"), source)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def adapted(model: Any) -> set[str]:
    return {n.split("base_model.model.")[1] for n, m in model.named_modules() if hasattr(m, "lora_A")}


def test_without_target_modules_every_linear_layer_but_the_head_is_taken(tiny: Path) -> None:
    model, _ = base(tiny)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert {n.rsplit(".", 1)[-1] for n in linear} == LLAMA_LAYERS
    assert adapted(tuned(tiny, args("lora", lora_target_modules=None))) == linear


def test_target_modules_are_those_named(tiny: Path) -> None:
    found = adapted(tuned(tiny, args("lora", lora_target_modules=["q_proj", "layers.1.mlp.up_proj"])))
    assert found == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    }  # fmt: skip


def test_target_modules_that_match_nothing_are_named_with_what_there_is(tiny: Path) -> None:
    with pytest.raises(ModelError) as caught:
        tuned(tiny, args("lora", lora_target_modules=["q_proj", "c_attn", "proj"]))
    told = str(caught.value)
    assert "lora_target_modules: c_attn, proj matches no layer" in told
    assert all(layer in told for layer in LLAMA_LAYERS)


def test_further_peft_arguments_reach_the_adapter(tiny: Path) -> None:
    given = args("lora", lora_target_modules=["q_proj"], peft={"layers_to_transform": [1]})
    model = tuned(tiny, given)
    assert {n.split(".")[2] for n in adapted(model)} == {"1"}


def test_parameters_are_counted_by_hand(tiny: Path) -> None:
    model, _ = base(tiny)
    total = sum(p.numel() for p in model.parameters())
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    added = sum(4 * (m.in_features + m.out_features) for m in layers)
    assert methods.trainable_parameters(tuned(tiny, args("lora"))) == (added, total + added)
    assert methods.trainable_parameters(tuned(tiny, args("qlora"))) == (added, total + added)
    assert methods.trainable_parameters(tuned(tiny, args("full"))) == (total, total)


def test_the_revision_of_the_base_stands_in_adapter_and_manifest(finished: World, tiny: Path) -> None:
    run = finished.newest
    revision = locate(str(tiny)).revision
    settings = json.loads((run.model / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (str(tiny), revision)
    assert run.manifest["base_model"] == {"name": str(tiny), "revision": revision}


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_method_that_is_not_a_plain_adapter_is_compared_with_its_base_all_the_same(
    world: World, method: str
) -> None:
    run = world.train(f"method={method}", "max_steps=2", "lr=0.001")
    assert world.call("eval", "splits=[test]") == 0
    assert world.call("eval-baseline", "splits=[test]") == 0
    assert (run.path / "comparison.json").exists()


@pytest.mark.parametrize("method", methods.METHODS)
def test_each_method_trains_and_answers_in_the_best_precision_of_the_hardware(world: World, method: str) -> None:
    run = world.train(f"method={method}", "bf16=auto", "max_steps=2", "lr=0.001")
    figures = json.loads((run.path / "metrics.json").read_text())["train"]
    assert 6 < figures["train_loss"] < 6.5  # about ln 512: nothing is learned yet, and nothing overflows
    assert world.call("eval", "bf16=auto", "splits=[test]", "max_examples=2") == 0
