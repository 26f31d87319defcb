"""Composition of a stage's configuration by Hydra.

Later sources win over earlier ones:

    schema defaults < the run < the stage's file < experiment < presets < key=value

A preset that only an experiment chooses, in a defaults list of its own, is below the experiment's settings.

The layer of the run holds what a stage takes from the run that it is about (`Stage.inherits`). Which run that is
depends on the other layers, so a job is composed without it first. Null in the stage's file means as the run says.
A training run takes its model and its adapter from the run that it goes on from (`init_from`): these win over the
shipped file, and a file that the user names wins over them.

The defaults list is made here, so every YAML file (shipped, of a user, or a run's config_used.yaml) is flat. Hydra
reports one unknown key at a time and silently accepts `+epochz=2`. So every override becomes `++key=value`, and
`config.load` validates the result and reports all problems.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from . import (
    aliases,
    chat_templates,
    config,
    config_files,
    hydra_rules,
    override_values,
    precedence,
    secret_references,
)
from .cli_args import Call, yaml_error
from .errors import ConfigError, did_you_mean
from .precedence import GROUPS
from .stages import STAGES
from .utils import references
from .utils.secrets import redact, to_references

FOLDERS = (chat_templates.FOLDER, "schemas")  # of configs/, which are no groups
# Hydra accepts only classes below hydra_plugins. Nothing is there: cli.py registers these when they are used.
OPTUNA, SLURM = "hydra_plugins.assay.OptunaSweeper", "hydra_plugins.assay.SlurmLauncher"
ROOT, RUN_LAYER, RUN_NULLS = "assay_root", "assay_run", "assay_run_nulls"


class RedactSecrets(Callback):
    """Redacts secrets from the configuration that Hydra writes to multirun.yaml.

    Jobs do not use that configuration: each composes its own.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        clean = OmegaConf.create(redact(OmegaConf.to_container(config)), flags={"allow_objects": True})
        with flag_override(config, ["struct", "readonly"], False):
            for key in list(config):
                del config[key]
            config.merge_with(clean)  # `update` would resolve the references


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's YAML reader, which also replaces former names of settings. Hydra requires this class name."""

    known: Collection[str] = ()  # the settings of the stage
    typed: Collection[str] = ()  # the settings and groups of the command line

    def load_config(self, config_path: str) -> ConfigResult:
        try:
            result = super().load_config(config_path)
        except GrammarParseError:
            raise _incomplete_references(Path(self.path, config_path).with_suffix(".yaml")) from None
        found: Any = OmegaConf.to_container(result.config)
        if not isinstance(found, dict):
            return result
        is_record = Path(config_path).stem == "config_used"
        package = result.header.get("package") or ""
        hydra_rules.check(f"{Path(self.path, config_path).with_suffix('.yaml')}", found, package, config_path)
        group = "" if package in {"_global_", "_group_"} else package
        settings = aliases.current_settings(found, not is_record, self.known, group)
        return replace(result, config=OmegaConf.create(_as_layer(settings, self.known, self.typed)))


def _as_layer(settings: Mapping[str, Any], known: Collection[str], typed: Collection[str]) -> dict[str, Any]:
    """The content of a file as it is composed: see precedence.py."""
    return precedence.without_typed_groups(settings, typed) | precedence.decided_by(settings, known)


