"""The Python API, for notebooks and scripts: `from assay import train, evaluate, publish`.

Each function is a stage of the command line. Its keyword arguments are the settings and presets of that stage,
those of a group as a dict (`gate={"split": "dev"}`); `config` names a configuration file. Settings are validated
before anything heavy is loaded. What is wrong is raised as UserError, with the sentences that the command prints.
Several calls in one process work. Stages print as they do in a terminal; with `quiet`, only how they ended.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import VERSION
from .errors import RunError, UserError
from .outcome import Outcome
from .stages import STAGES

if TYPE_CHECKING:  # the module reads YAML, which takes longer than everything above
    from .runs import Run

__version__ = VERSION
__all__ = [
    "UserError", "check_data", "compare", "evaluate", "evaluate_baseline", "find_run", "list_runs", "plan",
    "publish", "report", "train", "validate",
]  # fmt: skip

RunName = str | os.PathLike[str]  # the id of a run, the beginning of one, its directory, or "latest"


def check_data(config: str | None = None, *, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Show which rows a training run would use, and which not. Returns: the data report. Raises: UserError."""
    return _call("check-data", config, settings, quiet).document


def plan(config: str | None = None, *, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Estimate steps, memory (bytes), disk and time of a training run. Returns: the plan. Raises: UserError."""
    return _call("plan", config, settings, quiet).document


def train(config: str | None = None, *, quiet: bool = False, **settings: Any) -> Run:
    """Fine-tune a model.

    Returns: the run, with its `metrics` and `model` (a folder).
    Raises: UserError if the run cannot start, or ends without a model: Stopped after an interrupt, for example.
    """
    searched = {"search", "launch"} & settings.keys()
    if searched:
        raise UserError(
            f"{' and '.join(sorted(searched))}: train of the Python API trains one run",
            hint="use the command line, or call train for each",
        )
    return _run_of(_call("train", config, settings, quiet))


def evaluate(
    run: Run | RunName | None = None, config: str | None = None, *, quiet: bool = False, **settings: Any
) -> Run:
    """Evaluate a tuned model, by default that of the newest finished run, and compare it with its base.

    Returns: the run, with its `metrics` and `comparison`. Raises: UserError.
    """
    return _run_of(_call("eval", config, {"model_path": run, **settings}, quiet))


def evaluate_baseline(config: str | None = None, *, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Evaluate a base model. Returns: its scores by split, and where they are stored. Raises: UserError."""
    return _call("eval-baseline", config, settings, quiet).document


def compare(
    run_a: Run | RunName | None = None,
    run_b: Run | RunName | None = None,
    config: str | None = None,
    *,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Compare two evaluated runs, or a run with its base (`run_b="baseline"`).

    Returns: the document that `compare --json` prints, with every metric of every split. Raises: UserError.
    """
    return _call("compare", config, {"run_a": run_a, "run_b": run_b, **settings}, quiet).document


def report(
    run: Run | RunName | None = None, config: str | None = None, *, quiet: bool = False, **settings: Any
) -> Path:
    """Write the report.html of a run, by default the newest. Returns: its path. Raises: UserError."""
    return _run_of(_call("report", config, {"model_path": run, **settings}, quiet)).report


def validate(
    run: Run | RunName | None = None, config: str | None = None, *, quiet: bool = False, **settings: Any
) -> dict[str, Any]:
    """Check that the files of a run are complete and its model works.

    Returns: the validation report, whether its checks passed or not. Raises: UserError.
    """
    return _call("validate", config, {"model_path": run, **settings}, quiet).document


def publish(
    run: Run | RunName | None = None, config: str | None = None, *, quiet: bool = False, **settings: Any
) -> str:
    """Publish a model that beats its base: to a folder, or with target="hub" to the Hugging Face Hub.

    Returns: where it was published, a path or an address.
    Raises: NotPromoted and Inconclusive, which are UserErrors, if the gate refuses it; UserError.
    """
    return str(_call("publish", config, {"model_path": run, **settings}, quiet).facts["published"])


def list_runs(output_dir: str = "outputs") -> list[Run]:
    """All runs, the latest start first."""
    from .runs import all_runs

    return all_runs(output_dir)


def find_run(name: str = "latest", output_dir: str = "outputs") -> Run:
    """The run with this id, beginning of an id, or directory; or the latest. Raises: RunError if none matches."""
    from .runs import find_run

    return find_run(name, output_dir)


# Calling a stage


def _call(stage: str, config: str | None, settings: Mapping[str, Any], quiet: bool) -> Outcome:
    """Run a stage in this process. Raises: UserError."""
    from . import cli, cli_args, outcome
    from .main import load_dotenv, run_stage
    from .runs import called_as
    from .utils.terminal import printable_streams

    words = ["--config-name", config] if config else []
    words += [f"{key}={literal(value)}" for key, value in settings.items() if not _is_absent(stage, key, value)]
    with _environment(), called_as(["assay", stage, *words]), printable_streams():
        outcome.take_flags(["--quiet"] if quiet else [])
        load_dotenv()
        try:
            cli.run_jobs(cli_args.parse(stage, words), lambda config: run_stage(stage, STAGES[stage], config))
        except SystemExit as error:  # of the processes of a training run: they have printed why
            raise RunError(f"{stage} ended with exit code {error.code}", hint="the reason is above") from None
        finally:
            gc.collect()  # a model is in reference cycles
        outcome.print_end("", "")
    return outcome.last_job()


def _is_absent(stage: str, key: str, value: Any) -> bool:
    return value is None and key in STAGES[stage].positionals


def _run_of(outcome: Outcome) -> Run:
    from .runs import Run

    assert outcome.run, "the stage reports its run"
    return Run(outcome.run)


@contextmanager
def _environment() -> Iterator[None]:
    """Restore the environment variables, which a stage sets for its libraries, and name commands as `assay`."""
    before = dict(os.environ)
    os.environ["ASSAY_PROGRAM"] = "assay"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def literal(value: Any) -> str:
    """A value in Hydra's grammar. Raises: UserError for an object that is no setting."""
    from .search_space import quoted

    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str | os.PathLike):
        return quoted(re.sub(r"(?<!\\)\$\{", r"\\${", os.fspath(value)))  # text, no reference to a setting
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_dict_key(str(key))}:{literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, bytes | bytearray):
        raise UserError(f"{value!r} is {type(value).__name__}", hint="give text: decode it")
    if isinstance(value, Sequence | set | frozenset):
        return "[" + ",".join(map(literal, value)) + "]"
    if hasattr(value, "path") and isinstance(value.path, Path):  # a Run
        return quoted(str(value.path))
    if hasattr(value, "item"):  # a scalar of numpy or torch
        return literal(value.item())
    raise UserError(f"{value!r} is a {type(value).__name__}", hint="give text, numbers, lists or dicts")


def _dict_key(text: str) -> str:
    return re.sub(r"([\\()\[\]{}:=,'\"\s])", r"\\\1", text)
