"""`peft: {...}`: every argument of peft is refused with a reason, or comes back from disk and merges."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from src import config
from src.errors import ConfigError, ModelError
from src.eval import setup
from src.model import adapters, load, methods
from src.model.methods import METHODS, PEFT_OWNED_BY_SETTING
from src.model.peft_arguments import ACCEPTED, REFUSED, why_unserved
from src.model.source import Source, TunedModel, locate, locate_tuned
from src.schema import EvalArgs, MethodArgs
from src.utils.signatures import peft_arguments
from tests.fixtures import World

pytest_plugins = ["tests.fixtures"]

BY_CLASS = {"LoraConfig": "lora", "AdaLoraConfig": "adalora", "IA3Config": "ia3", "PrefixTuningConfig": "prefix",
            "PromptEncoderConfig": "p_tuning", "PromptTuningConfig": "prompt"}  # fmt: skip
IDS = torch.arange(3, 33)[None]
# Arguments that an adapter is made with, by the class of peft: each accepted one is in one of them.
BY_LAYER = {
    "exclude_modules": ["layers.1.self_attn.q_proj"],
    "layers_to_transform": [1],
    "layers_pattern": ["layers"],
}
TIED = {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}
TRIED: dict[str, list[dict[str, Any]]] = {
    "LoraConfig": [
        BY_LAYER | {"bias": "all", "rank_pattern": {"k_.*": 2}, "alpha_pattern": {"v_proj": 2}},
        {"init_lora_weights": "gaussian", "modules_to_save": ["lm_head"], "bias": "lora_only",
         "target_parameters": ["q_proj.weight"], "exclude_modules": ".*q_proj"},
        {"init_lora_weights": False, "trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [4]}},
        {"init_lora_weights": "mica", "trainable_token_indices": [3, 4]},
        {"init_lora_weights": "orthogonal"} | TIED,
    ],
    "AdaLoraConfig": [
        BY_LAYER | {"bias": "all", "init_lora_weights": False},
        {"init_r": 5, "tinit": 1, "tfinal": 3, "deltaT": 2, "beta1": 0.5, "beta2": 0.5, "orth_reg_weight": 0.1,
         "total_step": 10, "trainable_token_indices": [3, 4]},
        TIED,
    ],
    "IA3Config": [
        {"exclude_modules": ["q_proj"], "modules_to_save": ["lm_head"], "feedforward_modules": ["up_proj"],
         "init_ia3_weights": False},
    ],
    "PrefixTuningConfig": [
        {"num_virtual_tokens": 3, "encoder_hidden_size": 8, "prefix_projection": True, "init_weights": None},
        {"init_weights": "zero", "modules_to_save": ["lm_head"]},
    ],
    "PromptEncoderConfig": [
        {"encoder_reparameterization_type": "LSTM", "modules_to_save": ["lm_head"], "num_virtual_tokens": 3},
        {"encoder_num_layers": 3, "encoder_dropout": 0.1, "encoder_hidden_size": 8},
    ],
    "PromptTuningConfig": [
        {"prompt_tuning_init": "RANDOM", "modules_to_save": ["lm_head"], "num_virtual_tokens": 3},
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a text", "tokenizer_name_or_path": "{tiny}"},
    ],
}  # fmt: skip
CASES = [(cls, given) for cls, tried in TRIED.items() for given in tried]


@pytest.fixture(scope="module")
def biased(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with biases, and without a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("biased")
    settings = AutoConfig.from_pretrained(tiny, attention_bias=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untrained(biased: Path) -> Any:
    return load.load_base(locate(str(biased)), "float32", "cpu")[0]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits[:, -IDS.shape[1] :]


def trained(model: Any) -> Any:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        found = model(input_ids=IDS).logits[:, -IDS.shape[1] :]
        loss = torch.nn.functional.cross_entropy(found[0, :-1], IDS[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("cls", ACCEPTED)
def test_each_argument_of_peft_is_accepted_refused_or_a_setting(cls: str) -> None:
    owned = {*PEFT_OWNED_BY_SETTING, *METHODS[BY_CLASS[cls]].keys.values()}
    known = peft_arguments(cls) - owned
    assert known - {*ACCEPTED[cls]} <= {*REFUSED}
    assert {*ACCEPTED[cls]} <= known
    assert {name for given in TRIED[cls] for name in given} == {*ACCEPTED[cls]}


@pytest.mark.parametrize(
    ("method", "given", "wanted"),
    [
        ("lora", {"rank_pattern": [1]}, "names with whole numbers from 1, such as {q_proj: 8}"),
        ("lora", {"rank_pattern": {"q_proj": "x"}}, "names with whole numbers from 1"),
        ("lora", {"alpha_pattern": {"q_proj": -1}}, "names with numbers above 0"),
        ("lora", {"layers_to_transform": "x"}, "the number of a layer, or a list of them"),
        ("adalora", {"deltaT": 0}, "a whole number from 1"),
        ("adalora", {"beta1": 1.5}, "a number from 0 to below 1"),
        ("prefix", {"num_virtual_tokens": 0}, "a whole number from 1"),
        ("p_tuning", {"encoder_hidden_size": -3}, "a whole number from 1"),
        ("p_tuning", {"encoder_dropout": 2}, "a number from 0 to below 1"),
    ],
)
def test_a_value_of_another_type_is_one_sentence(method: str, given: dict[str, Any], wanted: str) -> None:
    (name,) = given
    (problem,) = methods.problems({"method": method, "peft": given})
    assert problem.startswith(f"peft.{name}={given[name]}: should be {wanted}")


@pytest.mark.parametrize(("cls", "given"), CASES)
def test_what_is_accepted_comes_back_from_disk_and_merges(
    biased: Path, untrained: Any, tiny: Path, tmp_path: Path, cls: str, given: dict[str, Any]
) -> None:
    given = json.loads(json.dumps(given).replace("{tiny}", str(tiny)))
    values = {"method": BY_CLASS[cls], "lora_r": 4, "lora_alpha": 8, "peft": given}
    assert config.load("train", values, methods.problems).peft == given  # nothing refuses it
    load.seed_everything(0)
    args = MethodArgs(**values)
    half = adapters.apply_method(deepcopy(untrained).bfloat16(), args, locate(str(biased)), steps=20)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    model = adapters.apply_method(deepcopy(untrained), args, locate(str(biased)), steps=20)
    assert args.peft == given  # config_used.yaml says what was typed
    after = logits(trained(model))
    assert (after - logits(untrained)).abs().max() > 0.01

    model.save_pretrained(tmp_path)
    again = load.attach_adapter(deepcopy(untrained), locate_tuned(tmp_path))
    torch.testing.assert_close(logits(again), after, rtol=0, atol=1e-5)
    if not METHODS[BY_CLASS[cls]].unmergeable:
        torch.testing.assert_close(logits(methods.merge(again)), after, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "damage", [{"megatron_config": {"a": 1}, "megatron_core": "m"}, {"r": -1}, {"peft_type": 3}]
)
def test_a_damaged_adapter_is_one_sentence(
    biased: Path, untrained: Any, tmp_path: Path, damage: dict[str, Any]
) -> None:
    args = MethodArgs(method="lora", lora_r=4)
    adapters.apply_method(deepcopy(untrained), args, locate(str(biased)), steps=20).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ModelError, match=r"the adapter .* cannot be loaded: "):
        load.attach_adapter(deepcopy(untrained), locate_tuned(tmp_path))


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if "lora_target_modules" in m.keys])
def test_embeddings_are_adapted_where_peft_can(biased: Path, untrained: Any, tmp_path: Path, method: str) -> None:
    args = MethodArgs(method=method, lora_r=4, lora_target_modules=["embed_tokens", "q_proj"])  # type: ignore[arg-type]
    if not METHODS[method].embeddings:
        with pytest.raises(ModelError, match="lora_target_modules: embed_tokens matches no layer"):
            adapters.apply_method(deepcopy(untrained), args, locate(str(biased)), steps=20)
        return
    model = trained(adapters.apply_method(deepcopy(untrained), args, locate(str(biased)), steps=20))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any("embed_tokens.lora_embedding_A" in name for name in names)
    assert not any("base_layer" in name for name in names)  # not the embedding itself
    again = load.attach_adapter(deepcopy(untrained), locate_tuned(tmp_path))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(methods.merge(again)), logits(model), rtol=0, atol=1e-4)


def test_tied_tables_train_the_same_rows(untrained: Any, biased: Path) -> None:
    model = deepcopy(untrained)
    model.config.tie_word_embeddings = True
    given = {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}
    with pytest.raises(ModelError, match="share their weights; name the same ids for both"):
        adapters.apply_method(model, MethodArgs(peft=given), locate(str(biased)), steps=20)


def refused(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load("train", values, methods.problems)
    return list(caught.value.problems)


def test_an_argument_that_does_not_come_back_is_refused_with_the_reason() -> None:
    wrong = {"alpha_pattern": {"(": 2}, "layer_replication": [[0, 1]], "init_lora_weights": "pissa_niter_4",
             "bias": "some", "modules_to_save": "lm_head", "use_qalora": None}  # fmt: skip
    assert refused(method="lora", peft=wrong) == [
        "peft.alpha_pattern: '(' is not a regular expression: missing ), unterminated subpattern at position 0",
        "peft.layer_replication is not supported: its adapter cannot be merged, and servers do not load it",
        "peft.init_lora_weights=pissa_niter_4 is not supported: it changes weights of the base model, which are "
        "not saved with the adapter; should be one of true, false, gaussian, orthogonal, mica",
        "peft.bias=some: should be one of none, all, lora_only",
        "peft.modules_to_save=lm_head: should be a list, such as [lm_head]",
    ]
    assert refused(method="adalora", peft={"rank_pattern": {"q_proj": 2}}) == [
        "peft.rank_pattern is not supported: the method distributes the ranks itself"
    ]


# Names that match nothing

LAYERS = "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
ADAPTED = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modules_to_save": ["lm_hed", "norm"]}, f"lm_hed matches no module of this model, which has {LAYERS}"),
        ({"exclude_modules": ["mlp"]}, f"mlp matches no layer of this model, which has {LAYERS}"),
        ({"exclude_modules": ".*experts.*"}, f".*experts.* matches no layer of this model, which has {LAYERS}"),
        ({"trainable_token_indices": {"wte": [1]}}, f"wte matches no layer of this model, which has {LAYERS}"),
        ({"trainable_token_indices": [1, 9999]}, "9999 is no row of the embedding, which has 512"),
        ({"rank_pattern": {"qproj": 2, "v_.*": 2}},
         f"qproj matches no layer with an adapter of this model, which has {ADAPTED}"),
        ({"layers_to_transform": [1, 7]}, "7 matches no layer of this model, which has 0, 1"),
        ({"target_parameters": ["experts.w1"]}, "experts.w1 matches no parameter of this model, which has"),
        ({"bias": "all"}, "peft.bias=all: this model has no bias"),
    ],
)  # fmt: skip
def test_a_name_that_matches_nothing_is_refused_with_those_that_exist(
    tiny: Path, given: dict[str, Any], message: str
) -> None:
    model, source = load.load_base(locate(str(tiny)), "float32", "cpu")
    with pytest.raises(ModelError) as caught:
        adapters.apply_method(model, MethodArgs(peft=given), source, steps=20)
    (problem,) = caught.value.problems
    assert problem.startswith(f"peft.{next(iter(given))}") and message in problem


def test_the_plan_finds_such_a_name_before_the_weights_are_loaded(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.call("train", "peft={modules_to_save: [lm_hed]}", "memory_gb=0.000001") == 2
    assert "peft.modules_to_save: lm_hed matches no module" in capsys.readouterr().err
    assert world.runs == []


def test_a_plan_that_does_not_fit_leaves_out_methods_without_these_arguments(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ("method=adalora", "peft={tinit: 1, tfinal: 1}", "memory_gb=0.000001")
    assert world.call("train", *found) == 2
    output = capsys.readouterr()
    assert "is still too much" in output.out + output.err and "__init__" not in output.out + output.err


# Serving


def test_what_vllm_cannot_serve_is_named() -> None:
    lora = {"peft_type": "LORA", "bias": "none", "rank_pattern": {}, "modules_to_save": None}
    assert why_unserved(lora) == ""
    unserved = lora | {"rank_pattern": {"q_proj": 4}, "use_dora": True}
    assert why_unserved(unserved) == "vLLM does not support rank_pattern, use_dora of an adapter"
    assert why_unserved({"peft_type": "IA3"}) == "vLLM loads LoRA adapters only, and this is IA3"


def test_vllm_gets_no_adapter_that_it_would_apply_wrongly(tmp_path: Path) -> None:
    def refuse(engine: Any, **settings: Any) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
        base = Source("base", tmp_path, None)
        setup.refuse_unserved(EvalArgs(engine=engine), TunedModel(tmp_path, base, True))

    refuse("vllm", rank_pattern={})
    refuse("transformers", rank_pattern={"q_proj": 2})
    with pytest.raises(
        ModelError, match=r"engine=vllm: vLLM does not support rank_pattern of an adapter; set engine"
    ):
        refuse("vllm", rank_pattern={"q_proj": 2})
    with pytest.raises(ModelError, match="vLLM cannot add rows"):
        setup.refuse_unserved(EvalArgs(engine="vllm"), None, 513)
