"""Settings that a stage takes from the run that it is about, so that nothing has to be typed twice.

A run is judged by what it was trained with: what its training settings say, then what its newest evaluation used.
The result is a layer of the configuration below the stage's own file (see compose.py). A run that is missing or
has no manifest gives an empty layer, and the stage reports it. Settings that are damaged are refused, since the
model would be judged by the defaults instead.

Imports neither torch nor numpy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import runs
from ..chat_templates import EMPTY_THOUGHTS, TEMPLATE_KWARGS
from ..data.chat import IDENTITY_FILE
from ..data.eval_rows import COLUMN_KEYS
from ..errors import UserError
from ..model.tasks import TASKS
from ..runs import FINISHED, Run
from ..schema import DEFAULT_GUARD
from ..utils.files import read_json
from ..utils.references import escaped, to_config, to_literal
from . import evaluations

Settings = dict[str, Any]
JUDGED_BY = ("eval_path", "reference_turn", "splits", "metrics", "gate")
DECODED_BY = ("max_new_tokens", "stop", "generation")
TEMPLATE_FILE = "chat_template.jinja"
# Equal, or base and tuned differ
CONDITIONS = (
    "engine", "eval_batch_size", "max_examples", "seed", "bf16", "chat_template", TEMPLATE_KWARGS, EMPTY_THOUGHTS,
)  # fmt: skip
MAX_SHOWN = 80  # characters of a value
SHOWN_ELSEWHERE = {"eval_path", "model_name", EMPTY_THOUGHTS}
BY_DATA = ("split", "guards")  # settings of the gate that name splits
# What the last version recorded although nobody had set it.
FORMER_DEFAULTS = {"eval_path": "./data/eval", "splits": ["test", "dev", "adversarial"]}
FORMER_GATE = {"split": "test", "guards": [asdict(DEFAULT_GUARD)]}


def of_model(values: Mapping[str, Any]) -> Settings:
    """For `eval`, `publish` and `validate`: how the run of `model_path` is judged."""
    try:
        folder, run = runs.find_model(_word(values.get("model_path")), str(values.get("output_dir")))
    except UserError:
        return {}
    return _template_layer(folder, values) | (_judged_by(run, values) if run and run.readable else {})


def _template_layer(model: Path, values: Mapping[str, Any]) -> Settings:
    """The variables of a model's chat template, unless another template is typed."""
    return to_config(template_settings(model)) if values.get("chat_template") is None else {}


def template_settings(model: Path) -> Settings:
    """How the model in this folder was tuned to read its chat template; empty if it is not a tuned model.

    Earlier versions, which recorded no `empty_thoughts`, trained empty think blocks with loss.
    """
    with suppress(UserError, OSError):
        record = read_json(model / IDENTITY_FILE)
        kwargs = {TEMPLATE_KWARGS: dict(record[TEMPLATE_KWARGS])} if record.get(TEMPLATE_KWARGS) else {}
        return kwargs | {EMPTY_THOUGHTS: record.get(EMPTY_THOUGHTS, "loss")}
    return {}


def template_file(run: Run | None) -> str | None:
    """The chat template that the model of a run was tuned with; None if its tokenizer has several or none."""
    path = _model_folder(run) / TEMPLATE_FILE if run else None
    return str(path) if path and path.is_file() else None


def _model_folder(run: Run) -> Path:
    """The model that a run trained, or the folder that it evaluated."""
    evaluated = run.manifest.get("model_path")
    return Path(evaluated) if evaluated else run.model


def of_compared(values: Mapping[str, Any]) -> Settings:
    """For `compare`: how `run_a` is judged."""
    try:
        run = runs.find_run(str(values.get("run_a")), str(values.get("output_dir")))
    except UserError:
        return {}
    return _judged_by(run, values) if run.readable else {}


def of_base(values: Mapping[str, Any]) -> Settings:
    """For `eval-baseline`: the base model of the newest run, and the conditions of its evaluation."""
    run = run_of_base(_word(values.get("model_name")), str(values.get("output_dir")))
    if run is None:
        return {}
    manifest = run.manifest
    base = manifest["base_model"]
    revision = base.get("revision")
    found: Settings = {"model_name": escaped(base["name"]), "task": manifest.get("task", "causal_lm")}
    if isinstance(revision, str) and not revision.startswith("sha256:"):  # of the Hub
        found["model_revision"] = revision
    found |= _tokens_of(run)
    also = (
        CONDITIONS if values.get("chat_template") is None else set(CONDITIONS) - {TEMPLATE_KWARGS, EMPTY_THOUGHTS}
    )
    return found | _template_layer(_model_folder(run), values) | _judged_by(run, values, also)


def _tokens_of(run: Run) -> Settings:
    """The tokens that a run added to those of its base model."""
    with suppress(UserError):
        return {key: run.settings[key] for key in ("new_tokens", "resize_embeddings") if run.settings.get(key)}
    return {}


def _word(value: Any) -> str | None:
    """A setting that has not been validated: a run named 2026 is a number."""
    return None if value is None else str(value)


