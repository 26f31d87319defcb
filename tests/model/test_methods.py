"""Tuning methods: each of the table trains, is saved, comes back as the same model, and merges or says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from src import config
from src.data.chat import ChatTokenizer
from src.errors import ConfigError, ModelError
from src.model import adapters, load, methods, packed_attention
from src.model.source import Source, locate, locate_tuned
from src.schema import MethodArgs
from src.train.pipeline import save_model
from tests.fixtures import ANSWER, ROOT, World, chat

pytest_plugins = ["tests.fixtures"]

METHODS = methods.METHODS
ADAPTERS = [name for name, method in METHODS.items() if method.config]
TARGETED = [name for name, method in METHODS.items() if "lora_target_modules" in method.keys]
STEPS = 20

LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def args(method: str, **others: Any) -> MethodArgs:
    return MethodArgs(**{"method": method, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **others})


def base(tiny: Path, method: str = "lora") -> tuple[Any, Source]:
    return load.load_base(locate(str(tiny)), "float32", "cpu", four_bit=METHODS[method].four_bit)


def tuned(tiny: Path, given: MethodArgs, **others: Any) -> Any:
    model, source = base(tiny, given.method)
    load.seed_everything(0)
    return adapters.apply_method(model, given, source, **{"steps": STEPS, **others})


def batch(tokenizer: Any) -> torch.Tensor:
    return torch.tensor(
        [tokenizer.apply_chat_template(chat("Top of feed rate?", ANSWER)["messages"])["input_ids"]]
    )


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        return model(input_ids=ids).logits


def trained(tiny: Path, ids: torch.Tensor, given: MethodArgs, steps: int = 3) -> Any:
    """A model after a few steps; of a low-rank update, the first moves nothing but B."""
    model = tuned(tiny, given)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_comes_back_from_disk_as_the_same_model(
    tiny: Path, tokenizer: Any, tmp_path: Path, method: str
) -> None:
    ids = batch(tokenizer)
    before = logits(tuned(tiny, args(method)), ids)
    model = trained(tiny, ids, args(method))
    after = logits(model, ids)
    assert (after - before).abs().max() > 0.1

    save_model(model, ChatTokenizer(tokenizer), tmp_path / "model")
    again, _, _ = load.load_tuned(locate_tuned(tmp_path / "model"), "float32", "cpu")
    # A 4-bit base is rounded; its adapter is evaluated on the base as it is.
    tolerance = 0.2 if METHODS[method].four_bit else 1e-5
    torch.testing.assert_close(logits(again, ids), after, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", TARGETED)
def test_before_its_first_step_an_update_changes_nothing(tiny: Path, tokenizer: Any, method: str) -> None:
    ids, (untouched, _) = batch(tokenizer), base(tiny, method)
    adapters.keep_differentiable(untouched)  # the product for answers, of packed weights, rounds to bfloat16
    expected = logits(untouched, ids)
    torch.testing.assert_close(logits(tuned(tiny, args(method)), ids), expected, rtol=0, atol=1e-5)


# Merging


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].unmergeable])
def test_a_merged_model_has_the_logits_of_its_adapter(
    tiny: Path, tokenizer: Any, tmp_path: Path, method: str
) -> None:
    ids = batch(tokenizer)
    save_model(trained(tiny, ids, args(method)), ChatTokenizer(tokenizer), tmp_path / "model")
    model, _, _ = load.load_tuned(locate_tuned(tmp_path / "model"), "float32", "cpu")
    before = logits(model, ids)
    assert (before - logits(base(tiny)[0], ids)).abs().max() > 0.1
    merged = methods.merge(model)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in base(tiny)[0].named_parameters()}
    torch.testing.assert_close(logits(merged, ids), before, rtol=0, atol=1e-4)
    assert "cannot" not in methods.mergeability(method)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].unmergeable])
def test_what_cannot_be_merged_says_so(tiny: Path, method: str) -> None:
    with pytest.raises(ModelError) as caught:
        methods.merge(tuned(tiny, args(method)))
    assert METHODS[method].unmergeable in str(caught.value)
    assert METHODS[method].unmergeable in methods.mergeability(method)


def test_nothing_is_merged_into_rounded_weights(tiny: Path) -> None:
    with pytest.raises(ModelError, match="cannot be merged into quantised weights"):
        methods.merge(tuned(tiny, args("qlora")))


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_nothing_is_merged_into_weights_that_two_layers_share(tiny: Path, layer: str) -> None:
    model, source = base(tiny)
    given = args("lora", lora_target_modules=["q_proj"], peft={"target_parameters": None})
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tied = adapters.apply_method(model, given, source, steps=STEPS)
    assert methods.merge(tied) is model
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ModelError, match="is adapted, and shares its weights"):
        methods.merge(get_peft_model(model, LoraConfig(target_modules=[layer])))


# What the names mean


def test_each_method_is_in_the_schema_and_has_a_preset() -> None:
    assert set(get_args(get_type_hints(MethodArgs)["method"])) == set(METHODS)
    assert {p.stem for p in (ROOT / "configs" / "method").glob("*.yaml")} == set(METHODS)


def test_the_methods_set_what_their_names_say(tiny: Path) -> None:
    def settings(method: str) -> Any:
        return tuned(tiny, args(method)).peft_config["default"]

    assert (settings("lora").use_rslora, settings("lora").use_dora) == (False, False)
    assert settings("rslora").use_rslora
    assert settings("dora").use_dora
    assert settings("adalora").target_r == 4
    assert any("4bit" in type(m).__name__ for m in tuned(tiny, args("qlora")).modules())
    assert all(p.requires_grad for p in tuned(tiny, args("full")).parameters())


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_freezes_the_base(tiny: Path, method: str) -> None:
    model, source = base(tiny, method)
    of_base = {id(p) for p in model.parameters()}
    parameters = list(adapters.apply_method(model, args(method), source, steps=STEPS).parameters())
    assert of_base <= {id(p) for p in parameters}
    assert {p.requires_grad for p in parameters if id(p) in of_base} == {False}
    assert any(p.requires_grad for p in parameters)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_do_not_depend_on_an_earlier_evaluation(tiny: Path, method: str) -> None:
    ids = torch.arange(3, 23)[None]

    def taught(evaluated: bool) -> dict[str, torch.Tensor]:
        model, source = load.load_base(locate(str(tiny)), "bfloat16", "cpu", four_bit=METHODS[method].four_bit)
        load.seed_everything(0)
        model = adapters.apply_method(model, args(method), source, steps=STEPS)
        if evaluated:
            logits(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            model.train()(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    before, after = taught(False), taught(True)
    assert any(grad.abs().max() > 0 for grad in before.values())
    for name, grad in before.items():
        torch.testing.assert_close(after[name], grad, rtol=1e-2, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_trained_is_held_in_32_bits_and_the_rest_as_it_was_loaded(
    tiny: Path, method: str, dtype: str
) -> None:
    model, source = load.load_base(locate(str(tiny)), dtype, "cpu", four_bit=METHODS[method].four_bit)
    model = adapters.apply_method(model, args(method), source, steps=STEPS)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    rest = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert rest <= {load.DTYPES[dtype], torch.uint8}  # four bits are packed into bytes


def adapted(model: Any) -> set[str]:
    """Names of the layers that have an update."""
    return {n.split("base_model.model.")[1] for n, m in model.named_modules() if hasattr(m, "base_layer")}


@pytest.mark.parametrize("method", TARGETED)
def test_without_target_modules_every_linear_layer_but_the_head_is_taken(tiny: Path, method: str) -> None:
    model, _ = base(tiny)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert {n.rsplit(".", 1)[-1] for n in linear} == LLAMA_LAYERS
    assert adapted(tuned(tiny, args(method, lora_target_modules=None))) == linear


@pytest.mark.parametrize("method", TARGETED)
def test_target_modules_are_those_named(tiny: Path, method: str) -> None:
    found = adapted(tuned(tiny, args(method, lora_target_modules=["q_proj", "layers.1.mlp.up_proj"])))
    assert found == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    }  # fmt: skip


@pytest.mark.parametrize("method", TARGETED)
def test_target_modules_without_a_match_are_reported_with_the_existing_layers(tiny: Path, method: str) -> None:
    with pytest.raises(ModelError) as caught:
        tuned(tiny, args(method, lora_target_modules=["q_proj", "c_attn", "proj"]))
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
    assert adapters.count_parameters(tuned(tiny, args("lora"))) == (added, total + added)
    assert adapters.count_parameters(tuned(tiny, args("qlora"))) == (added, total + added)
    assert adapters.count_parameters(tuned(tiny, args("full"))) == (total, total)


def test_the_revision_of_the_base_is_in_adapter_and_manifest(finished: World, tiny: Path) -> None:
    run = finished.newest
    revision = locate(str(tiny)).revision
    settings = json.loads((run.model / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (str(tiny), revision)
    assert run.manifest["base_model"] == {"name": str(tiny), "revision": revision}


# Settings that contradict the method: all before torch, all at once


def refused(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load("train", values, methods.problems)
    return list(caught.value.problems)


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_unknown_peft_argument_is_reported_with_the_class_of_the_method(method: str) -> None:
    owner = METHODS[method].config
    told = refused(method=method, peft={"modules_to_sav": []}, lr="abc")
    assert told == [
        "lr=abc: should be a number",
        f"peft.modules_to_sav is not an argument of {owner}; did you mean modules_to_save?",
    ]


def test_an_argument_of_another_method_is_unknown() -> None:
    assert refused(method="ia3", peft={"init_r": 4}) == ["peft.init_r is not an argument of IA3Config"]
    assert config.load("train", {"method": "adalora", "peft": {"init_r": 4}}, methods.problems).peft == {
        "init_r": 4
    }


@pytest.mark.parametrize(
    ("method", "argument", "setting"),
    [
        ("lora", "r", "lora_r"),
        ("lora", "use_dora", "method=dora"),
        ("dora", "base_model_name_or_path", "model_name"),
        ("adalora", "target_r", "lora_r"),
        ("adalora", "r", "lora_r"),
        ("ia3", "target_modules", "lora_target_modules"),
        ("prompt", "task_type", "method"),
        ("prefix", "inference_mode", "method"),
    ],
)
def test_a_peft_argument_with_a_setting_names_it(method: str, argument: str, setting: str) -> None:
    told = refused(method=method, peft={argument: 1})
    assert told == [f"peft.{argument} is not supported: use {setting}"]


def test_an_adapter_argument_is_rejected_without_an_adapter() -> None:
    told = refused(method="full", peft={"alpha_pattern": {"q_proj": 8}})
    assert told == ["peft: {...} is not supported with method=full, which has no adapter; remove it"]
    assert config.load("train", {"method": "full"}, methods.problems).method == "full"


@pytest.mark.parametrize("method", METHODS)
def test_target_modules_are_refused_where_nothing_has_targets(method: str) -> None:
    values = {"method": method, "lora_target_modules": ["q_proj"]}
    if method in TARGETED:
        assert config.load("train", values, methods.problems).lora_target_modules == ["q_proj"]
    else:
        (told,) = refused(**values)
        assert told.startswith(f"lora_target_modules is not supported with method={method}")


def test_checkpointing_is_refused_where_it_fails() -> None:
    (told,) = refused(method="prefix", gradient_checkpointing=True)
    assert told == "gradient_checkpointing=true is not supported with method=prefix; set it to false"


@pytest.mark.parametrize("method", METHODS)
def test_packing_is_rejected_for_virtual_tokens(method: str) -> None:
    values = {"method": method, "packing": True}
    if not METHODS[method].padding_free:
        (told,) = refused(**values)
        reason = f"method={method} adds virtual tokens before each row of a batch"
        assert told == f"packing=true is not supported: {reason}; set packing=false"
    else:
        assert config.load("train", values, methods.problems).packing


@pytest.mark.parametrize("method", METHODS)
def test_examples_are_packed_if_the_table_says_so(tiny: Path, method: str) -> None:
    model = tuned(tiny, args(method))
    assert (packed_attention.why_unsupported(model) is None) == METHODS[method].padding_free


@pytest.mark.parametrize("method", ADAPTERS)
def test_each_method_trains_under_checkpointing_or_is_marked(tiny: Path, tokenizer: Any, method: str) -> None:
    ids = batch(tokenizer)
    model = tuned(tiny, args(method))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    try:
        plain = tuned(tiny, args(method)).train()
        expected = plain(input_ids=ids, labels=ids).loss
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        works = bool(torch.isclose(loss, expected, atol=1e-5))
        expected.backward()
        for (name, p), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, other.grad, msg=name)
    except (ValueError, RuntimeError, AssertionError):
        works = False
    assert works == METHODS[method].checkpointing


# A quantised base


def test_full_training_of_a_quantised_model_is_rejected(world: World, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rounded"
    shutil.copytree(tiny, folder)
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"method=full cannot train .*rounded, whose weights are quantised"):
        methods.check_base(locate(str(folder)), "full")
    methods.check_base(locate(str(folder)), "lora")
    assert world.call("train", "method=full", f"model_name={folder}") == 2
    assert world.runs == []
    model, source = base(tiny, "qlora")  # as one from the Hub, whose settings are known when it is loaded
    with pytest.raises(ModelError, match="whose weights are quantised"):
        adapters.apply_method(model, args("full"), source, steps=STEPS)


def test_a_quantised_model_is_trained_by_an_adapter_and_evaluated(
    world: World, tiny: Path, tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "rounded"
    base(tiny, "qlora")[0].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # in a child process, where unneeded packages are hidden
    training = world.start("train", "method=lora", f"model_name={folder}", "max_steps=2")
    told, _ = training.communicate()
    assert training.returncode == 0, told
    assert world.call("eval", "splits=[test]", "max_examples=2") == 0
    model, _, _ = load.load_tuned(locate_tuned(world.newest.model), "float32", "cpu")
    assert any("4bit" in type(m).__name__ for m in model.modules())


# Through the stages


@pytest.mark.parametrize("method", METHODS)
def test_each_method_goes_through_every_stage(world: World, method: str) -> None:
    run = world.train(f"method={method}", "bf16=auto", "max_steps=4", "lr=0.001", "lora_r=4")
    figures = json.loads((run.path / "metrics.json").read_text())["train"]
    assert 5.5 < figures["train_loss"] < 9  # about ln 512: nothing is learned yet, and nothing overflows
    assert world.call("eval", "bf16=auto", "splits=[test]", "max_examples=2") == 0
    assert world.call("eval-baseline", "bf16=auto", "splits=[test]", "max_examples=2") == 0
    assert (run.path / "comparison.json").exists()
    assert world.call("publish", "force=true", "gate.guards=[]") == 0
    (card,) = world.artifacts.glob(f"models/*/{run.id}/README.md")
    assert methods.mergeability(method) in card.read_text(encoding="utf-8")
    again, _, _ = load.load_tuned(locate_tuned(card.parent), "float32", "cpu")
    assert hasattr(again, "peft_config") == (method != "full")


def test_the_page_of_methods_holds_the_table() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    table = page.split("|---:|\n")[1].split("\n\n")[0].splitlines()
    rows = {line.split("|")[1].strip(" `"): line for line in table}
    assert set(rows) == set(METHODS)
    for name, method in METHODS.items():
        _, _, trains, merges, free, checkpointing, *_ = (cell.strip() for cell in rows[name].split("|"))
        assert trains == method.trains
        assert merges == ("no" if method.unmergeable else "" if method.config is None else "yes")
        assert (free, checkpointing) == tuple(
            "yes" if x else "no" for x in (method.padding_free, method.checkpointing)
        )
