"""JSON schemas of the YAML files: editors complete and describe settings by them, and underline wrong ones.

They are made from the settings' types, ranges, meanings and defaults. `scripts/make_docs.py` writes them to
configs/schemas; a YAML file names its schema in a comment, `# yaml-language-server: $schema=...`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from pydantic import TypeAdapter

from . import NAME, config
from .aliases import RENAMED
from .errors import UserError, did_you_mean
from .schema import SlurmConfig, SweepConfig
from .stages import STAGES, SWEEP_STAGE

PRESET = "preset"  # the schema of presets and experiments, which may set any setting of any stage
DIALECT = "http://json-schema.org/draft-07/schema#"  # what every editor understands
REFERENCE = {"$ref": "#/definitions/reference"}
DEFINITIONS = {"reference": {"type": "string", "pattern": r"\$\{.+\}"}}  # to another setting or a variable
HYDRA = {
    "defaults": {"type": "array", "description": "Hydra's list of other files to include"},
    "hydra": {"type": "object", "description": "settings of Hydra"},
}

Node = dict[str, Any]  # a JSON schema


def schema_command(words: list[str]) -> str:
    """The output of `schema [STAGE]`. Raises: UserError."""
    names = [*STAGES, PRESET]
    if len(words) > 1 or (words and words[0] not in names):
        guess = did_you_mean(words[0], names) or "; there are: " + ", ".join(names)
        raise UserError(f"{words[-1]} is not a stage{guess}", hint="write schema [STAGE]")
    return to_text(preset_schema() if words in ([], [PRESET]) else stage_schema(words[0])).strip()


def schema_files() -> dict[str, str]:
    """The content of each file in configs/schemas: PRESET, and one for each stage with own file or settings."""
    made = {PRESET: preset_schema()}
    for name, stage in STAGES.items():
        shared = any(other.schema == stage.schema for other in STAGES.values() if other is not stage)
        if name.replace("-", "_") == stage.config_name or not shared:
            made[name.replace("-", "_")] = stage_schema(name)
    return {f"{name}.json": to_text(schema) for name, schema in made.items()}


def to_text(schema: Node) -> str:
    """A schema as JSON with one line for each setting."""
    head = {key: value for key, value in schema.items() if key != "properties"}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    settings = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in schema["properties"].items()]
    return "\n".join(["{", *lines, '  "properties": {', ",\n".join(settings), "  }", "}\n"])


@cache
def stage_schema(stage: str) -> Node:
    """The schema of a file for `--config-name` of a stage."""
    settings = _group(config.schema_of(stage))["properties"]
    settings |= _group(SweepConfig)["properties"] if stage == SWEEP_STAGE else {}
    return _document(f"{NAME} {stage}", settings | _group(SlurmConfig)["properties"])


@cache
def preset_schema() -> Node:
    """The schema of a preset: any setting of any stage. Where stages differ in a setting, either type is valid."""
    settings: dict[str, Node] = {}
    for stage in STAGES:
        for key, node in stage_schema(stage)["properties"].items():
            node = _without_defaults(node)
            known = settings.setdefault(key, node)
            if node != known:
                options = [
                    *_options(known),
                    *(option for option in _options(node) if option not in _options(known)),
                ]
                settings[key] = {"description": known["description"], "anyOf": options}
    return _document(f"{NAME} preset", settings)


def _document(title: str, settings: dict[str, Node]) -> Node:
    return {
        "$schema": DIALECT, "title": title, "type": "object", "additionalProperties": False,
        "definitions": DEFINITIONS, "properties": settings | HYDRA,
    }  # fmt: skip


def _group(cls: type, defaults: Any = None) -> Node:
    """The schema of a dataclass. Former names of its settings are marked as deprecated."""
    defaults, meanings = defaults or cls(), {key: doc for key, (_, doc) in config.flat_keys(cls).items()}
    properties: dict[str, Node] = {}
    for item in fields(cls):
        value = getattr(defaults, item.name)
        node = _value(config.type_hints(cls)[item.name], value)
        about: Node = {"description": meanings.get(item.name) or _purpose(type(value))}
        about |= {} if is_dataclass(value) or _holds_groups(value) else {"default": value}
        if words := config.LIST_WORDS.get(item.name):
            node = {"anyOf": [*node["anyOf"], {"enum": list(words)}]}
        properties[item.name] = about | node
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties | dict(_former(cls, properties)),
    }


def _purpose(cls: type) -> str:
    """The first sentence of a group's docstring."""
    return " ".join((cls.__doc__ or "").split()).split(". ")[0].rstrip(".")


def _former(cls: type, properties: Mapping[str, Node]) -> Iterator[tuple[str, Node]]:
    """The former names of settings in `properties`. Those of the gate have its prefix."""
    prefix = "gate." if cls.__name__ == "GateArgs" else ""
    for old, new in RENAMED.items():
        if (name := new.removeprefix(prefix)) in properties and old.startswith(prefix):
            message = f"{old} is now {new}"
            marks = {"deprecated": True, "deprecationMessage": message, "description": message}
            yield old.removeprefix(prefix), properties[name] | marks


def _holds_groups(value: Any) -> bool:
    return isinstance(value, list) and any(is_dataclass(item) for item in value)


def _value(hint: Any, default: Any) -> Node:
    """The schema of a value. A reference such as ${seed} is valid in place of each that is not free text."""
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if _is_group(plain):
        return {"anyOf": [_group(plain, default), REFERENCE]}
    lists = [t for t in (plain, *get_args(plain)) if get_origin(t) is list and _is_group(get_args(t)[0])]
    if lists:
        empty = [{"type": "null"}] if type(None) in get_args(plain) else []
        return {"anyOf": [{"type": "array", "items": _group(get_args(lists[0])[0])}, *empty, REFERENCE]}
    made = TypeAdapter(hint).json_schema()
    return _simplified([option for branch in _options(made) for option in _accepted(branch)])


def _is_group(hint: Any) -> bool:
    """Whether a type is a group of settings."""
    return isinstance(hint, type) and is_dataclass(hint)


def _accepted(branch: Node) -> list[Node]:
    """What is accepted for a type: a number for a text; one word or null for a list of words."""
    if _is_text(branch):
        return [branch | {"type": ["string", "number"]}]
    if branch.get("type") != "array":
        return [branch]
    item = branch["items"]
    (widened,) = _accepted(item)
    words = [widened] if item.get("type") == "string" else []
    empty = [{"type": "null"}] if words and "minItems" not in branch else []
    return [branch | {"items": _simplified([widened])}, *words, *empty]


def _simplified(options: list[Node]) -> Node:
    """One of `options`, or a reference unless one of them is free text."""
    if not any(_is_text(option) for option in options):
        options = [*options, REFERENCE]
    return options[0] if len(options) == 1 else {"anyOf": options}


def _is_text(node: Node) -> bool:
    return "string" in node.get("type", "") and not {"enum", "const", "pattern"} & node.keys()


def _options(node: Node) -> list[Node]:
    """The branches of a union, or the only one."""
    about = ("title", "default", "description")
    branches: list[Node] = node.get("anyOf") or [{k: v for k, v in node.items() if k not in about}]
    return branches


def _without_defaults(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_defaults(value) for key, value in node.items() if key != "default"}
    return [_without_defaults(item) for item in node] if isinstance(node, list) else node