def run_of_base(model_name: str | None, output_dir: str) -> Run | None:
    """The run that was trained or evaluated last, a finished one if there is any.

    Args: model_name: of the runs with this base model only; None: of all.
    """
    known = [run for run in runs.newest_first(output_dir) if _has_base(run, model_name)]
    evaluated = max(known, key=_evaluated_at, default=None)
    if evaluated and _evaluated_at(evaluated) > _made_latest_at(output_dir):
        known = [evaluated, *known]
    return next((run for run in known if run.status == FINISHED), next(iter(known), None))


def _evaluated_at(run: Run) -> datetime:
    """When the newest evaluation of a run began; the epoch if it was not evaluated."""
    with suppress(KeyError, ValueError, TypeError):
        return datetime.fromisoformat(run.manifest["evaluation"]["started"])
    return datetime.fromtimestamp(0, timezone.utc)


def _made_latest_at(output_dir: str) -> datetime:
    """When the newest run was created, resumed or fetched."""
    link = Path(output_dir) / "runs" / "latest"
    return datetime.fromtimestamp(link.lstat().st_mtime if link.is_symlink() else 0, timezone.utc)


def _has_base(run: Run, model_name: str | None) -> bool:
    name = (run.manifest.get("base_model") or {}).get("name")
    if not name or model_name is None:
        return bool(name)
    return name == model_name or (
        os.path.exists(model_name) and Path(name).resolve() == Path(model_name).resolve()
    )


def _judged_by(run: Run, values: Mapping[str, Any], also: Iterable[str] = ()) -> Settings:
    """How a run is judged. Names of splits are not inherited for an `eval_path` that is not the run's."""
    trained, evaluated = _training(run), _evaluation(run, also)
    found = {**trained, **evaluated}
    found["gate"] = {**(trained.get("gate") or {}), **(evaluated.get("gate") or {})}
    runs.refuse_code(run, found, {key for key in values if values[key] is not None})
    typed = values.get("eval_path")
    if typed is not None and typed not in (trained.get("eval_path"), evaluated.get("eval_path")):
        found.pop("splits", None)
        found["gate"] = {key: value for key, value in found["gate"].items() if key not in BY_DATA}
    return found


def _training(run: Run) -> Settings:
    is_former = "evaluation_data" not in run.manifest
    settings = {} if is_former and not (run.path / runs.CONFIG).exists() else run.settings
    return _current(settings, JUDGED_BY, is_former) | to_config(columns_of(run, settings))


def columns_of(run: Run, settings: Mapping[str, Any]) -> Settings:
    """The columns, prompt template and system text by which a run's training read evaluation rows.

    Where it recorded none, the settings of its only data set count, as for a run of the last version.
    """
    recorded = (run.manifest.get("evaluation_data") or {}).get("columns")
    if recorded is None:
        recorded = {} if settings.get("datasets") or settings.get("trainDataConfig") else to_literal(settings)
    return {key: recorded[key] for key in COLUMN_KEYS if recorded.get(key) is not None}


def _evaluation(run: Run, also: Iterable[str]) -> Settings:
    try:
        newest = evaluations.newest(run)
    except UserError:
        return {}
    if newest is None:
        return {}
    return _current(newest.settings, (*JUDGED_BY, *COLUMN_KEYS, *DECODED_BY, *also), newest.is_former)


def _current(settings: Mapping[str, Any], keys: Iterable[str], is_former: bool) -> Settings:
    """The settings `keys`; of the last version without what were its defaults."""
    found = {key: settings[key] for key in keys if key in settings}
    if not is_former:
        return found
    gate = {k: v for k, v in (found.get("gate") or {}).items() if v != FORMER_GATE.get(k, ...)}
    found = {k: v for k, v in found.items() if v != FORMER_DEFAULTS.get(k, ...)} | ({"gate": gate} if gate else {})
    if any(found.get("metrics") == list(task.metrics) for task in TASKS.values()):
        del found["metrics"]
    return found


def describe(cfg: Any, inherited: Mapping[str, Any]) -> str:
    """The settings that are the run's and not the defaults: `gate.min_delta=0.1, max_new_tokens=128`."""
    values, defaults = asdict(cfg), asdict(type(cfg)())
    found = []
    for key in (key for key in inherited if key in values and key not in SHOWN_ELSEWHERE):
        if isinstance(inherited[key], Mapping) and key == "gate":
            pairs = {f"gate.{k}": (v, values[key].get(k), defaults[key].get(k)) for k, v in inherited[key].items()}
        else:
            pairs = {key: (inherited[key], values[key], defaults[key])}
        found += [
            f"{name}={_text(mine)}" for name, (run, mine, default) in pairs.items() if run == mine != default
        ]
    return ", ".join(found)


def _text(value: Any) -> str:
    found = json.dumps(value, ensure_ascii=False) if isinstance(value, list | Mapping | bool) else str(value)
    return found if len(found) <= MAX_SHOWN else f"{found[:MAX_SHOWN]} ..."
