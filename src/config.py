"""Validation of composed settings against their schema. All problems are reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from typing_extensions import Doc

from . import chat_templates, run_names, schema
from .aliases import ELSEWHERE, OTHER_TOOLS, RENAMED, current_settings
from .errors import ConfigError, did_you_mean
from .schema import SLURM_KEYS, SOURCE_KEYS, DataSource
from .stages import STAGES, SWEEP_STAGE
from .utils import trackers
from .utils.references import dump, to_config
from .utils.signatures import check_passthrough
from .utils.urls import is_redacted

NAME_MAX = 255  # bytes, of ext4, XFS, APFS and NTFS
FILE_SETTINGS = (
    "output_dir",
    "artifacts_dir",
    "cache_dir",
    "dataset_path",
    "eval_path",
    "model_path",
    "publish_name",
)
Check = Callable[[Mapping[str, Any]], list[str]]  # returns the problems of composed values, one sentence each


def no_problems(values: Mapping[str, Any]) -> list[str]:
    return []


@cache
def _adapter(schema: type) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def run_settings(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Composed `values` without the settings of a sweep or a launcher."""
    others = {*SLURM_KEYS, *(["search"] if stage == SWEEP_STAGE else [])}
    return {key: value for key, value in values.items() if key not in others}


def schema_of(stage: str) -> type:
    """The dataclass of the settings of a stage."""
    return cast(type, getattr(schema, STAGES[stage].schema))


def load(stage: str, values: Mapping[str, Any], check: Check = no_problems) -> Any:
    """Validate the composed settings of a stage. Returns: an instance of its schema. Raises: as `validate`."""
    return validate(schema_of(stage), values, check)


def validate(schema: type, values: Mapping[str, Any], check: Check = no_problems) -> Any:
    """Validate composed `values` against a schema, the rules between settings, and the further rules of `check`.

    Returns: an instance of `schema`.
    Raises: ConfigError that lists every problem.
    """
    values = with_lists(schema, current_settings(values, known=flat_keys(schema), resolved=True))
    booleans = _booleans_for_numbers(schema, values)
    problems: list[str] = []
    config: Any = None
    try:
        config = _adapter(schema).validate_python(values)
    except ValidationError as error:
        found = [e for e in error.errors(include_url=False) if _key_of(e) not in booleans]
        problems += dict.fromkeys(_format_error(schema, e) for e in found)
    problems += [f"{key}={text}: should be a number" for key, text in booleans.items()]
    problems += [*cross_checks(values), *check(values)]
    if problems:
        raise ConfigError(*problems)
    return config


