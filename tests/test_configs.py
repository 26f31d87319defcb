"""Every YAML file shipped composes, and what it composes to is recorded in tests/golden.

The record of a stage's file is the full configuration, that of a preset only what it changes in `train`. So a
new setting changes one record, and a changed default or preset shows in review. Rewrite them after a wanted one:

    UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from src import cli_args, compose, config, precedence, schema
from src.model import methods
from src.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
GOLDEN = ROOT / "tests" / "golden"

FILES = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
PRESETS = sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.glob("*/*.yaml"))
STAGE_OF = {stage.config_name: name for name, stage in reversed(STAGES.items())}

# The keys that the documentation prints, in its order.
DOCUMENTED = [
    "model_name",
    "dataset_path",
    "dataset_pattern",
    "data_format",
    "data_source",
    "epochs",
    "batch_size",
    "lr",
    "max_length",
    "gradient_accumulation_steps",
    "warmup_ratio",
    "weight_decay",
    "lr_scheduler_type",
    "bf16",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "gradient_checkpointing",
    "cuda_visible_devices",
]


@pytest.fixture(autouse=True)
def neutral_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HF_REPO_ID"):
        monkeypatch.delenv(name, raising=False)


def composed(stage: str, *words: str) -> dict[str, Any]:
    """What the stage's function would be called with."""
    call = cli_args.parse(stage, list(words))
    overrides, problems = compose.prepare_overrides(call)
    assert problems == []
    compose.register_root(call)
    values, problems = compose.compose_values(call, overrides)
    assert problems == []
    search = {"search": values.pop("search", {})}
    return asdict(config.load(stage, values)) | (
        asdict(config.validate(schema.SweepConfig, search)) if search["search"] else {}
    )


def check_golden(name: str, values: dict[str, Any]) -> None:
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    assert path.exists(), f"{name} has no golden file; UPDATE_GOLDEN=1 writes it"
    golden = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert golden == values
    assert list(golden) == list(values)


@pytest.mark.parametrize("name", FILES)
def test_a_file_composes_to_its_golden_record(name: str) -> None:
    check_golden(name, composed(STAGE_OF[name]))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_what_its_golden_record_says(preset: str) -> None:
    plain = composed("train") | {"search": asdict(schema.SearchArgs())}
    check_golden(preset.replace("/", "."), difference(composed("train", preset.replace("/", "=")), plain))


def difference(values: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The settings that differ from those in `plain`; within a group, only its own that differ."""
    assert values.keys() >= plain.keys() - {"search"}
    changed = {key: value for key, value in values.items() if key not in plain or value != plain[key]}
    return {
        key: difference(value, plain[key]) if isinstance(value, dict) and plain.get(key) else value
        for key, value in changed.items()
    }


def test_the_difference_of_two_configurations() -> None:
    plain = {"seed": 1, "gate": {"split": "test", "min_delta": 0}, "peft": {}, "search": {"trials": 20}}
    values = {"seed": 1, "gate": {"split": "dev", "min_delta": 0}, "peft": {"r": 4}}
    assert difference(values, plain) == {"gate": {"split": "dev"}, "peft": {"r": 4}}


def test_no_golden_record_outlives_its_file() -> None:
    names = {*FILES, *(p.replace("/", ".") for p in PRESETS)}
    assert {p.stem for p in GOLDEN.glob("*.yaml")} == names


@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_only_settings_of_its_stage(name: str) -> None:
    written = list(flat(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))))
    assert set(written) <= set(config.flat_keys(config.schema_of(STAGE_OF[name])))


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_writes_into_the_flat_configuration_and_says_what_it_is(preset: str) -> None:
    first, second, *_ = (CONFIGS / f"{preset}.yaml").read_text(encoding="utf-8").splitlines()
    assert first == "# @package _global_"
    assert second.startswith("# ")


def test_every_method_has_a_preset_that_chooses_it() -> None:
    methods = get_args(get_type_hints(schema.MethodArgs)["method"])
    presets = {p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in CONFIGS.glob("method/*.yaml")}
    assert {name: preset["method"] for name, preset in presets.items()} == {m: m for m in methods}


@pytest.mark.parametrize("preset", [p for p in PRESETS if not p.startswith("search/")])
def test_a_preset_is_valid_for_its_method(preset: str) -> None:
    assert methods.problems(composed("train", preset.replace("/", "="))) == []


def test_every_folder_of_presets_is_a_group() -> None:
    assert {p.split("/")[0] for p in PRESETS} <= set(precedence.GROUPS)


# The documented YAML, as a user pastes it


@pytest.fixture
def pasted(tmp_path: Path) -> Path:
    """The documented train.yaml, which the experiment holds word for word below its own three lines."""
    text = (CONFIGS / "experiment/custom_dsl_llama3_8b.yaml").read_text(encoding="utf-8")
    path = tmp_path / "train_seed.yaml"
    path.write_text(text.split("\n", 3)[3], encoding="utf-8")
    return path


def test_the_documented_yaml_is_a_complete_configuration(pasted: Path) -> None:
    values = composed("train", "--config-path", str(pasted.parent), "--config-name", "train_seed")
    written = yaml.safe_load(pasted.read_text(encoding="utf-8"))
    assert values["data_source"]["type"] == written.pop("data_source")["type"] == "local"
    assert {k: values[k] for k in written} == written
    assert values == composed("train", "experiment=custom_dsl_llama3_8b")


def test_the_documented_keys_keep_their_order(pasted: Path) -> None:
    assert list(yaml.safe_load(pasted.read_text(encoding="utf-8"))) == DOCUMENTED
    assert list(yaml.safe_load((CONFIGS / "train.yaml").read_text(encoding="utf-8"))) == DOCUMENTED


def test_the_shipped_gpu_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    for stage in ("train", "eval", "eval-baseline"):
        assert composed(stage)["cuda_visible_devices"] == "2,3"


def test_the_shipped_repository_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_REPO_ID", "me/mine")
    assert composed("publish")["repo_id"] == "me/mine"
