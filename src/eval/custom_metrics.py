"""Metrics from outside of the table: `evaluate:NAME`, of the library `evaluate`, and `file:PATH.py`, of one's own.

A file holds one function, `score(prediction: str, reference: str) -> float`, and may say SCALE ("0-1") and BETTER
("higher", "lower" or "neither"). Its hash is a part of its implementation, and with that of the fingerprint.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from functools import cache
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Protocol

from src.errors import ConfigError
from src.eval.metric_functions import Row
from src.utils.files import sha256

LIBRARY, FILE = "evaluate:", "file:"
BETTER = ("higher", "lower", "neither")


class CustomMetric(Protocol):
    """A metric that its own code scores: the corpus score, and that of each row where it has one."""

    @property
    def scale(self) -> str: ...

    @property
    def better(self) -> str: ...

    def implementation(self) -> str: ...

    def score(self, rows: Sequence[Row]) -> tuple[float, list[float] | None]: ...


def is_named(name: str) -> bool:
    return name.startswith((LIBRARY, FILE))


@cache
def find(name: str) -> CustomMetric:
    """Load the metric. Raises: ConfigError if there is none, or it cannot score a pair of texts."""
    if name.startswith(FILE):
        return _from_file(name)
    from src.eval import library  # imports evaluate, and with it torch

    return library.load(name, name.removeprefix(LIBRARY))


class FileMetric(NamedTuple):
    """The metric of a file."""

    name: str
    function: Callable[[str, str], Any]
    digest: str
    scale: str
    better: str

    def implementation(self) -> str:
        return f"{self.name.removeprefix(FILE)} sha256 {self.digest}, mean"

    def score(self, rows: Sequence[Row]) -> tuple[float, list[float] | None]:
        examples = [self._one(row["prediction"], row["reference"]) for row in rows]
        return fmean(examples), examples

    def _one(self, prediction: str, reference: str) -> float:
        try:
            found = float(self.function(prediction, reference))
        except Exception as error:
            raise ConfigError(f"metrics: {self.name}: score() {_failed(error)}", hint="mend the file") from error
        if not isfinite(found):
            raise ConfigError(f"metrics: {self.name}: score() gave {found} for {prediction[:60]!r}")
        return found


def _from_file(name: str) -> FileMetric:
    path = Path(name.removeprefix(FILE))
    if not path.is_file():
        raise ConfigError(f"metrics: {path} does not exist")
    try:
        found = runpy.run_path(str(path))
    except Exception as error:
        raise ConfigError(f"metrics: {path} cannot be run: it {_failed(error)}") from error
    if not callable(found.get("score")):
        raise ConfigError(f"metrics: {path} has no function score(prediction, reference)")
    better = found.get("BETTER", "higher")
    if better not in BETTER:
        raise ConfigError(f"metrics: {path}: BETTER={better!r} should be one of {', '.join(BETTER)}")
    return FileMetric(name, found["score"], sha256(path), str(found.get("SCALE", "its own")), better)


def _failed(error: Exception) -> str:
    return f"fails with {type(error).__name__}: {' '.join(str(error).split())}"