def _booleans_for_numbers(schema: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The settings that are numbers, and are set to true or false, which Python takes for 1 and 0."""
    found: dict[str, str] = {}
    for key, value in values.items():
        hint = _type_of(schema, key)
        if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
            found |= _booleans_for_numbers(hint, value, f"{prefix}{key}.")
        elif isinstance(value, bool) and {int, float} & (kinds := set(_alternatives(hint))) and bool not in kinds:
            found[f"{prefix}{key}"] = str(value).lower()
    return found


# Words of other tools for a list: no tracker; every linear layer.
LIST_WORDS: dict[str, dict[str, list[str] | None]] = {
    "report_to": {"none": []},
    "lora_target_modules": {"all-linear": None, "all": None},
}


def with_lists(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` in which a single word for a list of texts is a list: `metrics: bleu` becomes `metrics: [bleu]`.

    Null is the empty list if the setting has no null of its own.
    """
    found = dict(values)
    for key, value in values.items():
        if not is_word_list(schema, key):
            continue
        if value is None and not _is_optional(schema, key):
            found[key] = []
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            found[key] = LIST_WORDS.get(key, {}).get(str(value), [value])
    return found


def cross_checks(values: Mapping[str, Any]) -> list[str]:
    """Problems that concern several settings, or the arguments passed through to a library."""
    problems = check_passthrough("generation", values)
    devices = str(values.get("cuda_visible_devices") or "").replace(" ", "").split(",")
    if any(d and not d.lstrip("-").isdigit() and not d.startswith(("GPU-", "MIG-")) for d in devices):
        problems.append(
            f'cuda_visible_devices={values["cuda_visible_devices"]} is not a list of GPUs like "0" or "0,1"'
        )
    problems += [*_source_problems(values), *_redacted_urls(values)]
    problems += _task_problems(values)
    problems += chat_templates.problems(values)
    problems += _long_names(values)
    name = values.get("publish_name")
    if isinstance(name, str) and not re.fullmatch(r"\w[\w.-]*", name):
        problems.append(f"publish_name={name}: should be a name of letters, digits, '.', '_' and '-'")
    if problem := run_names.problem_of(values.get("run_name")):
        problems.append(problem)
    reporters = values.get("report_to")
    problems += trackers.problems(str(n) for n in reporters) if isinstance(reporters, list) else []
    if (values.get("loss") == "weighted") != bool(values.get("class_weights")):
        problems.append("class_weights and loss=weighted need each other; set both or none")
    if values.get("packing") is True and values.get("padding_free") is False:
        problems.append("packing=true is not supported with padding_free=false; set padding_free=true")
    return problems + _launch_problems(values)


def _redacted_urls(value: Any, key: str = "") -> list[str]:
    """Settings from the record of a run whose URL has no secret parts. The source of the data checks its own."""
    if isinstance(value, str) and is_redacted(value) and not key.endswith("data_source.url"):
        return [f"{key}={value} is a URL without its secret parts, which no record holds; set the whole URL again"]
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [text for k, v in inner for text in _redacted_urls(v, f"{key}.{k}" if key else str(k))]


def _long_names(values: Mapping[str, Any]) -> list[str]:
    """Files and folders with a longer name than file systems have."""
    named = {key: str(values.get(key) or "") for key in FILE_SETTINGS}
    longest = {key: max(len(os.fsencode(part)) for part in text.split("/")) for key, text in named.items()}
    return [
        f"{key}={named[key][:40]}...: a name of {size} bytes is longer than the {NAME_MAX} of a file name"
        for key, size in longest.items()
        if size > NAME_MAX
    ]


def _launch_problems(values: Mapping[str, Any]) -> list[str]:
    """Contradictions between the settings of distributed training."""
    problems = []
    sharding = str(values.get("distributed", "ddp"))
    nodes, node = values.get("num_nodes"), values.get("node_rank")
    if isinstance(nodes, int) and isinstance(node, int) and node >= nodes:
        problems.append(f"node_rank={node}: should be less than num_nodes={nodes}")
    if values.get("offload") is True and sharding == "ddp":
        problems.append("offload=true is not supported with distributed=ddp; choose fsdp2, zero2 or zero3")
    task = values.get("task", "causal_lm")
    if sharding in {"fsdp2", "zero3"} and task != "causal_lm":
        problems.append(f"task={task} is not supported with distributed={sharding}; choose ddp or zero2")
    return problems


def _task_problems(values: Mapping[str, Any]) -> list[str]:
    """Settings of conversations, which tasks with separate input and output do not support."""
    task = values.get("task")
    if task not in ("seq2seq", "classification"):
        return []
    unsupported = {"train_on": ("last_turn", "all"), "on_overlength": ("split",), "packing": (True,)}
    return [
        f"{key}={str(values[key]).lower()} is not supported with task={task}"
        for key, refused in unsupported.items()
        if values.get(key) in refused
    ]


def _source_problems(values: Mapping[str, Any]) -> list[str]:
    """Keys of a data source that its type would ignore."""
    several = values.get("datasets")
    holders = {"": values} | {
        f"datasets.{i}.": d for i, d in enumerate(several if isinstance(several, list) else [])
    }
    problems = []
    for prefix, holder in holders.items():
        source = holder.get("data_source") if isinstance(holder, Mapping) else None
        if not isinstance(source, Mapping) or str(source.get("type", "local")) not in SOURCE_KEYS:
            continue
        kind, default = str(source.get("type", "local")), asdict(DataSource())
        ignored = [
            k
            for k, v in source.items()
            if k in default and v != default[k] and k not in SOURCE_KEYS[kind] | {"type"}
        ]
        problems += [f"{prefix}data_source.{k} is not supported with data_source.type={kind}" for k in ignored]
    return problems


def _format_error(schema: type, error: Any) -> str:
    """One validation error as a sentence; the branches of a union become one."""
    key = _key_of(error)
    parts = key.split(".")
    if parts[-1].isdigit() and is_word_list(schema, parts[0]):
        key = ".".join(parts[:-1])  # the item itself is in the message
    if error["type"] == "unexpected_keyword_argument":
        return f"{key} is not a setting{suggestion(schema, key)}"
    if error["type"] == "list_type":
        return f"{key}={error['input']}: should be a list, as [{error['input']}]"
    if error["type"] == "too_short":
        return f"{key}={error['input']}: should have one item or more"
    if error["type"] == "string_too_short":
        return f"{key}={error['input']}: should not be empty"
    if error["type"] == "dataclass_type":
        return f"{key}={error['input']}: is a group of settings; set for example {_first_key(schema, key)}"
    message = error["msg"].removesuffix(", unable to parse string as a number")
    message = message.removesuffix(", unable to parse string as an integer")
    message = message.replace("Input should be", "should be").replace("valid number", "number")
    expected = choices(schema, key)
    if wanted := _alternatives_text(schema, key):
        message = f"should be {wanted}"
    elif expected:
        guess = did_you_mean(str(error["input"]), expected)
        message = f"should be one of {', '.join(expected)}{guess}"
    value = "null" if error["input"] is None else error["input"]
    return f"{key}={value}: {message[0].lower()}{message[1:]}"


def _key_of(error: Any) -> str:
    """The dotted setting that a validation error is about."""
    return ".".join(str(part) for part in error["loc"] if not _is_union_branch(part))


def suggestion(schema: type, key: str) -> str:
    """`; did you mean lr?` if `key` is similar to a setting of `schema`, or another tool's name for one."""
    known = [*flat_keys(schema), *SLURM_KEYS]
    if ours := others_name(schema, key):
        return f"; did you mean {ours}?"
    if key in ELSEWHERE:
        return f"; {ELSEWHERE[key]}"
    former = {f"; did you mean {old}?": f"; did you mean {new}?" for old, new in RENAMED.items() if new in known}
    found = did_you_mean(key, [*known, *(old for old, new in RENAMED.items() if new in known)])
    return former.get(found, found)


def others_name(schema: type, key: str) -> str:
    """The setting of `schema`, or setting=value, that another tool calls `key`; empty if there is none."""
    ours = OTHER_TOOLS.get(key, "")
    setting = ours.partition("=")[0]
    known = flat_keys(schema)
    return ours if setting in known or setting.partition(".")[0] in known else ""


def _first_key(schema: type, key: str) -> str:
    return next((name for name in flat_keys(schema) if name.startswith(f"{key}.")), key)


def _is_union_branch(part: object) -> bool:
    """Whether a part of pydantic's `loc` is the branch of a union: `literal['auto']`, `int`, `constrained-int`."""
    plain = str(part).removeprefix("constrained-")
    return isinstance(part, str) and (plain in {"bool", "int", "str", "float"} or "[" in part)


@cache
def type_hints(schema: type) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def _type_of(schema: type, key: str) -> Any:
    """The type of a setting without its annotations; None if there is no such setting."""
    hint = type_hints(schema).get(key)
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def choices(schema: type, key: str) -> list[str]:
    """The values of a setting that has a fixed choice; `key` may be dotted."""
    first, _, rest = key.partition(".")
    hint = _type_of(schema, first)
    if rest:
        return choices(hint, rest) if is_dataclass(hint) and isinstance(hint, type) else []
    return _literals(hint)


def is_word_list(schema: type, key: str) -> bool:
    """Whether a setting is a list of texts, or null."""
    return any(get_origin(t) is list and _is_word(get_args(t)[0]) for t in _alternatives(_type_of(schema, key)))


def _is_optional(schema: type, key: str) -> bool:
    return type(None) in _alternatives(_type_of(schema, key))


def _is_word(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return _is_word(get_args(hint)[0])
    return hint is str or (get_origin(hint) is Literal and all(isinstance(a, str) for a in get_args(hint)))


def _alternatives(hint: Any) -> list[Any]:
    """The types of a union without their annotations, or `hint` itself."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return (
        [t for a in get_args(hint) for t in _alternatives(a)] if get_origin(hint) in {Union, UnionType} else [hint]
    )


def _alternatives_text(schema: type, key: str) -> str:
    """`auto or a whole number from 1`, for a setting that accepts values of several kinds; else empty."""
    hint = _type_of(schema, key)
    branches = [b for b in get_args(hint) if b is not type(None)] if get_origin(hint) in {Union, UnionType} else []
    if len(branches) < 2 or all(_literals(b) for b in branches):
        return ""
    return " or ".join(", ".join(_literals(b)) or _described(b) for b in branches)


def _described(hint: Any) -> str:
    """A type with its bounds, in words."""
    kind, *bounds = get_args(hint) if get_origin(hint) is Annotated else [hint]
    words = {int: "a whole number", float: "a number", str: "a text"}.get(kind, "a group of settings")
    low, high, most = (
        next((v for b in bounds if (v := getattr(b, n, None)) is not None), None) for n in ("ge", "lt", "le")
    )
    if high is not None:
        return f"{words} between 0 and {high}"
    if low is not None and most is not None:
        return f"{words} from {low} to {most}"
    if any(getattr(b, "gt", None) == 0 for b in bounds):
        return f"{words} above 0"
    return words if low is None else f"{words} from {low}"


def expected(hint: Any) -> str:
    """The values of a type in words, such as `a whole number from 1` or `one of true, false`."""
    return f"one of {', '.join(found)}" if (found := _literals(hint)) else _described(hint)


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` has a type with its bounds, without a conversion."""
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def is_text(schema: type, key: str) -> bool:
    """Whether a setting is free text, or null; `key` may be dotted."""
    first, _, rest = key.partition(".")
    hint = _type_of(schema, first)
    if rest:
        return is_dataclass(hint) and isinstance(hint, type) and is_text(hint, rest)
    branches = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {get_args(b)[0] if get_origin(b) is Annotated else b for b in branches} - {type(None)} == {str}


def _literals(hint: Any) -> list[str]:
    if hint is bool:
        return ["true", "false"]
    args = get_args(hint)
    if args and all(isinstance(a, str) for a in args):
        return list(args)
    found = [name for a in args for name in _literals(a)]
    return found if any(n not in {"true", "false"} for n in found) else []


def flat_keys(schema: type, prefix: str = "", defaults: Any = None) -> dict[str, tuple[Any, str]]:
    """`{"data_source.type": (default, meaning)}` for each setting of `schema`, in order."""
    found: dict[str, tuple[Any, str]] = {}
    hints = type_hints(schema)
    defaults = defaults or schema()
    for item in fields(schema):
        value = getattr(defaults, item.name)
        if is_dataclass(value):
            found |= flat_keys(type(value), f"{prefix}{item.name}.", value)
        else:
            doc = [m.documentation for m in get_args(hints[item.name])[1:] if isinstance(m, Doc)]
            found[prefix + item.name] = (value, doc[0] if doc else "")
    return found


def to_yaml(settings: Any) -> str:
    """A validated configuration as YAML that composes to the same. Secrets become references."""
    return dump(to_config(asdict(settings)))


def defaults(stage: str) -> dict[str, Any]:
    """The default settings of a stage, as plain data."""
    return asdict(schema_of(stage)())
