"""The text of `--help` and `list-configs`, made from the table of stages, the schema and the files in configs/."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from . import config, config_files
from .compose import GROUPS
from .schema import SlurmConfig, SweepConfig
from .stages import STAGES, SWEEP_STAGE
from .utils.commands import program


def help_text(name: str) -> str:
    """What `STAGE --help` prints: usage, settings with their defaults and meanings, presets and flags."""
    stage = STAGES[name]
    words = [f"[{key.upper()}]" for key in stage.positionals]
    words += [f"[{' '.join(filter(None, (flag, about.metavar)))}]" for flag, about in stage.flags.items()]
    usage = " ".join([f"usage: {program()}", name, *words, "[--config-name CONFIG] [key=value ...]"])
    lines = [usage, "", stage.summary, ""]
    lines += [f"settings with their defaults, which configs/{stage.config_name}.yaml overrides:"]
    lines += _settings(config.schema_of(name))
    if name == SWEEP_STAGE:
        lines += ["", "settings of a sweep (search=PRESET or --multirun, docs/sweeps.md):"]
        lines += _settings(SweepConfig)
    lines += ["", "settings of a Slurm job (launch=slurm, docs/slurm.md):", *_settings(SlurmConfig)]
    groups = [group for group in GROUPS if group != "search" or name == SWEEP_STAGE]
    lines += ["", "presets:", *(f"  {g}=" + "|".join(names) for g in groups if (names := config_files.presets(g)))]
    lines += [
        "",
        "flags:",
        "  --config-name, --config-path  another file or folder of settings; config_used.yaml of a run repeats it",
        "  --cfg job                     print the composed configuration and stop",
        "  --multirun, -m                run one job for each combination of key=a,b",
    ]
    return "\n".join([*lines, *(["", *stage.notes] if stage.notes else [])])


def _settings(schema: type) -> list[str]:
    rows = config.flat_keys(schema).items()
    return [
        f"  {key:<28} {_format_default(default):<24} {doc}{_choices(schema, key, doc)}"
        for key, (default, doc) in rows
    ]


def _choices(schema: type, key: str, meaning: str) -> str:
    """The values of a setting with a fixed choice, unless its meaning lists them or it is true or false."""
    found = config.choices(schema, key)
    named = all(choice in meaning for choice in found if choice not in {"true", "false"})
    return "" if named else f" [{', '.join(found)}]"


def _format_default(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    plain = (
        [asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for v in value]
        if isinstance(value, list)
        else value
    )
    text = "[" + ",".join(map(str, plain)) + "]" if isinstance(plain, list) else str(plain)
    return text if len(text) <= 24 else text[:21] + "..."


def list_configs() -> str:
    """Each configuration file and preset with its description, the first line of its comments."""
    return "\n".join(
        f"{name.replace('/', '='):<36} {_description(path)}"
        for name in config_files.names()
        if (path := config_files.find(name))
    )


def _description(path: Path) -> str:
    comments = (x[2:] for x in path.read_text(encoding="utf-8").splitlines() if x.startswith("# "))
    return next((c for c in comments if not c.startswith("@package")), "")
