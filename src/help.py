"""What `--help` and `list-configs` say, made from the schema and from the files shipped."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from src import config
from src.cli_args import CONFIGS, positionals
from src.compose import GROUPS
from src.schema import SCHEMAS, SWEPT


def help_text(stage: str, config_name: str, summary: str) -> str:
    """The stage's settings with their defaults and meanings, from the schema."""
    positional = "".join(f" [{key.upper()}]" for key in positionals(stage))
    extra = {
        "publish-hf": " [--repo USER/NAME] [--public]",
        "validate": " [--training-info FILE] [--model-path DIR] [--profile-path FILE]",
    }.get(stage, "")
    extra += " [--force]" if stage.startswith("publish") else ""
    lines = [
        f"usage: python -m src.main {stage}{positional}{extra} [--config-name CONFIG] [key=value ...]",
        "",
        summary,
        "",
        f"settings (defaults of the schema; configs/{config_name}.yaml comes over them):",
    ]
    lines += _settings(stage)
    if stage == SWEPT:
        lines += ["", "settings of a sweep, which search=PRESET or --multirun starts:"]
        lines += _settings("sweep")
    lines += ["", "settings of a cluster, with launch=slurm (docs/slurm.md):", *_settings("slurm")]
    lines += ["", "presets:"]
    lines += [f"  {g}=" + "|".join(n) for g in GROUPS if (n := presets(g)) and (g != "search" or stage == SWEPT)]
    lines += [
        "",
        "flags:",
        "  --config-name, --config-path  another file or folder; a run's config_used.yaml repeats the run",
        "  --cfg job                     print the composed configuration and stop",
        "  --multirun, -m                one job for each combination of key=a,b",
    ]
    if stage == "train":
        lines += [
            "",
            "stopping: a first SIGTERM or SIGINT ends it after the step, with a checkpoint and exit code 75;",
            "  a second one at once, with 143 or 130. touch RUN/checkpoint-now saves a checkpoint and goes on.",
        ]
    if stage.startswith("publish"):
        lines += [
            "",
            "exit codes: 0 promoted and published; 3 no better than the base, or unsound; 4 too few examples to",
            "  tell; 2 wrong input. force=true publishes in spite of 3 and 4, and the card says so.",
        ]
    return "\n".join(lines)


def _settings(name: str) -> list[str]:
    rows = config.flat_keys(SCHEMAS[name]).items()
    return [f"  {key:<28} {_shown(default):<24} {doc}" for key, (default, doc) in rows]


def _shown(value: Any) -> str:
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


def presets(group: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / group).glob("*.yaml"))


def list_configs() -> str:
    """Every configuration file shipped, with the first comment line that it says of itself."""
    lines = []
    for path in sorted(CONFIGS.glob("*.yaml")) + sorted(CONFIGS.glob("*/*.yaml")):
        name = path.relative_to(CONFIGS).with_suffix("")
        shown = str(name) if name.parent == Path() else f"{name.parent}={name.name}"
        lines.append(f"{shown:<36} {_about(path)}")
    return "\n".join(lines)


def _about(path: Path) -> str:
    comments = (x[2:] for x in path.read_text(encoding="utf-8").splitlines() if x.startswith("# "))
    return next((c for c in comments if not c.startswith("@package")), "")
