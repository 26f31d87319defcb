"""Metrics outside of METRICS, named where they are used.

file:PATH.py                    a file with a function `score(prediction: str, reference: str) -> float`; it may
                                set SCALE ("0-1") and BETTER ("higher", "lower" or "neither"), and import the
                                files beside it
evaluate:bertscore?lang=en      a metric of the library `evaluate` from the Hub, with arguments of its compute()
evaluate:rouge:rougeLsum        one figure of a metric that returns several
evaluate:./metrics/my_metric    ./metrics/my_metric/my_metric.py, which needs no network

The hash of the code is a part of a metric's implementation, and with that of the conditions. For a file it is that
of the files beside it that it imports, too.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import yaml

from ..errors import ConfigError, did_you_mean
from ..utils.files import sha256
from .metric_functions import Row

LIBRARY, FILE = "evaluate:", "file:"
BETTER = ("higher", "lower", "neither")

LOWER_IS_BETTER = {"wer", "cer", "ter", "perplexity", "mse", "mae", "mape", "smape", "brier_score", "character"}
LIBRARY_NAME = re.compile(r"(?P<path>.+?)(:(?P<figure>\w+))?(\?(?P<arguments>.*))?")
TRIAL = (["one two three", "four five"], ["one two three", "four six"])


class CustomMetric(Protocol):
    """`score` gives the corpus score and, where the metric has them, the scores of the rows."""

    @property
    def scale(self) -> str: ...

    @property
    def better(self) -> str: ...

    def implementation(self) -> str: ...

    def score(self, rows: Sequence[Row]) -> tuple[float, list[float] | None]: ...

    def try_on(self, pairs: Sequence[tuple[str, str]]) -> None: ...


def is_custom(name: str) -> bool:
    return name.startswith((LIBRARY, FILE))


@cache
def load(name: str) -> CustomMetric:
    """Raises: ConfigError if the metric cannot be found or loaded, or cannot score texts."""
    return _from_file(name) if name.startswith(FILE) else _from_library(name)


# Files


class FileMetric(NamedTuple):
    """The mean of a file's function over the rows."""

    name: str
    function: Callable[[str, str], Any]
    digest: str
    scale: str
    better: str

    def implementation(self) -> str:
        return f"{self.name.removeprefix(FILE)} sha256 {self.digest}, mean"

    def score(self, rows: Sequence[Row]) -> tuple[float, list[float] | None]:
        examples = self._scores((row["prediction"], row["reference"]) for row in rows)
        return fmean(examples), examples

    def try_on(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._scores(pairs)

    def _scores(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        with _importable(Path(self.name.removeprefix(FILE)).parent):
            return [self._score_row(*pair) for pair in pairs]

    def _score_row(self, prediction: str, reference: str) -> float:
        try:
            returned = self.function(prediction, reference)
            value = float(returned)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"metrics: {self.name}: score() {_failure(error)}", hint="fix the file") from error
        if isinstance(returned, str):
            raise ConfigError(f"metrics: {self.name}: score() returned the text {returned[:60]!r}, not a number")
        if not isfinite(value):
            raise ConfigError(f"metrics: {self.name}: score() returned {value} for {prediction[:60]!r}")
        return value


def _from_file(name: str) -> FileMetric:
    path = Path(name.removeprefix(FILE))
    if not path.is_file():
        raise ConfigError(f"metrics: {path} does not exist")
    try:
        with _importable(path.parent):
            module = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"metrics: {path} cannot be run: it {_failure(error)}") from error
    if not callable(module.get("score")):
        raise ConfigError(f"metrics: {path} has no function score(prediction, reference)")
    better = module.get("BETTER", "higher")
    if better not in BETTER:
        raise ConfigError(f"metrics: {path}: BETTER={better!r} should be one of {', '.join(BETTER)}")
    return FileMetric(name, module["score"], _file_hash(path), str(module.get("SCALE", "its own")), better)


def _failure(error: BaseException) -> str:
    return f"fails with {type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a metric import the files beside it. They are forgotten afterwards: another metric has its own."""
    before, place = set(sys.modules), str(folder.absolute())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        for name in sys.modules.keys() - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(place + os.sep):
                del sys.modules[name]


