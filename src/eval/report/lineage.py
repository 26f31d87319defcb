"""The lineage of a run, for the report: settings, command, code, model, machine and files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

import yaml

from ...aliases import current_settings
from ...config import flat_keys
from ...schema import EvalConfig, TrainConfig
from .charts import number

File = Mapping[str, Any]
MAIN_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "accelerate", "bitsandbytes", "sacrebleu")


class ChangedSetting(NamedTuple):
    key: str
    value: str
    default: str


def settings(text: str) -> dict[str, Any]:
    """`text`: the configuration file; `changed`: its settings that differ from the defaults."""
    try:
        values = current_settings(yaml.safe_load(text) or {})
    except yaml.YAMLError:
        values = {}
    schema = EvalConfig if "max_new_tokens" in values and "lr" not in values else TrainConfig
    defaults = {key: value for key, (value, _) in flat_keys(schema).items()}
    changed = [
        ChangedSetting(key, _format(value), _format(defaults[key]))
        for key, value in _flat(values)
        if key in defaults and value != defaults[key]
    ]
    return {"text": text, "changed": changed}


def _flat(values: object, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        return []
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else []
        found += inner or [(f"{prefix}{key}", value)]
    return found


def _format(value: object) -> str:
    if isinstance(value, list) and any(not isinstance(v, str | int | float) for v in value):
        return f"{len(value)} entries"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def lineage(manifest: File, result: File) -> list[tuple[str, str, bool]]:
    """`(label, value, whether it is shown as code)` of everything that is known."""
    code, evaluation = manifest.get("code") or {}, manifest.get("evaluation") or {}
    base = manifest.get("base_model") or result.get("base_model") or {}
    precision, packages = manifest.get("precision") or {}, manifest.get("packages") or {}
    dirty = ", with uncommitted changes" if code.get("diff_sha256") else ""
    reason = f" ({precision['reason']})" if precision.get("reason") else ""
    rows = [
        ("Command", _command(manifest), True),
        ("Evaluated by", _command(evaluation), True),
        ("Generated with", _join_facts(result.get("generated") or {}), False),
        ("Code", f"{code['commit']}{dirty}" if code.get("commit") else "", True),
        ("Base model", base.get("name"), True),
        ("Base revision", base.get("revision"), True),
        ("Goes on from", describe_parent(manifest), False),
        ("Method", manifest.get("method"), False),
        ("Task", manifest.get("task"), False),
        ("Seed", manifest.get("seed"), False),
        ("Precision", f"{precision['value']}{reason}" if precision.get("value") else "", False),
        ("Hardware", _hardware(manifest.get("hardware") or {}), False),
        ("Processes", manifest.get("processes"), False),
        ("Started", manifest.get("started"), False),
        ("Duration", duration(manifest), False),
        ("Resumed", f"{len(manifest['attempts'])} times" if manifest.get("attempts") else "", False),
        ("Versions", ", ".join(f"{name} {packages[name]}" for name in MAIN_PACKAGES if name in packages), False),
    ]
    return [(label, str(value), is_code) for label, value, is_code in rows if value not in {None, ""}]


def describe_parent(manifest: File) -> str:
    """The models that a run goes on from, its parent first; empty if it started from its base model."""
    found, parent = [], manifest.get("init_from")
    while parent:
        run = f" (run {parent['run']})" if parent.get("run") not in (None, parent["name"]) else ""
        found.append(f"{parent['name']}{run}, {parent['revision']}")
        parent = parent.get("init_from")
    return ", which goes on from ".join(found)


def _join_facts(facts: File) -> str:
    """`engine transformers, new tokens a second 340`; lists and tables are skipped."""
    known = {k: v for k, v in facts.items() if isinstance(v, str | int | float)}
    return ", ".join(f"{k.replace('_', ' ')} {number(v) if isinstance(v, float) else v}" for k, v in known.items())


def _hardware(known: File) -> str:
    gpus = [str(g.get("name", g) if isinstance(g, Mapping) else g) for g in known.get("gpus") or []]
    cpu = f"{known.get('cores', '?')} cores of {known['cpu']}" if known.get("cpu") else ""
    memory = f"{known['memory_gib']} GiB" if known.get("memory_gib") else ""
    python = f"Python {known['python']}" if known.get("python") else ""
    return ", ".join(filter(None, [*gpus, cpu, memory, str(known.get("platform") or ""), python]))


def _command(record: File) -> str:
    words = record.get("command") or []
    return shlex.join(str(word) for word in words) if isinstance(words, list) else str(words)


def duration(record: File) -> str:
    """The time from `started` to `ended`; empty if it is not known."""
    try:
        started, ended = (datetime.fromisoformat(str(record[key])) for key in ("started", "ended"))
    except (KeyError, ValueError):
        return ""
    seconds = int((ended - started).total_seconds())
    hours, minutes = divmod(seconds // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def files(manifest: File, result: File) -> list[dict[str, Any]]:
    """The training files and the evaluation files, with their hashes."""
    trained = [
        {"file": f.get("file"), "use": "training", "rows": f.get("rows_trained"), "sha256": f.get("sha256")}
        for f in (manifest.get("data") or {}).get("files") or []
    ]
    evaluated = (result.get("conditions") or {}).get("data") or {}
    return trained + [
        {"file": f"{split}.jsonl", "use": "evaluation", "rows": None, "sha256": digest}
        for split, digest in evaluated.items()
    ]