def register_root(call: Call, overrides: Sequence[str] = ()) -> None:
    """Register the root configuration with Hydra: schema defaults, the stage's file, then the preset groups.

    overrides: those of the search space, in addition to the typed ones.
    """
    call.composed.clear()  # of another root; Hydra's store would lack the layer of the run
    call.inherited.clear()
    typed = [*call.overrides, *overrides]
    secret_references.register()
    FileConfigSource.typed = precedence.keys_of(typed)
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource
    FileConfigSource.known = _setting_names(call)
    store = ConfigStore.instance()
    store.store(name="assay_schema", node=config.defaults(call.stage))
    store.store(group="hydra/sweeper", name="optuna", node={"_target_": OPTUNA}, provider="assay")
    store.store(group="hydra/launcher", name="assay_slurm", node={"_target_": SLURM}, provider="assay")
    store.store(name=RUN_LAYER, node={})
    store.store(name=RUN_NULLS, node={})
    groups: list[Any] = [{g: None} for g in precedence.ordered_groups(typed)]
    store.store(
        name=ROOT,
        node={
            "defaults": [
                "assay_schema", RUN_LAYER, call.config_name, RUN_NULLS, *groups, "_self_",
                {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"},
            ],
            "hydra": {
                # The run directory has its own record; Hydra's would hold the command line unredacted.
                "output_subdir": None,
                "callbacks": {"assay": {"_target_": f"{__name__}.RedactSecrets"}},
                "run": {"dir": "."},
                "sweep": {"dir": "outputs/multirun/${now:%Y-%m-%d_%H-%M-%S}", "subdir": "."},
                "searchpath": [f"file://{folder}" for folder in config_files.folders()],
            },
        },
    )  # fmt: skip


def _current_preset(call: Call, path: str) -> Any:
    """The content of a preset file, with today's names of settings."""
    found = OmegaConf.to_container(OmegaConf.load(path))
    hydra_rules.check(path, found if isinstance(found, dict) else {})  # type: ignore[arg-type]
    known = _setting_names(call)
    if not isinstance(found, dict):
        return found
    settings = aliases.current_settings({str(k): v for k, v in found.items()}, announce=True, known=known)
    return _as_layer(settings, known, precedence.keys_of(call.overrides))


def _incomplete_references(path: Path) -> ConfigError:
    found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    return ConfigError(*(f"{path}: {problem}" for problem in references.incomplete(found)))


def _setting_names(call: Call) -> set[str]:
    return set(config.flat_keys(config.schema_of(call.stage)))


def prepare_overrides(call: Call) -> tuple[list[str], list[str]]:
    """The overrides in the form that Hydra accepts for any key; and the problems of those that it cannot parse."""
    ready, problems = [], aliases.conflicts(call.overrides)
    known = _setting_names(call)
    for typed in call.overrides:
        try:
            text, parsed = override_values.parse(call.stage, aliases.current_override(typed, known))
        except ConfigError as error:
            problems += error.problems
            continue
        key = parsed.key_or_group
        if key.split("/")[0].split(".")[0] == "hydra" or parsed.is_delete():
            ready.append(text)
        elif key in GROUPS and parsed.value() is None:
            continue  # method=null: no preset
        elif key in GROUPS:
            text, parsed = _register_preset_files(call, text, parsed)
            unknown = _unknown_preset(call, parsed)
            problems += unknown
            ready += [] if unknown else [f"{key}={text.split('=', 1)[1]}"]
        elif key in FOLDERS:  # Hydra takes it for a group, since configs/ has a folder of this name
            problems.append(f"{key} is not a setting{config.suggestion(config.schema_of(call.stage), key)}")
        elif found := [] if parsed.is_sweep_override() else list(references.incomplete(parsed.value(), key)):
            problems += found
        else:
            word = override_values.quote_text(call.stage, key, parsed, text.lstrip("+"), call.multirun)
            ready.append(f"++{word}")
    resets = precedence.decided_by(precedence.keys_of(ready), known)
    ready += [f"++{key}={'null' if value is None else value}" for key, value in resets.items()]
    return ready, problems


def _register_preset_files(call: Call, text: str, parsed: Override) -> tuple[str, Override]:
    """Register presets that are given as files. Returns: the override with their names in Hydra.

    Raises: ConfigError if a file is not YAML.
    """
    for path in _preset_names(parsed):
        if path.endswith((".yaml", ".yml")) and Path(path).is_file():
            name = f"{Path(path).stem}_{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:6]}"
            try:
                node = OmegaConf.create(to_references(_current_preset(call, path)))
            except GrammarParseError:
                raise _incomplete_references(Path(path)) from None
            except (YAMLError, OSError, ValueError) as error:
                raise ConfigError(f"{path} cannot be read as YAML: {yaml_error(error)}") from None
            ConfigStore.instance().store(group=parsed.key_or_group, name=name, node=node, package="_global_")
            call.preset_files.add(name)
            text = text.replace(path, name)
    return text, OverridesParser.create().parse_override(text)


def _preset_names(parsed: Override) -> list[str]:
    """The presets in an override: one, or those of a sweep."""
    value = parsed.value()
    return [str(getattr(v, "text", v)) for v in getattr(value, "list", [value]) if v is not None]


def _unknown_preset(call: Call, parsed: Override) -> list[str]:
    own = {path.stem for path in (call.config_dir / parsed.key_or_group).glob("*.yaml")}
    known = sorted(own.union(config_files.presets(parsed.key_or_group)))
    return [
        f"{parsed.key_or_group}={name} is not a preset"
        f"{did_you_mean(name, known) or '; there are: ' + (', '.join(known) or 'none')}"
        for name in _preset_names(parsed)
        if name not in {*known, *call.preset_files}
    ]


def is_sweep(text: str) -> bool:
    return bool(OverridesParser.create().parse_override(text).is_sweep_override())


def compose_values(call: Call, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The composed values of one job, and the problems of those that cannot be composed."""
    try:
        composed = compose_job(call, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        return {}, _hydra_messages(call.stage, error)
    values, problems = {}, []
    for key in (str(k) for k in composed if k != "hydra"):
        try:
            values[key] = plain_value(composed, key)
        except OmegaConfBaseException as error:
            problems.append(references.unresolved(key, error))
    return values, problems


def compose_job(call: Call, overrides: list[str]) -> DictConfig:
    """The configuration of one job with Hydra's part. It is cached: composing takes 0.1 s.

    The job's layer of the run stays in Hydra's store, for Hydra's own composition of the same job.
    """
    key = tuple(overrides)
    if key not in call.composed:
        call.composed[key] = _compose(call, overrides, {}, {})
        values = _resolvable(call.composed[key]) if STAGES[call.stage].inherits else {}
        call.inherited[key] = layer = _settings_of_run(call, values, overrides)
        if layer:
            above = layer if "init_from" in values and _is_shipped(call) else _where_null(layer, values)
            call.composed[key] = _compose(call, overrides, layer, above)
    return call.composed[key]


def _is_shipped(call: Call) -> bool:
    """Whether the stage's file is that of Assay, whose values are defaults, and not one that the user named."""
    return not call.config_path and call.config_name == STAGES[call.stage].config_name


def _compose(call: Call, overrides: list[str], layer: Mapping[str, Any], nulls: Mapping[str, Any]) -> DictConfig:
    ConfigStore.instance().store(name=RUN_LAYER, node=layer)
    ConfigStore.instance().store(name=RUN_NULLS, node=nulls)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(call.config_dir), version_base="1.3"), _preset_errors():
        return compose(ROOT, overrides=overrides, return_hydra_config=True)


def _settings_of_run(call: Call, values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What the stage takes from the run that a job is about: settings of the stage's schema only.

    A mapping that is typed as a whole replaces the run's: Hydra would merge the two.
    """
    known, flat = config.defaults(call.stage), _setting_names(call)
    typed = {text.lstrip("+").partition("=")[0] for text in overrides} & flat
    found = STAGES[call.stage].inherited(values)
    return {k: v for k, v in found.items() if k in known and not (isinstance(v, Mapping) and k in typed)}


def _resolvable(composed: DictConfig) -> dict[str, Any]:
    """The values of a job that can be resolved: what cannot is reported once the job is complete."""
    values = {}
    for key in (str(k) for k in composed if k != "hydra"):
        with suppress(OmegaConfBaseException):
            values[key] = plain_value(composed, key)
    return values


def _where_null(layer: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `layer` for which `values`, composed without it, have null."""
    found = {key: value for key, value in layer.items() if values.get(key) is None}
    groups = ((key, layer[key], values[key]) for key in layer.keys() - found.keys())
    return found | {
        key: _where_null(theirs, mine)
        for key, theirs, mine in groups
        if isinstance(theirs, Mapping) and isinstance(mine, Mapping)
    }


@contextmanager
def _preset_errors() -> Iterator[None]:
    """Raises: ConfigError if a preset is not YAML. (The stage's file has been checked before.)"""
    try:
        yield
    except MarkedYAMLError as error:
        file = error.problem_mark.name if error.problem_mark else "a preset"
        raise ConfigError(f"{file} cannot be read as YAML: {yaml_error(error)}") from None


def plain_value(composed: DictConfig, key: str) -> Any:
    """The value of one key as plain data with resolved interpolations."""
    value = composed[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _hydra_messages(stage: str, error: Exception) -> list[str]:
    """Hydra's message, or a clearer one for `lr=1,2` without --multirun and for a list in the place of a group."""
    if several := re.fullmatch(r"Ambiguous value for argument '\+*([^=]+)=(.*)'", first_line(error)):
        key, values = several.groups()
        return [
            f"{key}={values} is several values; write {key}=[{values}] for a list, or --multirun for a job each"
        ]
    if unmerged := re.fullmatch(r"Error merging override \+*(.*)", first_line(error)):
        key, _, text = unmerged[1].partition("=")
        given: Any = OverridesParser.create().parse_override(unmerged[1]).value()
        for name in reversed(key.split(".")):
            given = {name: given}
        try:
            config.validate(config.schema_of(stage), given)
        except ConfigError as wrong:
            return [problem for problem in wrong.problems if problem.startswith(key)] or list(wrong.problems)
        return [f"{key}={text}: should not be a list or a group of settings"]
    return [first_line(error)]


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
