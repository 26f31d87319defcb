"""The text of `--help` and `list-configs`, made from the table of stages, the schema and the files in configs/."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from inspect import get_annotations
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from . import chat_templates, cli_args, config, config_files
from .aliases import OTHER_TOOLS, RENAMED, current_settings
from .errors import ConfigError
from .precedence import GROUPS
from .schema import SlurmConfig, SweepConfig
from .stages import STAGES, SWEEP_STAGE, Stage
from .utils.commands import command, program

NAME_WIDTH = 26  # of `key=value`; longer ones have a line of their own
MAX_WIDTH, PIPED_WIDTH = 110, 90
TOPICS = {  # topic -> the mixins of src/schema.py whose settings it has, in the order of --help
    "model": ("ModelArgs", "TunedArgs", "ReportArgs", "CompareArgs", "TunedTaskArgs", "TokenizationArgs",
              "TrustArgs", "PrecisionArgs", "InitArgs", "TokenArgs"),
    "data": ("DataArgs", "DataPushArgs", "ColumnArgs", "ChatArgs", "RowArgs", "EvalDataArgs"),
    "optimizer and loss": ("OptimArgs", "LossArgs"),
    "method": ("MethodArgs",),
    "evaluation": ("JudgeArgs", "EvalArgs", "TunedEvalArgs"),
    "gate: when a model counts as better": ("NestedGateArgs",),
    "publishing": ("PublishArgs",),
    "checks": ("ValidateArgs",),
    "logs, checkpoints, early stopping": ("LoopArgs",),
    "speed and memory": ("SpeedArgs", "PlanArgs", "ProbeArgs"),
    "hardware": ("HardwareArgs", "DistributedArgs"),
    "output": ("OutputArgs", "SeedArgs"),
    "sweep, with search=PRESET or --multirun (docs/sweeps.md)": ("SweepArgs",),
    "Slurm job, with launch=slurm (docs/slurm.md)": ("SlurmArgs",),
}  # fmt: skip
OTHER = "other settings"
FOREIGN_TOPICS = list(TOPICS)[-2:]  # not settings of the stage itself
INTRO = (
    "Each setting with its value: the default, or the value in {file} where it says so. With --config-name FILE, "
    "the values are those in FILE. {stage} --help WORD shows the settings with WORD in their names."
)
GROUP_PURPOSES = {
    "model": ("base models", "llama3_8b"), "data": ("training data, as examples", "mixed"),
    "hardware": ("what fits a machine", "gpu_24gb"), "method": ("how the model is trained", "qlora"),
    "parallel": ("several GPUs", "fsdp2"), "launch": ("where the command runs", "slurm"),
    "search": ("sweeps", "lora"), "experiment": ("complete runs", "smoke"),
}  # fmt: skip


class Setting(NamedTuple):
    """One setting in `--help`: its value, and where the value is from if that is not the default."""

    key: str
    value: str
    meaning: str
    source: str
    topic: str


def help_text(
    name: str, words: Sequence[str] = (), width: int | None = None, shown_name: str = "", beyond: str = ""
) -> str:
    """What `STAGE --help WORDS` prints: usage, settings with their values, meanings and topics, presets and flags.

    Args:
        words: the command line after the stage. `--config-name FILE` shows the values of that file. A word after
            `--help` shows only the settings that it names.
        shown_name: the command, if it is not the name of the stage.
        beyond: a stage whose settings are left out.
    Raises: ConfigError if the file does not exist, or no setting is named.
    """
    width = width or _terminal_width()
    flags, wanted = _read_words(words)
    settings = _settings_of(name, flags)
    if wanted:
        return "\n".join(_found_settings(name, settings, wanted, width))
    stage = STAGES[name]
    lines = [*_usage(shown_name or name, stage, width), "", *textwrap.wrap(stage.summary, width), ""]
    if beyond:
        settings = [s for s in settings if s.key not in config.flat_keys(config.schema_of(beyond))]
        settings = [s for s in settings if s.topic not in FOREIGN_TOPICS]
        lines += [f"Its settings are those of {beyond}{' and:' if settings else '.'}"]
    else:
        lines += textwrap.wrap(INTRO.format(stage=name, file=_label(cli_args.parse(name, flags))), width)
    for topic in dict.fromkeys(s.topic for s in settings):
        lines += ["", f"{topic}:", *_lines([s for s in settings if s.topic == topic], width)]
    if not beyond:
        lines += ["", "presets: (list-configs describes them)", *_presets(name, width)]
    lines += ["", "flags:"]
    for flag, meaning in _flags(stage):
        lines += _row(flag, meaning, width)
    notes = [line for note in stage.notes for line in textwrap.wrap(note, width, subsequent_indent="  ")]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _terminal_width() -> int:
    return min(shutil.get_terminal_size().columns, MAX_WIDTH) if sys.stdout.isatty() else PIPED_WIDTH


def _usage(name: str, stage: Stage, width: int) -> list[str]:
    words = [f"[{key.upper()}]" for key in stage.positionals]
    words += [f"[{' '.join(filter(None, (flag, about.metavar)))}]" for flag, about in stage.flags.items()]
    text = " ".join([f"usage: {program()} {name}", *words, "[--config-name FILE] [key=value ...]"])
    return textwrap.wrap(text, width, subsequent_indent=" " * 7, break_on_hyphens=False)


def _flags(stage: Stage) -> Iterator[tuple[str, str]]:
    yield "--config-name FILE", "another file of settings; config_used.yaml of a run repeats it"
    yield "--config-path FOLDER", "the folder of that file"
    yield "--cfg job", "print the composed configuration and stop"
    yield "--multirun, -m", "run one job for each combination of key=a,b"
    yield "--json", "print one JSON document on stdout, everything else on stderr"
    yield "--quiet", "print warnings, the verdict and the next command only"
    yield from (
        (f"{flag} {about.metavar}".strip(), f"sets {about.setting}") for flag, about in stage.flags.items()
    )


def _read_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags that choose a file of settings, and the words after --help, which choose settings."""
    flags, wanted, asked = [], [], False
    left = iter(words)
    for word in left:
        if word.partition("=")[0] in {"--config-name", "-cn", "--config-path", "-cp"}:
            flags += [word] if "=" in word else [word, next(left, "")]
        elif word in {"--help", "-h"}:
            asked = True
        elif asked and not word.startswith("-"):
            wanted.append(word.partition("=")[0])
    return flags, wanted


