"""Values of the command line in Hydra's grammar: a text is quoted where Hydra would read something else."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from . import config, schema
from .errors import ConfigError
from .search_space import quoted

BRACKETS = {"[": "]", "{": "}"}
FUNCTION = re.compile(r"\w+\(")  # choice(a, b) and range(1, 4): a sweep, whatever the setting
ONE_TEXT = {
    "system_prompt",
    "user_prompt",
    "message",
    "csv_delimiter",
    "cuda_visible_devices",
}  # commas belong to it


def parse(stage: str, text: str) -> tuple[str, Override]:
    """Parse an override. If it is not valid, a text, a single value or the texts of a list are quoted.

    Returns: the override as it was parsed, and Hydra's reading of it.
    Raises: ConfigError with the word that can be read, if there is one.
    """
    with suppress(HydraException):
        return text, _parser().parse_override(text)
    key, _, typed = text.lstrip("+").partition("=")
    corrected = text
    with suppress(HydraException):
        is_single = is_text(stage, key) or typed.strip()[:1] not in BRACKETS
        corrected = f"{key}={quoted(typed) if is_single else _with_quotes(typed)}"
        parsed = _parser().parse_override(corrected)
        if is_single or (config.is_word_list(config.schema_of(stage), key) and _is_complete(typed)):
            return corrected, parsed
    try:
        _parser().parse_override(text)
    except HydraException as error:
        remedy = f"; write {shlex.quote(corrected)}" if _can_be_read(corrected) else ""
        reason = str(error).strip().split("\n", 1)[0]
        raise ConfigError(f"{text} cannot be read as key=value: {reason}{remedy}") from None
    raise AssertionError


def _parser() -> OverridesParser:
    return OverridesParser.create()


def _can_be_read(text: str) -> bool:
    with suppress(HydraException):
        return bool(_parser().parse_override(text))
    return False


def _with_quotes(value: str) -> str:
    """A list or a dict with quotes around every text that Hydra cannot read, and with all brackets closed."""
    text = value.strip()
    if (end := BRACKETS.get(text[:1])) is None:
        return text if _is_element(text) else _double_quoted(text.strip("'\""))
    inner = text[1:-1] if text.endswith(end) and len(text) > 1 else text[1:]
    items = [item.strip() for item in _split(inner) if item.strip()]
    if end == "]":
        return f"[{', '.join(map(_with_quotes, items))}]"
    pairs = (item.partition(":")[::2] for item in items)
    return "{" + ", ".join(f"{key.strip()}: {_with_quotes(of_key)}" for key, of_key in pairs) + "}"


def _is_element(text: str) -> bool:
    with suppress(HydraException):
        return not _parser().parse_override(f"key=[{text}]").is_sweep_override() and bool(text)
    return False


def _double_quoted(text: str) -> str:
    """`text` between double quotes in Hydra's grammar: they can stand between the single quotes of a shell."""
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text)
    return f'"{escaped}"'


def _split(text: str) -> Iterator[str]:
    """Cut at the commas that are outside of quotes and brackets."""
    start = 0
    for position, depth, quote in _scan(text):
        if text[position] == "," and not depth and not quote:
            yield text[start:position]
            start = position + 1
    yield text[start:]


def _is_complete(text: str) -> bool:
    """Whether every quote and bracket of a list has its end, and no item is empty."""
    *_, (_, depth, quote) = _scan(text)
    return not depth and not quote and all(item.strip() for item in _split(text.strip()[1:-1]))


def _scan(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield each position, how many brackets are open after it, and the quote that is open after it."""
    depth, quote = 0, ""
    for position, char in enumerate(text):
        escaped = position > 0 and text[position - 1] == "\\"
        if quote:
            quote = "" if char == quote and not escaped else quote
        elif char in "'\"" and text[:position].rstrip()[-1:] in {"", ",", "[", "{", ":"}:
            quote = char
        else:
            depth += (char in "[{") - (char in "]}")
        yield position, depth, quote


def quote_text(stage: str, key: str, parsed: Override, text: str, multirun: bool) -> str:
    """`key=value`, with the value quoted if the setting is a text.

    Unquoted, Hydra reads the commit 12e4567 as a number, and the GPUs 0,1 as a sweep.
    """
    typed = text.split("=", 1)[1]
    if key.startswith("search.space.") and parsed.is_sweep_override():  # the sweeper parses it
        return f"{key}={quoted(typed)}"
    sweep = multirun and parsed.is_sweep_override() and not is_one_text(key, typed, parsed)
    if not is_text(stage, key) or sweep or typed[:1] in {"'", '"'} or typed in {"", "null"}:
        return text
    return f"{key}={quoted(typed)}"


def is_one_text(key: str, typed: str, parsed: Override) -> bool:
    """Whether the commas of a text belong to it, although Hydra reads a sweep: those of prose do.

    >>> [is_one_text(key, typed, _parser().parse_override(f"{key}={typed}")) for key, typed in (
    ...     ("system_prompt", "Be kind,brief"), ("run_name", "a,b"), ("license", "see it, please"),
    ...     ("system_prompt", "choice('Be kind, brief','Be brief')"))]
    [True, False, True, False]
    """
    if FUNCTION.match(typed) or typed[:1] in {"'", '"'}:
        return False
    items = getattr(parsed.value(), "list", [])
    return key.split(".")[-1] in ONE_TEXT or any(
        isinstance(item, str) and re.search(r"\s", item) for item in items
    )


def is_text(stage: str, key: str) -> bool:
    schemas = (config.schema_of(stage), schema.SlurmConfig)
    return any(config.is_text(each, key) for each in schemas)
