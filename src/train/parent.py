"""The tuned model that a training run goes on from (`init_from`): found, compared with the settings, recorded.

The parent determines the base model, the task, the method and the shape of the adapter.
These settings are a layer of the configuration (compose.py), so that they need not be typed; other values of them
are refused. The base model of the comparison stays the one that the first run of the lineage was trained on.

Imports no torch, so that a wrong combination is refused early.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .. import runs
from ..data.chat import IDENTITY_FILE
from ..errors import DataError, ModelError, UserError
from ..model import methods, tasks
from ..model.source import LOCAL_PREFIXES, Source, adapter_base, content_hash
from ..runs import Run
from ..schema import ChatArgs, MethodArgs, TrainConfig
from ..utils.files import hash_files, read_json
from ..utils.logs import log
from . import arguments

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # USER/NAME or USER/NAME@REVISION
HUB_FILES = ("*.json", "*.jinja", "*.model", "*.txt", ADAPTER_WEIGHTS)
# Settings that the parent determines, and those among them that a new run may nevertheless choose.
SHAPE = ("model_name", "model_revision", "task", *(item.name for item in fields(MethodArgs)))
CHAT = tuple(item.name for item in fields(ChatArgs))
FREE = {"lora_dropout", "model_name", "model_revision", *CHAT}  # check_base compares the base by its content


class Parent(NamedTuple):
    """The tuned model that a run goes on from.

    name: names it in the settings of the new run: the id of a run, a folder, or USER/NAME@COMMIT on the Hub.
    folder: of its weights and its tokenizer.
    run: None if the model belongs to no run of this machine.
    base: name and revision of the untouched base model.
    is_adapter: False for full weights.
    settings: those of SHAPE and CHAT that it was trained with.
    """

    name: str
    folder: Path
    run: Run | None
    base: Mapping[str, Any]
    is_adapter: bool
    settings: Mapping[str, Any]

    @property
    def tokenizer(self) -> Path | None:
        """The folder of its tokenizer; None if it has none of its own."""
        return self.folder if (self.folder / "tokenizer_config.json").is_file() else None

    @property
    def labels(self) -> list[str]:
        """The labels of a classifier in the order of their ids; empty for other tasks."""
        path = self.folder / "config.json"
        return tasks.labels_of(read_json(path)) if self.settings["task"] == "classification" else []

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest records: the parent with the hash of its files, and the parent's own."""
        manifest = self.run.manifest if self.run else _manifest_in(self.folder)
        return {
            "name": self.name,
            "run": manifest.get("run"),
            "method": self.settings["method"],
            "revision": content_hash(self.folder),
            "init_from": manifest.get("init_from"),
        }


def find_parent(cfg: TrainConfig) -> Parent | None:
    """The parent of a run with these settings; None if it starts from its base model.

    Raises: RunError, ModelError or ConfigError if `init_from` names no tuned model.
    """
    return find(cfg.init_from, cfg.output_dir) if cfg.init_from else None


def find(word: str, output_dir: str) -> Parent:
    """The tuned model that `word` names: a run, a folder, or an adapter on the Hub.

    Raises: as `find_parent`.
    """
    if is_hub_id(word):
        name, folder = _download(word)
        run = None
    else:
        folder, run = runs.find_model(None if word == "latest" else word, output_dir)
        name = word
        if (
            run
            and folder.samefile(run.model)
            and run.path.parent.resolve() == (Path(output_dir) / "runs").resolve()
        ):
            name = run.id
    run = run or _run_of_checkpoint(folder)
    record = run.path if run else folder
    is_adapter = (folder / ADAPTER).is_file()
    if is_adapter and not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"init_from={word}: {folder} has no {ADAPTER_WEIGHTS}",
            hint="pickled weights can run code and are not loaded; save the adapter as safetensors",
        )
    base = _base_of(word, folder, run)
    settings = _recorded(record) if (record / runs.CONFIG).is_file() else _of_adapter(folder)
    settings |= {"model_name": base["name"], "model_revision": _hub_commit(base)}
    if run is None and "${" in repr(settings):  # somebody else's files would read this environment
        raise ModelError(
            f"init_from={word}: its settings refer to variables", hint="review its files, and remove it"
        )
    return Parent(name, folder, run, base, is_adapter, settings)


