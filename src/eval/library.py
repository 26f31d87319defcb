"""Metrics of the library `evaluate`: from the Hub by name, or from a local folder with a script of its name.

evaluate:bertscore?lang=en      a metric of the Hub, and what its compute() takes
evaluate:rouge:rougeLsum        one of the figures of a metric that gives several
evaluate:./metrics/my_metric    ./metrics/my_metric/my_metric.py, which needs no network
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import evaluate
import yaml

from src.errors import ConfigError, did_you_mean
from src.eval.metric_functions import Row
from src.utils.files import sha256

LOWER = {"wer", "cer", "ter", "perplexity", "mse", "mae", "mape", "smape", "brier_score", "character"}
FORM = re.compile(r"(?P<place>.+?)(:(?P<figure>\w+))?(\?(?P<arguments>.*))?")
PROBE = (["one two three", "four five"], ["one two three", "four six"])


class LibraryMetric(NamedTuple):
    """A metric of the library. Its corpus score is its own; where it is no mean, each row is computed alone."""

    name: str
    module: Any
    figure: str
    arguments: Mapping[str, Any]
    digest: str
    scale: str
    better: str

    def implementation(self) -> str:
        asked = "".join(f", {k}={v}" for k, v in self.arguments.items())
        return f"evaluate {evaluate.__version__} {self.module.name} {self.digest[:12]} {self.figure}{asked}"

    def score(self, rows: Sequence[Row]) -> tuple[float, list[float] | None]:
        predictions, references = ([row[key] for row in rows] for key in ("prediction", "reference"))
        found = self._compute(predictions, references)[self.figure]
        if isinstance(found, list | tuple):
            return fmean(map(float, found)), [float(x) for x in found]
        return float(found), self._alone(predictions, references)

    def _alone(self, predictions: Sequence[str], references: Sequence[str]) -> list[float] | None:
        """The score of each pair by itself; None where that has no meaning, as with a correlation."""
        examples = []
        for prediction, reference in zip(predictions, references, strict=True):
            try:
                value = float(self._compute([prediction], [reference])[self.figure])
            except Exception:  # what a script raises over a single pair is its own affair
                return None
            if not isfinite(value):
                return None
            examples.append(value)
        return examples

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> Mapping[str, Any]:
        return dict(
            self.module.compute(predictions=list(predictions), references=list(references), **self.arguments)
        )


def load(name: str, asked: str) -> LibraryMetric:
    """Load the metric `asked` for, and try it on two pairs.

    Raises: ConfigError if it cannot be had, or cannot score texts.
    """
    form = FORM.fullmatch(asked)
    if form is None:
        raise ConfigError(f"metrics: {name} names no metric", hint="write evaluate:NAME")
    place = form["place"]
    words = [word.partition("=") for word in (form["arguments"] or "").split("&") if word]
    arguments = {key: yaml.safe_load(value) for key, _, value in words}
    module = _module(name, place)
    try:
        found = module.compute(predictions=PROBE[0], references=PROBE[1], **arguments)
    except Exception as error:
        raise ConfigError(
            f"metrics: {name} cannot score texts: {' '.join(str(error).split())[:300]}",
            hint=f"what its compute() takes is written as evaluate:{place}?key=value",
        ) from error
    figure = _figure(name, place, found, form["figure"])
    return LibraryMetric(
        name=name,
        module=module,
        figure=figure,
        arguments=arguments,
        digest=_digest(place, module),
        scale="the library's",
        better="lower" if {figure, Path(place).stem} & LOWER else "higher",
    )


def _module(name: str, place: str) -> Any:
    try:
        return evaluate.load(place, keep_in_memory=True)
    except (ConnectionError, FileNotFoundError) as error:
        told = f"metrics: {name} is in no local folder, and not on the Hub, or that cannot be reached"
        raise ConfigError(
            told, hint=f"write evaluate:./FOLDER for a folder that holds {Path(place).name}.py"
        ) from error
    except Exception as error:
        raise ConfigError(f"metrics: {name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _figure(name: str, place: str, found: Mapping[str, Any], asked: str | None) -> str:
    """The figure of a result that is meant: the one asked for, that of the metric's name, the only one, or F1."""
    figures = [k for k, v in found.items() if isinstance(v, int | float) or _is_list(v)]
    if asked and asked not in figures:
        raise ConfigError(f"metrics: {name}: there is no {asked}{did_you_mean(asked, figures)}")
    for wanted in (asked, Path(place).stem, figures[0] if len(figures) == 1 else None, "f1"):
        if wanted in figures:
            return str(wanted)
    raise ConfigError(
        f"metrics: {name} gives {', '.join(figures) or 'no number'}", hint=f"name one: evaluate:{place}:FIGURE"
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == len(PROBE[0]) and not isinstance(value[0], str)


def _digest(place: str, module: Any) -> str:
    """The hash of the script: of the local file, or the one by which the library keeps it."""
    path = Path(place) if place.endswith(".py") else Path(place) / f"{Path(place).name}.py"
    return sha256(path) if path.is_file() else str(module.__module__.rsplit(".", 2)[-2])
