"""The parser of a stage's command line: configuration file, flags and overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from . import aliases, config, config_files, runs, schema
from .errors import ConfigError, RunError, did_you_mean
from .search_space import quoted
from .stages import STAGES
from .utils.secrets import to_references


@dataclass
class Call:
    """A parsed command line.

    Args:
        config_dir, config_name: the configuration file, config_name without .yaml. If config_dir has no such file,
            another of config_files.folders() has.
        config_path: whether config_dir was given.
        overrides: `key=value` words.
        flags: flags for Hydra.
        preset_files: names under which Hydra knows presets that are given as files.
        problems: what is wrong with the words; it is reported together with the problems of the settings.
        composed: composed configurations, by their overrides.
        inherited: the settings that each of them takes from a run.
    """

    stage: str
    config_dir: Path
    config_name: str
    config_path: bool = False
    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    multirun: bool = False
    preset_files: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    composed: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)
    inherited: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)


def parse(stage: str, argv: list[str]) -> Call:
    """Parse the words after the stage. Words without `=` are its positionals, in order.

    Raises: ConfigError if the configuration file is missing or is not YAML. Other problems are collected.
    """
    call = Call(stage, config_files.folders()[0], STAGES[stage].config_name)
    call.problems += [f"{word!r} holds bytes that are not UTF-8" for word in argv if not _is_utf8(word)]
    words = iter(to_references([word for word in argv if _is_utf8(word)]))
    positionals = list(STAGES[stage].positionals)
    for word in words:
        if word.startswith("-"):
            _parse_flag(call, word, words)
        elif positionals and ("=" not in word or os.path.exists(word)):
            call.overrides.append(f"{positionals.pop(0)}={quoted(word)}")
        elif "=" in word.lstrip("+")[1:] or word.startswith("~"):
            call.overrides.append(word)
        else:
            call.problems.append(f"{word} is not an override; write key=value")
    _use_settings_of_resumed_run(call)
    if "--resolve" in call.flags and "--cfg" not in call.flags:
        call.problems.append("--resolve is only supported with --cfg")
    if "--cfg" in call.flags and call.multirun:
        call.problems.append("--cfg prints one configuration, and --multirun makes several; leave one of them out")
    _find_config_file(call)
    return call


def _is_utf8(word: str) -> bool:
    """Whether a word can be written to a file: bytes that are no text are lone surrogates in Python."""
    return not re.search("[\ud800-\udfff]", word)


def _parse_flag(call: Call, word: str, words: Iterator[str]) -> None:
    name, _, inline = word.partition("=")

    def value() -> str:
        found = inline or next(words, "")
        if not found:
            call.problems.append(f"{name} needs a value")
        return found

    if name in {"--config-name", "-cn"}:
        call.config_name = value() or call.config_name
    elif name in {"--config-path", "-cp"}:
        call.config_dir, call.config_path = Path(value() or call.config_dir), True
    elif name in {"--multirun", "-m"}:
        call.multirun = True
        call.flags.append("--multirun")
    elif name in {"--cfg", "-c"}:
        wanted = value()
        if wanted not in {"job", "hydra", "all"}:
            call.problems.append(f"--cfg {wanted}: should be one of job, hydra, all")
        call.flags += ["--cfg", wanted]
    elif name in {"--config-dir", "-cd"}:
        call.flags += ["--config-dir", value()]
    elif name == "--resolve":
        call.flags.append("--resolve")
    elif flag := STAGES[call.stage].flags.get(name):
        call.overrides.append(f"{flag.setting}={flag.value or quoted(value())}")
    else:
        call.problems.append(f"{name} is not a flag of {call.stage}{_setting_hint(call, name, inline)}")


def _setting_hint(call: Call, flag: str, value: str) -> str:
    """`; write lr=VALUE` if a flag is the name of a setting, a former one, or that of another tool."""
    key = flag.lstrip("-").replace("-", "_")
    schema = config.schema_of(call.stage)
    ours = config.others_name(schema, key) or aliases.RENAMED.get(key, key)
    if "=" in ours:
        return f"; write {ours}"
    if ours in config.flat_keys(schema) or "." in ours:
        return f"; write {ours}={value or 'VALUE'}"
    return f"; {aliases.ELSEWHERE[key]}" if key in aliases.ELSEWHERE else ""


def _use_settings_of_resumed_run(call: Call) -> None:
    """Use config_used.yaml of the run that `resume` names, unless another configuration file is given."""
    if call.stage != "train" or call.config_path or call.config_name != "train":
        return
    typed = {key: value.strip("'\"") for key, _, value in (o.lstrip("+").partition("=") for o in call.overrides)}
    if (wanted := typed.get("resume", "auto")) in {"auto", "never"}:
        return
    try:
        run = runs.find_training(wanted, typed.get("output_dir", schema.OutputArgs.output_dir))
    except RunError:  # the stage reports it: it also searches the checkpoint mirror
        return
    if (run.path / runs.CONFIG).is_file():
        runs.refuse_code(run, run.settings, typed)
        call.config_dir, call.config_name, call.config_path = run.path, "config_used", True


def _find_config_file(call: Call) -> None:
    """Find the configuration file: a name in --config-path, or a path to a YAML file."""
    named = Path(call.config_name)
    if named.suffix in {".yaml", ".yml"} and named.is_file():
        call.config_dir, call.config_name, call.config_path = named.parent, named.stem, True
    call.config_dir = call.config_dir.resolve()
    call.config_name = call.config_name.removesuffix(".yaml")
    if not call.config_dir.is_dir():
        raise ConfigError(f"--config-path {call.config_dir} is not a folder")
    searched = [call.config_dir] if call.config_path else config_files.folders()
    if broken := [text for folder in searched if (text := config_files.not_a_file(folder, call.config_name))]:
        raise ConfigError(*broken, hint="write it again, or remove it")
    files = [path for folder in searched if (path := folder / f"{call.config_name}.yaml").is_file()]
    if not files:
        names = [path.stem for folder in searched for path in folder.glob("*.yaml")]
        raise ConfigError(
            f"there is no configuration {call.config_name} in {' or '.join(map(str, searched))}"
            f"{did_you_mean(call.config_name, names) or '; list-configs shows all'}"
        )
    _check_yaml(files[0])


def _check_yaml(path: Path) -> None:
    """Raises: ConfigError if a configuration file is not a YAML mapping."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {yaml_error(error)}") from None
    if not isinstance(found, dict | None):
        raise ConfigError(f"{path} holds a {type(found).__name__} instead of settings", hint="write key: value")


def yaml_error(error: Exception) -> str:
    """The problem and its position in a YAML file, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}"
    return str(error).strip().split("\n", 1)[0]