def is_hub_id(word: str) -> bool:
    """Whether `word` names a repository of the Hub: USER/NAME, with a revision or not, that is no path here."""
    return bool(HUB_ID.fullmatch(word)) and not word.startswith(LOCAL_PREFIXES) and not os.path.exists(word)


@cache
def _download(word: str) -> tuple[str, Path]:
    """`USER/NAME@COMMIT` and the local folder of an adapter on the Hub."""
    from huggingface_hub import snapshot_download

    repo, _, revision = word.partition("@")
    try:
        endpoint = os.environ.get("HF_ENDPOINT") or None
        found = snapshot_download(
            repo, revision=revision or None, endpoint=endpoint, allow_patterns=list(HUB_FILES)
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"init_from={word} is no run and no folder here, and the Hub did not provide it: {reason}",
            hint="check the name and the network; a private repository needs HF_TOKEN",
        ) from error
    folder = Path(found)
    if not (folder / ADAPTER).is_file():
        raise ModelError(f"init_from={word} is not an adapter", hint=f"model_name={repo} tunes a base model")
    return f"{repo}@{folder.name}", folder


def _run_of_checkpoint(folder: Path) -> Run | None:
    """The run of RUN/checkpoints/checkpoint-N."""
    run = Run(folder.resolve().parent.parent)
    return run if folder.resolve().parent == run.checkpoints and run.readable else None


def _base_of(word: str, folder: Path, run: Run | None) -> dict[str, Any]:
    """Name and revision of the base model. Raises: ModelError if the folder is itself a base model."""
    manifest = run.manifest if run else _manifest_in(folder)
    if recorded := manifest.get("base_model"):
        return dict(recorded)
    if not any((folder / name).is_file() for name in (ADAPTER, "config.json")):
        raise ModelError(
            f"init_from={word}: {folder} has neither {ADAPTER} nor config.json",
            hint="give a run, or a folder with a tuned model",
        )
    found = adapter_base(folder)
    if found is None:
        raise ModelError(
            f"init_from={word} is a model without the record of a training run",
            hint=f"model_name={word} trains it as a base model",
        )
    return {"name": found[0], "revision": found[1]}


def _manifest_in(folder: Path) -> dict[str, Any]:
    """The manifest of a published model; empty if the folder has none."""
    path = folder / "manifest.json"
    return read_json(path) if path.is_file() else {}


def _hub_commit(base: Mapping[str, Any]) -> str | None:
    revision = base.get("revision")
    return None if str(revision).startswith("sha256:") else revision


def _recorded(folder: Path) -> dict[str, Any]:
    """The settings in the config_used.yaml of a run or of a published model."""
    found, defaults = Run(folder).settings, TrainConfig()
    return {key: found.get(key, getattr(defaults, key)) for key in (*SHAPE, *CHAT)}


def _of_adapter(folder: Path) -> dict[str, Any]:
    """The settings that an adapter_config.json determines.

    Raises: ModelError if no method trains such an adapter.
    """
    config = read_json(folder / ADAPTER)
    name = methods.method_of(config)
    if name is None:
        raise ModelError(f"{folder} is an adapter of the type {config.get('peft_type')}, which no method trains")
    keys = methods.METHODS[name].keys
    settings = {key: config[argument] for key, argument in keys.items() if config.get(argument) is not None}
    if not isinstance(settings.get("lora_target_modules", []), list):  # a regular expression
        del settings["lora_target_modules"]
    task = next((name for name, task in tasks.TASKS.items() if task.peft_type == config.get("task_type")), None)
    identity = read_json(folder / IDENTITY_FILE) if (folder / IDENTITY_FILE).is_file() else {}
    chat = {key: identity[key] for key in CHAT if identity.get(key)}
    return {"task": task or "causal_lm", "method": name, "peft": {}} | settings | chat