# Settings


def _settings_of(name: str, flags: list[str]) -> list[Setting]:
    """The settings of a stage, by topic."""
    call = cli_args.parse(name, flags)
    given = _values_of_file(call)
    schemas = [config.schema_of(name), *([SweepConfig] if name == SWEEP_STAGE else []), SlurmConfig]
    found = [setting for schema in schemas for setting in _settings(schema, given, _label(call))]
    order = [*list(TOPICS)[:-2], OTHER, *FOREIGN_TOPICS]
    return sorted(found, key=lambda setting: order.index(setting.topic))


def _values_of_file(call: cli_args.Call) -> dict[str, Any]:
    """The settings in the file of a call, by their dotted names."""
    path = call.config_dir / f"{call.config_name}.yaml"
    file = path if path.is_file() else config_files.find(call.config_name)
    loaded = OmegaConf.load(file) if file else OmegaConf.create()
    try:
        values = OmegaConf.to_container(loaded, resolve=True)
    except Exception:  # a reference to what only the complete configuration has
        values = OmegaConf.to_container(loaded)
    return dict(_flat(current_settings(values, known=config.flat_keys(config.schema_of(call.stage)))))  # type: ignore[arg-type]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield prefix + str(key), value
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")


def _label(call: cli_args.Call) -> str:
    """The file of a call as it is shown: configs/train.yaml, or the path of a user's file."""
    path = call.config_dir / f"{call.config_name}.yaml"
    if call.config_dir in config_files.folders():
        return f"configs/{path.name}"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _settings(schema: type, given: Mapping[str, Any], file: str) -> Iterator[Setting]:
    for key, (default, meaning) in config.flat_keys(schema).items():
        plain = _plain(default)
        value = given.get(key, plain)
        source = "" if value == plain else f"[{file}; default: {_format(plain, 40)}]"
        yield Setting(
            key, _format(value, 60), meaning + _choices(schema, key, meaning), source, _topic(schema, key)
        )


def _topic(schema: type, key: str) -> str:
    field = key.partition(".")[0]
    owner = next(c.__name__ for c in reversed(schema.__mro__) if field in get_annotations(c))
    return next((topic for topic, mixins in TOPICS.items() if owner in mixins), OTHER)


