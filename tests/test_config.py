"""The schema and its validation: strict and complete, with helpful messages."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import pytest

from src import config, schema
from src.errors import ConfigError
from src.model.methods import METHODS

SCHEMAS = [found for name, found in vars(schema).items() if name.endswith("Config") and is_dataclass(found)]


def problems(stage: str, **values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load(stage, config.defaults(stage) | values)
    return list(caught.value.problems)


# The schema


@pytest.mark.parametrize("schema", [*SCHEMAS, schema.TrainDataArgs])
def test_no_two_mixins_share_a_field(schema: type) -> None:
    named = Counter(f.name for mixin in schema.__bases__ for f in fields(mixin))
    assert [name for name, times in named.items() if times > 1] == []
    assert set(named) == {f.name for f in fields(schema)}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_setting_says_what_it_means(schema: type) -> None:
    assert [key for key, (_, meaning) in config.flat_keys(schema).items() if not meaning] == []


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_defaults_are_valid(schema: type) -> None:
    assert config.validate(schema, asdict(schema())) == schema()
    assert config.validate(schema, {}) == schema()


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_loaded_configuration_holds_its_parts_as_objects(schema: type) -> None:
    loaded = config.validate(schema, asdict(schema()))
    parts = [getattr(loaded, f.name) for f in fields(loaded) if is_dataclass(f.default_factory)]
    assert all(is_dataclass(part) for part in parts)
    assert config.validate(schema, asdict(loaded)) == loaded


# What load() refuses


def test_all_problems_are_reported_at_once() -> None:
    reported = problems(
        "train", epochz=2, lr="abc", batch_size=0, data_format="mesages",
        cuda_visible_devices="gpu0",
    )  # fmt: skip
    assert len(reported) == 5
    assert "epochz is not a setting; did you mean epochs?" in reported
    assert "lr=abc: should be a number" in reported
    assert any(p.startswith("batch_size=0: should be greater than or equal to 1") for p in reported)
    assert any(p.startswith("data_format=mesages: ") and p.endswith("did you mean messages?") for p in reported)
    assert 'cuda_visible_devices=gpu0 is not a list of GPUs like "0" or "0,1"' in reported


@pytest.mark.parametrize(
    ("stage", "key", "value", "sentence"),
    [
        ("train", "epochs", 0, "epochs=0: should be greater than 0"),
        ("train", "epochs", float("nan"), "epochs=nan: should be a finite number"),
        ("train", "lr", float("inf"), "lr=inf: should be a finite number"),
        ("publish", "gate", {"min_delta": float("nan")}, "gate.min_delta=nan: should be a finite number"),
        ("train", "batch_size", 2.5, "batch_size=2.5: should be a valid integer"),
        ("train", "max_length", 7, "max_length=7: should be greater than or equal to 8"),
        ("train", "warmup_ratio", 1.5, "warmup_ratio=1.5: should be less than or equal to 1"),
        ("train", "lora_dropout", 1, "lora_dropout=1: should be less than 1"),
        ("train", "max_grad_norm", 0, "max_grad_norm=0: should be greater than 0"),
        ("train", "seed", -1, "seed=-1: should be greater than or equal to 0"),
        ("train", "lora_target_modules", [], "lora_target_modules=[]: "),
        ("train", "lora_target_modules", True, "lora_target_modules=True: should be a list, as [True]"),
        ("train", "report_to", "wandbb", "report_to=wandbb: should be one of tensorboard, mlflow, wandb; did you"),
        ("train", "report_to", ["tensorboard", "no"], "report_to=no: should be one of tensorboard, mlflow, wandb"),
        ("train", "model_name", "", "model_name=: "),
        ("train", "bf16", "maybe", "bf16=maybe: should be one of true, false, auto"),
        ("train", "method", "Lora", f"method=Lora: should be one of {', '.join(METHODS)}; did you mean lora?"),
        ("train", "on_bad_row", "skipp", "on_bad_row=skipp: should be one of refuse, skip; did you mean skip?"),
        ("train", "trust_remote_code", "maybe", "trust_remote_code=maybe: should be one of true, false"),
        (
            "train",
            "data_source",
            {"type": "s4"},
            "data_source.type=s4: should be one of local, lakefs, hub, url, s3",
        ),
        (
            "train",
            "data_source",
            {"type": "s3", "url": "x"},
            "data_source.url is not supported with data_source.type=s3",
        ),
        ("train", "datasets", [{"formta": "text"}], "datasets.0.formta is not a setting"),
        ("train", "datasets", [{"weight": 0}], "datasets.0.weight=0: should be greater than 0"),
        (
            "train",
            "datasets",
            [{"data_source": {"type": "url", "repo": "x"}}],
            "datasets.0.data_source.repo is not supported with data_source.type=url",
        ),
        ("train", "data_source", {"tipe": 1}, "data_source.tipe is not a setting; did you mean data_source.type"),
        (
            "train",
            "data_source",
            "local",
            "data_source=local: is a group of settings; set for example data_source.type",
        ),
        ("publish", "gate", {"metrc": "bleu"}, "gate.metrc is not a setting; did you mean gate.metric?"),
        ("eval", "metrics", [], "metrics=[]: "),
        ("eval", "splits", {"test": 1}, "splits={'test': 1}: should be a list"),
        ("eval", "max_examples", 0, "max_examples=0: should be greater than or equal to 1"),
        *(
            ("train", "eval_split", v, f"eval_split={v}: should be a whole number from 1 or a number between")
            for v in (0, 1.0, "10%", "", [1])
        ),
        ("eval", "eval_batch_size", 0, "eval_batch_size=0: should be a whole number from 1 or auto"),
        ("train", "trainDataConfig", [1], "trainDataConfig=[1]: should be a text or a group of settings"),
        ("train", "eval_split", True, "eval_split=true: should be a number"),
        ("train", "max_length", True, "max_length=true: should be a number"),
        ("eval", "max_examples", True, "max_examples=true: should be a number"),
        ("eval", "gate", {"min_examples": True}, "gate.min_examples=true: should be a number"),
        ("train", "distributed", ["ddp"], "distributed=['ddp']: should be one of"),
        ("train", "data_source", {"type": ["s3"]}, "data_source.type=['s3']: should be one of"),
        ("eval", "lr", 1e-4, "lr is not a setting"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_setting(stage: str, key: str, value: Any, sentence: str) -> None:
    reported = problems(stage, **{key: value})
    assert len(reported) == 1
    assert reported[0].startswith(sentence)


def test_text_becomes_numbers_and_numbers_become_text() -> None:
    loaded = config.load(
        "train", {"lr": "1e-4", "epochs": "2", "cuda_visible_devices": 1, "model_revision": 1234567}
    )
    assert (loaded.lr, loaded.epochs) == (1e-4, 2.0)
    assert (loaded.cuda_visible_devices, loaded.model_revision) == ("1", "1234567")


@pytest.mark.parametrize(
    ("stage", "key", "word", "value"),
    [
        ("train", "report_to", "tensorboard", ["tensorboard"]),
        ("train", "report_to", "none", []),
        ("train", "report_to", None, []),
        ("train", "lora_target_modules", None, None),
        ("train", "lora_target_modules", "q_proj", ["q_proj"]),
        ("train", "lora_target_modules", "all-linear", None),
        ("train", "lora_target_modules", "all", None),
        ("eval", "metrics", "bleu", ["bleu"]),
        ("eval", "splits", 2024, ["2024"]),
        ("eval", "stop", "###", ["###"]),
    ],
)
def test_a_word_for_a_list_is_a_list_of_one(stage: str, key: str, word: Any, value: Any) -> None:
    assert getattr(config.load(stage, {key: word}), key) == value


@pytest.mark.parametrize("devices", ["", "0", "0,1", "0, 1", "-1", "GPU-5ba2,GPU-77", "MIG-1f"])
def test_every_way_to_name_gpus_is_accepted(devices: str) -> None:
    assert config.load("train", {"cuda_visible_devices": devices}).cuda_visible_devices == devices


# Arguments passed through to the libraries


@pytest.mark.parametrize(
    ("stage", "key", "argument", "owner", "guess"),
    [
        ("eval", "generation", "temprature", "GenerationConfig", "temperature"),
        ("eval-baseline", "generation", "top_kk", "GenerationConfig", "top_k"),
    ],
)
def test_an_unknown_argument_is_answered_with_a_guess(
    stage: str, key: str, argument: str, owner: str, guess: str
) -> None:
    sentence = f"{key}.{argument} is not an argument of {owner}; did you mean {guess}?"
    assert problems(stage, **{key: {argument: 1}}) == [sentence]


@pytest.mark.parametrize(
    ("stage", "key", "argument", "setting"),
    [
        ("eval", "generation", "max_new_tokens", "max_new_tokens"),
    ],
)
def test_an_argument_with_a_setting_of_its_own_names_it(stage: str, key: str, argument: str, setting: str) -> None:
    assert problems(stage, **{key: {argument: 1}}) == [f"{key}.{argument} is not supported: use {setting}"]


def test_known_arguments_pass() -> None:
    loaded = config.load(
        "train", {"peft": {"alpha_pattern": {"q_proj": 8}}, "trainer": {"dataloader_num_workers": 2}}
    )
    assert loaded.peft == {"alpha_pattern": {"q_proj": 8}}
    assert loaded.trainer == {"dataloader_num_workers": 2}
    assert config.load("eval", {"generation": {"do_sample": True}}).generation == {"do_sample": True}


def test_arguments_that_are_not_a_mapping_are_refused_once() -> None:
    assert problems("train", trainer=3) == ["trainer=3: should be a valid dictionary"]