def _file_hash(path: Path) -> str:
    """The sha256 of a metric's file; of all files if it imports some that are beside it."""
    files = _imported_files(path, {})
    hashes = [sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _imported_files(path: Path, known: dict[Path, None]) -> list[Path]:
    """`path`, and the files in its folder that it imports, directly or not, at its top or in a function."""
    known[path] = None
    for node in ast.walk(ast.parse(path.read_bytes())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            base = path.parent / name.replace(".", "/")
            for file in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
                if file.is_file() and file not in known:
                    _imported_files(file, known)
    return list(known)


# The library `evaluate`


class LibraryMetric(NamedTuple):
    """A metric of the library, whose compute() gives the corpus score.

    Where compute() gives no list of scores, each row's score is that of its pair alone.
    """

    module: Any
    figure: str
    arguments: Mapping[str, Any]
    version: str
    digest: str
    scale: str
    better: str

    def implementation(self) -> str:
        arguments = "".join(f", {k}={v}" for k, v in self.arguments.items())
        return f"evaluate {self.version} {self.module.name} {self.digest[:12]} {self.figure}{arguments}"

    def score(self, rows: Sequence[Row]) -> tuple[float, list[float] | None]:
        predictions, references = ([row[key] for row in rows] for key in ("prediction", "reference"))
        value = self._compute(predictions, references)[self.figure]
        if isinstance(value, list | tuple):
            return fmean(map(float, value)), [float(x) for x in value]
        return float(value), self._score_rows(predictions, references)

    def try_on(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Nothing: it was tried when it was loaded."""

    def _score_rows(self, predictions: Sequence[str], references: Sequence[str]) -> list[float] | None:
        """The score of each pair by itself; None for a metric that single pairs do not have, as a correlation."""
        examples = []
        for prediction, reference in zip(predictions, references, strict=True):
            try:
                value = float(self._compute([prediction], [reference])[self.figure])
            except Exception:  # a script may raise anything where it gets a single pair
                return None
            if not isfinite(value):
                return None
            examples.append(value)
        return examples

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> Mapping[str, Any]:
        return dict(
            self.module.compute(predictions=list(predictions), references=list(references), **self.arguments)
        )


def _from_library(name: str) -> LibraryMetric:
    """Load the metric, and try it on two pairs. Imports `evaluate`, and with it torch."""
    parts = LIBRARY_NAME.fullmatch(name.removeprefix(LIBRARY))
    if parts is None:
        raise ConfigError(f"metrics: {name} names no metric", hint="write evaluate:NAME")
    import evaluate

    path = parts["path"]
    pairs = [pair.partition("=") for pair in (parts["arguments"] or "").split("&") if pair]
    arguments = {key: yaml.safe_load(value) for key, _, value in pairs}
    module = _load_module(evaluate, name, path)
    try:
        result = module.compute(predictions=TRIAL[0], references=TRIAL[1], **arguments)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"metrics: {name} cannot score texts: {' '.join(str(error).split())[:300]}",
            hint=f"pass arguments of its compute() as evaluate:{path}?key=value",
        ) from error
    figure = _choose_figure(name, path, result, parts["figure"])
    return LibraryMetric(
        module=module,
        figure=figure,
        arguments=arguments,
        version=evaluate.__version__,
        digest=_script_hash(path, module),
        scale="the library's",
        better="lower" if {figure, Path(path).stem} & LOWER_IS_BETTER else "higher",
    )


def _load_module(evaluate: Any, name: str, path: str) -> Any:
    try:
        return evaluate.load(path, keep_in_memory=True)
    except (ConnectionError, FileNotFoundError) as error:
        raise ConfigError(
            f"metrics: {name} is not a local folder, and is not on the Hub or the Hub cannot be reached",
            hint=f"write evaluate:./FOLDER for a folder that holds {Path(path).name}.py",
        ) from error
    except Exception as error:
        raise ConfigError(f"metrics: {name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _choose_figure(name: str, path: str, result: Mapping[str, Any], wanted: str | None) -> str:
    """The key of a result: the one `wanted`, else that of the metric's name, the only one, or `f1`."""
    figures = [k for k, v in result.items() if isinstance(v, int | float) or _is_list_of_scores(v)]
    if wanted and wanted not in figures:
        raise ConfigError(f"metrics: {name} returns no {wanted}{did_you_mean(wanted, figures)}")
    for figure in (wanted, Path(path).stem, figures[0] if len(figures) == 1 else None, "f1"):
        if figure in figures:
            return str(figure)
    raise ConfigError(
        f"metrics: {name} returns {', '.join(figures) or 'no number'}", hint=f"name one: evaluate:{path}:FIGURE"
    )


def _is_list_of_scores(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == len(TRIAL[0]) and not isinstance(value[0], str)


def _script_hash(path: str, module: Any) -> str:
    """The sha256 of a local script, or the hash under which the library caches one of the Hub."""
    file = Path(path) if path.endswith(".py") else Path(path) / f"{Path(path).name}.py"
    return sha256(file) if file.is_file() else str(module.__module__.rsplit(".", 2)[-2])