def _choices(schema: type, key: str, meaning: str) -> str:
    """The values of a setting with a fixed choice, unless its meaning lists them or it is true or false."""
    found = config.choices(schema, key)
    named = all(choice in meaning for choice in found if choice not in {"true", "false"})
    return "" if named else f" [{', '.join(found)}]"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for v in value]
    return value


def _format(value: Any, limit: int) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return f"{value:g}"
    if isinstance(value, Mapping):
        text = "{" + ",".join(f"{k}:{_format(v, limit)}" for k, v in value.items()) + "}"
    else:
        text = "[" + ",".join(_format(v, limit) for v in value) + "]" if isinstance(value, list) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _found_settings(name: str, settings: list[Setting], words: list[str], width: int) -> Iterator[str]:
    """The settings that `words` name: by their name, that of another tool, or their meaning."""
    for word in words:
        called = {**OTHER_TOOLS, **RENAMED}.get(word, word)
        key = called.partition("=")[0]
        if called != word:
            yield f"{word} is called {called} here:"
        found = [s for s in settings if key in s.key] or [s for s in settings if key.lower() in s.meaning.lower()]
        if not found:
            guess = config.suggestion(config.schema_of(name), word)
            raise ConfigError(
                f"no setting of {name} has {word} in its name{guess}", hint=f"{name} --help lists all"
            )
        yield from _lines(found, width)


def _lines(settings: list[Setting], width: int) -> Iterator[str]:
    for setting in settings:
        yield from _row(f"{setting.key}={setting.value}", f"{setting.meaning} {setting.source}".strip(), width)


def _row(name: str, meaning: str, width: int, indent: int = NAME_WIDTH + 4) -> list[str]:
    """`  name   meaning`, wrapped at `width`; a long name has its own line."""
    wrapped = textwrap.wrap(meaning, max(width - indent, 30), break_long_words=False, break_on_hyphens=False)
    if len(name) + 3 > indent - 1:
        return [f"  {name}", *(" " * indent + line for line in wrapped)]
    first = f"  {name}".ljust(indent) + (wrapped[0] if wrapped else "")
    return [first.rstrip(), *(" " * indent + line for line in wrapped[1:])]


# Presets


def _presets(name: str, width: int) -> Iterator[str]:
    for group in GROUPS:
        names = config_files.presets(group)
        if names and (group != "search" or name == SWEEP_STAGE):
            yield from _row(f"{group}=", ", ".join(names), width)


def list_configs(width: int | None = None) -> str:
    """Each configuration file and preset by group: what it is for, and how it is used."""
    width = width or _terminal_width()
    lines = textwrap.wrap(
        "Files of the stages. Another one: --config-name FILE. A file in ./configs comes before the one of Assay.",
        width,
    )
    names = config_files.names()
    for name in (name for name in names if "/" not in name):
        lines += _file_row(name, width)
    groups = [*GROUPS, *sorted({n.partition("/")[0] for n in names if "/" in n} - {*GROUPS})]
    for group in groups:
        purpose, example = GROUP_PURPOSES.get(group, ("", ""))
        presets = [name for name in names if name.startswith(f"{group}/")]
        if presets:
            usage = command("train", f"{group}={example or presets[0].partition('/')[2]}")
            lines += ["", f"{group}: {purpose}: {usage}" if purpose else f"{group}: {usage}"]
            lines += [line for name in presets for line in _file_row(name, width)]
    usage = command("train", "chat_template=chatml")
    lines += ["", f"chat_templates: chat templates by name: {usage}"]
    for name in chat_templates.names():
        lines += _row(name, chat_templates.description(name), width)
    return "\n".join(lines)


def _file_row(name: str, width: int) -> list[str]:
    path = config_files.find(name)
    own = " [./configs]" if path and config_files.SHIPPED not in path.parents else ""
    title = name.rpartition("/")[2]
    return _row(title, (_description(path) if path else "") + own, width)


def _description(path: Path) -> str:
    """The first line of a file's comments that is not for a program."""
    comments = (x[2:] for x in path.read_text(encoding="utf-8").splitlines() if x.startswith("# "))
    return next((c for c in comments if not c.startswith(("@package", "yaml-language-server:"))), "")
