"""--help and list-configs: what they show is what a command uses, and it fits a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from src import cli_args, compose, config, help, schema
from src.errors import ConfigError
from src.stages import STAGES
from tests.fixtures import ROOT
from tests.test_configs import neutral_environment  # noqa: F401  (a fixture for every test)

THREE_KEYS = "model_name: my/model\nlr: 1e-4\nnear_threshold: 0.5\n"


def composed(stage: str, *words: str) -> dict[str, Any]:
    """The value of each setting of a command, by its dotted name."""
    call = cli_args.parse(stage, list(words))
    overrides, _ = compose.prepare_overrides(call)
    compose.register_root(call)
    values, problems = compose.compose_values(call, overrides)
    assert problems == []
    loaded = config.load(stage, config.run_settings(stage, values))
    return {key: value for key, (value, _) in config.flat_keys(type(loaded), defaults=loaded).items()}


def shown(stage: str, *words: str) -> dict[str, str]:
    """key -> value, of the settings of the stage itself."""
    settings = help._settings_of(stage, list(words))
    return {s.key: s.value for s in settings if s.topic not in help.FOREIGN_TOPICS}


# Values


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_the_values_that_the_command_uses(stage: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        {"data-push": "message: new\n", "eval": "max_new_tokens: 9\n"}.get(
            stage, THREE_KEYS if "lr" in shown(stage) else "output_dir: out\n"
        )
    )
    for words in ([], ["--config-name", str(file)]):
        used = {key: help._format(help._plain(value), 60) for key, value in composed(stage, *words).items()}
        assert shown(stage, *words) == used


def test_a_value_that_is_not_the_default_says_where_it_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(THREE_KEYS)
    lines = help.help_text("train", ["--help", "lr", "--config-name", "mine.yaml"]).splitlines()
    assert " ".join(lines[0].split()) == "lr=0.0001 peak learning rate [mine.yaml; default: 0.001]"
    assert "[configs/train.yaml; default: 0.001]" in help.help_text("train", ["--help", "lr"])


def test_only_what_is_for_the_demo_differs_from_the_defaults() -> None:
    changed = {s.key for s in help._settings_of("train", []) if s.source}
    assert changed == {"epochs", "lr"}
    assert "# enough for the demo" in (ROOT / "configs/train.yaml").read_text(encoding="utf-8")
    assert {s.key for stage in STAGES for s in help._settings_of(stage, []) if s.source} == changed


@pytest.mark.parametrize(
    ("variable", "stage", "key"),
    [("CUDA_VISIBLE_DEVICES", "train", "cuda_visible_devices"), ("HF_REPO_ID", "publish", "repo_id")],
)
def test_a_variable_of_the_environment_counts_with_a_file_of_ones_own(
    variable: str, stage: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("output_dir: out\n")
    monkeypatch.setenv(variable, "3")
    assert composed(stage, "--config-name", str(tmp_path / "mine.yaml"))[key] == "3"
    assert composed(stage)[key] == "3"


# Words


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["lora_"], ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"]),
        (["focal", "seed"], ["focal_gamma", "seed"]),
        (["learning_rate"], ["lr", "lr_scheduler_type", "lr_scheduler_kwargs"]),
        (["near_threshold"], ["dedup_threshold"]),
        (["load_in_4bit"], ["method"]),
        (["jaccard"], ["dedup_threshold"]),
        (["mem_gb"], ["mem_gb"]),
    ],
)
def test_a_word_after_help_finds_settings(words: list[str], keys: list[str]) -> None:
    lines = help.help_text("train", ["--help", *words]).splitlines()
    assert [line.split("=")[0].strip() for line in lines if line[2:3].strip() and not line.endswith(":")] == keys


def test_another_tools_name_is_translated() -> None:
    assert help.help_text("train", ["--help", "cutoff_len"]).startswith("cutoff_len is called max_length here:\n")


def test_a_word_that_finds_nothing_is_a_problem() -> None:
    with pytest.raises(ConfigError, match="no setting of train has epochz in its name; did you mean epochs"):
        help.help_text("train", ["--help", "epochz"])


# Layout


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("width", [80, 110])
def test_help_fits_the_terminal_and_has_a_topic_for_every_setting(stage: str, width: int) -> None:
    text = help.help_text(stage, width=width)
    words = {word for line in text.splitlines() for word in line.split() if len(word) > width - 30}
    assert [line for line in text.splitlines() if len(line) > width and not words & set(line.split())] == []
    assert help.OTHER not in text


def test_choices_are_shown() -> None:
    text = " ".join(help.help_text("train").split())
    assert "loss function [cross_entropy, weighted, focal]" in text
    assert "method= adalora, dora, full, ia3, lora" in text


def test_list_configs_shows_every_file_what_it_is_for_and_how_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs" / "method").mkdir(parents=True)
    (tmp_path / "configs" / "method" / "mine.yaml").write_text(
        "# @package _global_\n# a method of mine\nmethod: lora\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASSAY_PROGRAM", "make")
    text = help.list_configs(80)
    assert "method: how the model is trained: make train method=qlora\n" in text
    assert "  mine                        a method of mine [./configs]\n" in text
    for path in (*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs").glob("*/*.yaml")):
        assert f"\n  {path.stem} " in text and help._description(path).split()[0] in text
    assert max(map(len, text.splitlines())) <= 80 and "yaml-language-server" not in text


@pytest.mark.parametrize("group", help.GROUP_PURPOSES)
def test_the_example_of_a_group_is_a_preset(group: str) -> None:
    assert (ROOT / "configs" / group / f"{help.GROUP_PURPOSES[group][1]}.yaml").is_file()


def test_topics_name_mixins_that_exist() -> None:
    assert [m for mixins in help.TOPICS.values() for m in mixins if not hasattr(schema, m)] == []
    assert yaml.safe_load(THREE_KEYS)