# The command line


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the parent of composed settings determines; empty without one, or if it is not found."""
    try:
        parent = _find_in(values)
    except UserError:  # `problems` reports it
        return {}
    return dict(parent.settings) if parent else {}


def problems(values: Mapping[str, Any]) -> list[str]:
    """The contradictions between composed settings and their method or their parent, one sentence each."""
    found = arguments.problems(values)
    try:
        parent = _find_in(values)
    except UserError as error:
        text = str(error)
        return [*found, text if text.startswith("init_from=") else f"init_from={values['init_from']}: {text}"]
    if parent is None:
        return found
    if reason := methods.why_final(str(parent.settings["method"]), parent.settings.get("peft") or {}):
        return [*found, f"init_from={parent.name} cannot be trained further: {reason}"]
    return found + [
        f"{key} is {_shown(values.get(key))}, but init_from={parent.name} was trained with {_shown(wanted)}; "
        + (_other_method(parent, str(values["method"])) if key == "method" else f"leave {key} out")
        for key, wanted in parent.settings.items()
        if key not in FREE and not _same(key, values.get(key), wanted)
    ]


def _find_in(values: Mapping[str, Any]) -> Parent | None:
    word = values.get("init_from")
    return None if word in (None, "") else find(str(word), str(values.get("output_dir")))


def _same(key: str, mine: Any, theirs: Any) -> bool:
    if key == "method" and {mine, theirs} <= methods.METHODS.keys():
        return methods.adapter_of(str(mine)) == methods.adapter_of(str(theirs))
    return bool(mine == theirs)


def _shown(value: Any) -> str:
    """A value as YAML on one line."""
    return value if isinstance(value, str) else json.dumps(value)


def _other_method(parent: Parent, wanted: str) -> str:
    """What to do to train a model by another method than its parent's."""
    if parent.is_adapter:
        return "leave method out, or publish it with export=merged and train with model_name=THAT_FOLDER"
    return f"leave method out, or train a new adapter on its weights with model_name={parent.folder}"


# Training


def with_parent(cfg: Any) -> Any:
    """The settings with `init_from` pinned: `latest` and a branch of the Hub would be another model later."""
    parent = find_parent(cfg)
    if parent is None:
        return cfg
    log.info("going on from %s: method %s over %s", parent.name, parent.settings["method"], parent.base["name"])
    return replace(cfg, init_from=parent.name)


def check_parent(cfg: TrainConfig, base: Source) -> None:
    """Check that the files of the parent are whole, and that `base` is the model that it was trained on.

    Raises: ModelError.
    """
    parent = find_parent(cfg)
    if parent is None:
        return
    is_final = parent.run and parent.folder.resolve() == parent.run.model.resolve()
    known = parent.run.manifest.get("model_files") if parent.run and is_final else None
    if known and hash_files(parent.folder) != known:
        raise ModelError(
            f"init_from={parent.name}: the files in {parent.folder} have changed since they were trained",
            hint="restore them, or choose another run",
        )
    mine, theirs = (base.name, base.revision), (str(parent.base["name"]), parent.base.get("revision"))
    if _is_content(mine[1]) and _is_content(theirs[1]):
        differs = mine[1] != theirs[1]
    elif _is_content(mine[1]) or _is_content(theirs[1]) or not theirs[1]:
        differs = False
        if mine[0] != theirs[0]:
            log.warning("init_from=%s was trained on %s; whether %s is that model is not known",
                        parent.name, theirs[0], mine[0])  # fmt: skip
    else:
        differs = mine != theirs
    if differs:
        raise ModelError(
            f"model_name={base.name} ({base.revision}) is not the base model of init_from={parent.name}, "
            f"which is {theirs[0]} ({theirs[1]})",
            hint="leave model_name out, or restore that model",
        )


def check_labels(parent: Parent, labels: Sequence[str]) -> None:
    """Raises: DataError for labels of the new rows that the parent's head has no output for."""
    if unknown := sorted(set(labels) - set(parent.labels)):
        raise DataError(
            f"the rows have the labels {', '.join(unknown)}, and init_from={parent.name} tells apart only "
            f"{', '.join(parent.labels)}",
            hint="train a new classifier without init_from, or leave these rows out",
        )


def _is_content(revision: str | None) -> bool:
    return str(revision).startswith("sha256:")
