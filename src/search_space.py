"""The search space: one dimension for each swept setting, written in Hydra's grammar.

lora_r=8,16,32   choice(8,16,32)      categorical
epochs=range(1,5)                     ordinal: 1, 2, 3 or 4
lora_dropout=interval(0,0.1)          a number between the two, bounds included
lr=tag(log,interval(1e-5,1e-2))       the same on a logarithmic scale
lora_r=int(interval(4,64))            an integer
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from .errors import ConfigError

FORMS = "write [8, 16], range(1, 5), interval(0, 0.1) or tag(log, interval(1e-5, 1e-2))"
DIGITS = 3  # significant digits of a drawn number: more would only make a learning rate hard to read


@dataclass(frozen=True)
class Dimension:
    """One swept setting: either `options`, as Hydra writes them, or the interval `low` to `high`."""

    key: str  # as in an override: lr, ++lr, method
    options: tuple[str, ...] = ()
    ordered: bool = False
    low: float = 0
    high: float = 0
    log: bool = False

    @property
    def name(self) -> str:
        return self.key.lstrip("+")

    def edges(self) -> list[str]:
        """The overrides that validate the whole dimension: every option, or both bounds."""
        return [f"{self.key}={value}" for value in self.options or (self.low, self.high)]

    def draw(self, trial: Any) -> str:
        """Draw a value by an Optuna trial. Returns: the override that sets it."""
        if self.ordered:
            value: Any = self.options[trial.suggest_int(self.name, 0, len(self.options) - 1)]
        elif self.options:
            value = trial.suggest_categorical(self.name, self.options)
        elif isinstance(self.low, int):
            value = trial.suggest_int(self.name, self.low, self.high, log=self.log)
        else:
            drawn = trial.suggest_float(self.name, self.low, self.high, log=self.log)
            value = min(max(float(f"{drawn:.{DIGITS}g}"), self.low), self.high)
        return f"{self.key}={value}"


def split(overrides: Iterable[str]) -> tuple[list[str], list[Dimension]]:
    """Separate the overrides that all trials share from those that span the dimensions of the search.

    Raises: ConfigError for an empty interval.
    """
    parser = OverridesParser.create()
    parsed = [(text, parser.parse_override(text)) for text in overrides]
    fixed = [text for text, override in parsed if not override.is_sweep_override()]
    return fixed, [_dimension(text, override) for text, override in parsed if override.is_sweep_override()]


def _dimension(text: str, override: Override) -> Dimension:
    key, value = text.split("=", 1)[0], override.value()
    if not isinstance(value, IntervalSweep):
        options = tuple(dict.fromkeys(override.sweep_string_iterator()))
        return Dimension(key, options, ordered=isinstance(value, RangeSweep) and not value.shuffle)
    low, high, log = value.start, value.end, "log" in value.tags
    if low is None or high is None or low >= high:
        raise ConfigError(f"{text.lstrip('+')}: the lower bound should be below the upper bound")
    if log and low <= 0:
        raise ConfigError(f"{text.lstrip('+')}: the lower bound of a logarithmic scale should be above 0")
    return Dimension(key, low=low, high=high, log=log)


def corners(fixed: list[str], dimensions: list[Dimension]) -> Iterator[list[str]]:
    """Yield trials that together use each edge of each dimension, varying one dimension at a time."""
    first = [d.edges()[0] for d in dimensions]
    yield fixed + first
    for i, dimension in enumerate(dimensions):
        for edge in dimension.edges()[1:]:
            yield [*fixed, *first[:i], edge, *first[i + 1 :]]


def space_override(key: str, values: Any) -> str:
    """An entry of `search.space` as a sweep override: a list means one of its elements, a text is Hydra's grammar.

    Raises: ConfigError if it cannot be parsed, or has only one value.
    """
    text = ",".join(map(_hydra_element, values)) if isinstance(values, list) else str(values)
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException:
        raise ConfigError(f"search.space.{key}={text} cannot be parsed; {FORMS}") from None
    if not override.is_sweep_override():
        raise ConfigError(f"search.space.{key}={text} has only one value; {FORMS}")
    return f"{key}={text}"


def parse_override(override: str) -> tuple[str, str]:
    """`(setting, value)` of an override, without the escapes of Hydra's grammar."""
    value = OverridesParser.create().parse_override(override).value()
    name, text = override.lstrip("+").split("=", 1)
    return name, value if isinstance(value, str) else text


def _hydra_element(value: Any) -> str:
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra_element, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_hydra_element(v)}" for k, v in value.items()) + "}"
    return str(value) if isinstance(value, int | float) else quoted(str(value))


def quoted(text: str) -> str:
    """`text` as a quoted string of Hydra's grammar."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"
