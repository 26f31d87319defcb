r"""Texts in YAML for OmegaConf, where `${NAME}` is a reference, `\${NAME}` a text and ??? a missing value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from .secrets import redact, split_at_secrets
from .terminal import printable

MISSING = "???"
MISSING_TEXT = "${oc.decode:\"'???'\"}"
REMEDY = r"write \${ for the text ${"


def escaped(text: str) -> str:
    r"""`text` as OmegaConf reads it back: `${` becomes `\${`, and the backslashes before it are doubled."""
    return MISSING_TEXT if text == MISSING else re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def to_config(value: Any) -> Any:
    """Plain data as the content of a configuration file: secrets are references, and all other text is escaped."""
    return redact(_map_texts(value, _to_config_text))


def _to_config_text(text: str) -> str:
    first, *pieces = split_at_secrets(text)
    found = escaped(first)
    for name, after in zip(pieces[::2], pieces[1::2], strict=True):
        backslashes = found[len(found.rstrip("\\")) :]  # before a reference they are doubled, too
        found += f"{backslashes}${{oc.env:{name}}}{escaped(after)}"
    return found


def to_literal(value: Any) -> Any:
    """The inverse of `to_config` in the same environment. A reference that cannot be resolved stays as it is."""

    def resolved(text: str) -> str:
        try:
            return str(OmegaConf.create({"text": text})["text"])
        except OmegaConfBaseException:
            return text

    return _map_texts(value, resolved)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(item, change) for key, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def incomplete(values: Any, key: str = "") -> Iterator[str]:
    """Yield a sentence for each text in `values`, which is unresolved, with a reference that is not complete."""
    if isinstance(values, Mapping | list):
        for name, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from incomplete(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, str):
        try:
            OmegaConf.create({"text": values})
        except GrammarParseError:
            yield f"{key}={values} has an incomplete reference ${{...}}; {REMEDY}"


def unresolved(key: str, error: OmegaConfBaseException) -> str:
    """The sentence for a setting whose reference cannot be resolved."""
    reason = str(error).strip().split("\n", 1)[0]
    if variable := re.search(r"Environment variable '(.*)' not found", reason):
        return f"{key} cannot be resolved: the environment variable {variable[1]} is not set"
    if isinstance(error, InterpolationKeyError):
        reason = reason.replace("Interpolation key '", "there is no setting ").replace("' not found", "")
    if isinstance(error, MissingMandatoryValue):
        return f"{key}={MISSING} stands for a missing value; write another text"
    return f"{key} cannot be resolved: {reason}; {REMEDY}"


def _represent_text(dumper: Any, text: str) -> Any:
    """As OmegaConf does, but quoted if a terminal shows escapes for some characters: YAML reads these escapes."""
    if printable(text) != text:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, '"')
    return DUMPER.str_representer(dumper, text)


DUMPER = get_omega_conf_dumper()  # of --cfg, too
DUMPER.add_representer(str, _represent_text)


def dump(values: Mapping[str, Any]) -> str:
    """The YAML text of a configuration file, with its references as they are."""
    return yaml.dump(dict(values), Dumper=DUMPER, default_flow_style=False, allow_unicode=True, sort_keys=False)
