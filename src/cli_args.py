"""A command line taken apart: the stage, its configuration file, flags and overrides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from omegaconf import DictConfig

from src import aliases, config, runs, schema
from src.errors import ConfigError, RunError, did_you_mean
from src.search_space import quoted
from src.stages import STAGES
from src.utils.secrets import redact_argv

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass
class Call:
    """A parsed command line: overrides for Hydra, its own flags, and the stage's configuration file."""

    stage: str
    config_dir: Path
    config_name: str
    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    multirun: bool = False
    from_files: set[str] = field(default_factory=set)  # what presets given as files are called inside Hydra
    problems: list[str] = field(default_factory=list)  # told together with those of the settings
    composed: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)  # by their overrides


def parse(stage: str, argv: list[str]) -> Call:
    """Split `argv` into the stage's configuration, Hydra's flags and overrides.

    Words without `=` are the stage's positionals, in their order. What cannot be understood becomes one of the
    call's problems.
    Raises: ConfigError if the configuration file is missing or torn: then nothing else can be judged.
    """
    call = Call(stage, CONFIGS, STAGES[stage].config_name)
    words = iter(redact_argv(argv))
    places = list(STAGES[stage].positionals)
    for word in words:
        if word.startswith("-"):
            _flag(call, word, words)
        elif places and ("=" not in word or Path(word).exists()):
            call.overrides.append(f"{places.pop(0)}={quoted(word)}")
        elif "=" in word or word.startswith("~"):
            call.overrides.append(word)
        else:
            call.problems.append(f"{word} is not an override; write key=value")
    _take_up(call)
    if "--resolve" in call.flags and "--cfg" not in call.flags:
        call.problems.append("--resolve goes with --cfg")
    _locate(call)
    return call


def _flag(call: Call, word: str, words: Iterator[str]) -> None:
    name, _, inline = word.partition("=")

    def value() -> str:
        found = inline or next(words, "")
        if not found:
            call.problems.append(f"{name} needs a value")
        return found

    if name in {"--config-name", "-cn"}:
        call.config_name = value() or call.config_name
    elif name in {"--config-path", "-cp"}:
        call.config_dir = Path(value() or call.config_dir)
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
        call.problems.append(f"{name} is not a flag of {call.stage}{_as_setting(call, name, inline)}")


def _as_setting(call: Call, flag: str, value: str) -> str:
    """`; write lr=VALUE` where a flag is the name of a setting, or what others call one."""
    key = flag.lstrip("-").replace("-", "_")
    key = {**aliases.OTHER_TOOLS, **aliases.RENAMED}.get(key, key)
    return f"; write {key}={value or 'VALUE'}" if key in config.flat_keys(config.schema_of(call.stage)) else ""


def _take_up(call: Call) -> None:
    """Make the settings of the run that `resume` names the base of the call, where no other file is named."""
    if call.stage != "train" or (call.config_dir, call.config_name) != (CONFIGS, "train"):
        return
    typed = {key: value.strip("'\"") for key, _, value in (o.lstrip("+").partition("=") for o in call.overrides)}
    if (wanted := typed.get("resume", "auto")) in {"auto", "never"}:
        return
    with suppress(RunError):  # told by the stage, which also looks into the mirror
        run = runs.find_training(wanted, typed.get("output_dir", schema.OutputArgs.output_dir))
        if (run.path / "config_used.yaml").is_file():
            call.config_dir, call.config_name = run.path, "config_used"


def _locate(call: Call) -> None:
    """Settle the configuration file: a name under --config-path, or a path to a YAML file."""
    named = Path(call.config_name)
    if named.suffix in {".yaml", ".yml"} and named.is_file():
        call.config_dir, call.config_name = named.parent, named.stem
    call.config_dir = call.config_dir.resolve()
    call.config_name = call.config_name.removesuffix(".yaml")
    if not call.config_dir.is_dir():
        raise ConfigError(f"--config-path {call.config_dir} is not a folder")
    if not (call.config_dir / f"{call.config_name}.yaml").is_file():
        names = [p.stem for p in call.config_dir.glob("*.yaml")]
        raise ConfigError(
            f"there is no configuration {call.config_name} in {call.config_dir}"
            f"{did_you_mean(call.config_name, names) or '; list-configs shows all'}"
        )
    _refuse_torn(call.config_dir / f"{call.config_name}.yaml")


def _refuse_torn(path: Path) -> None:
    """Raises: ConfigError if a configuration file is not YAML, or no mapping."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {yaml_error(error)}") from None
    if not isinstance(found, dict | None):
        raise ConfigError(f"{path} holds a {type(found).__name__}, and no settings", hint="write key: value")


def yaml_error(error: Exception) -> str:
    """What is wrong with a YAML file, and where, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}"
    return str(error).strip().split("\n", 1)[0]
