"""From a command line to one validated configuration, through Hydra.

Every stage has the same composed shape, so a flat YAML file (the shipped ones, a user's own, a run's
config_used.yaml) needs no defaults list:

    schema defaults < the stage's file < presets < experiment < command line

Hydra alone refuses `epochz=2` one problem at a time, and accepts `+epochz=2` to lose it. Here plain
values are added whatever their name, and `config.load` judges them all together.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from src import config, runs, schema, space
from src.errors import ConfigError, RunError, UserError, did_you_mean
from src.schema import SWEPT
from src.space import quoted
from src.utils.secrets import redact, secrets_as_references

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Each comes over those before it: what the hardware proposes, a method that is named overrules.
GROUPS = ("model", "data", "hardware", "method", "parallel", "launch", "search", "experiment")
ROOT = "assay_root"
SEARCHER = "hydra/sweeper=optuna"
LAUNCHER = "hydra_plugins.assay_slurm.Launcher"
FOR_A_CHECKPOINT = 0.75  # of signal_delay_s: the rest is for queueing the job again
MAX_CHECKED_JOBS = 256
POSITIONALS = ("model_path", "run_a", "run_b")
# validate's flags for what may also be written as a setting
VALIDATED = {"--training-info": "training_info", "--model-path": "model_path", "--profile-path": "profile_path"}


@dataclass
class Call:
    """A parsed command line: overrides for Hydra, its own flags, and the stage's configuration file."""

    stage: str
    config_dir: Path
    config_name: str
    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    multirun: bool = False
    from_files: set[str] = field(default_factory=set)  # what presets given as files are called inside Hydra
    problems: list[str] = field(default_factory=list)  # told together with those of the settings
    check: config.Check = config.nothing_more  # what the stage's room knows of its settings
    composed: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)  # by their overrides


def parse(stage: str, config_name: str, argv: list[str], check: config.Check = config.nothing_more) -> Call:
    """Split `argv` into the stage's configuration, Hydra's flags and overrides.

    Words without `=` are the stage's POSITIONALS, in their order. What cannot be understood becomes one of the
    call's problems.
    Raises: ConfigError if the configuration file is missing: then nothing else can be judged.
    """
    call = Call(stage, CONFIGS, config_name, check=check)
    words = iter(secrets_as_references(argv))
    places = positionals(stage)
    for word in words:
        if word.startswith("-"):
            _flag(call, word, words)
        elif places and ("=" not in word or Path(word).exists()):
            call.overrides.append(f"{places.pop(0)}={quoted(word)}")
        elif "=" in word or word.startswith("~"):
            call.overrides.append(word)
        else:
            call.problems.append(f"{word} is not an override; write key=value")
    _take_up(call)
    if "--resolve" in call.flags and "--cfg" not in call.flags:
        call.problems.append("--resolve goes with --cfg")
    _locate(call)
    return call


def positionals(stage: str) -> list[str]:
    """The settings of the stage that need no name on the command line."""
    return [key for key in POSITIONALS if key in config.flat_keys(schema.SCHEMAS[stage])]


def _flag(call: Call, word: str, words: Iterator[str]) -> None:
    name, _, inline = word.partition("=")

    def value() -> str:
        found = inline or next(words, "")
        if not found:
            call.problems.append(f"{name} needs a value")
        return found

    if name in {"--config-name", "-cn"}:
        call.config_name = value() or call.config_name
    elif name in {"--config-path", "-cp"}:
        call.config_dir = Path(value() or call.config_dir)
    elif name in {"--multirun", "-m"}:
        call.multirun = True
        call.flags.append("--multirun")
    elif name in {"--cfg", "-c"}:
        wanted = value()
        if wanted not in {"job", "hydra", "all"}:
            call.problems.append(f"--cfg {wanted}: should be one of job, hydra, all")
        call.flags += ["--cfg", wanted]
    elif name in {"--config-dir", "-cd"}:
        call.flags += ["--config-dir", value()]
    elif name == "--resolve":
        call.flags.append("--resolve")
    elif name == "--repo" and call.stage == "publish-hf":
        call.overrides.append(f"repo_id={quoted(value())}")
    elif name == "--public" and call.stage == "publish-hf":
        call.overrides.append("private=false")
    elif name in VALIDATED and call.stage == "validate":
        call.overrides.append(f"{VALIDATED[name]}={quoted(value())}")
    elif name == "--force" and call.stage.startswith("publish"):
        call.overrides.append("force=true")
    else:
        call.problems.append(f"{name} is not a flag of {call.stage}; {call.stage} --help lists them")


def _take_up(call: Call) -> None:
    """Make the settings of the run that `resume` names the base of the call, where no other file is named."""
    if call.stage != "train" or (call.config_dir, call.config_name) != (CONFIGS, "train"):
        return
    typed = {key: value.strip("'\"") for key, _, value in (o.lstrip("+").partition("=") for o in call.overrides)}
    if (wanted := typed.get("resume", "auto")) in {"auto", "never"}:
        return
    with suppress(RunError):  # told by the stage, which also looks into the mirror
        run = runs.training(wanted, typed.get("output_dir", schema.OutputArgs.output_dir))
        if (run.path / "config_used.yaml").is_file():
            call.config_dir, call.config_name = run.path, "config_used"


def _locate(call: Call) -> None:
    """Settle the configuration file: a name under --config-path, or a path to a YAML file."""
    named = Path(call.config_name)
    if named.suffix in {".yaml", ".yml"} and named.is_file():
        call.config_dir, call.config_name = named.parent, named.stem
    call.config_dir = call.config_dir.resolve()
    call.config_name = call.config_name.removesuffix(".yaml")
    if not call.config_dir.is_dir():
        raise ConfigError(f"--config-path {call.config_dir} is not a folder")
    if not (call.config_dir / f"{call.config_name}.yaml").is_file():
        names = [p.stem for p in call.config_dir.glob("*.yaml")]
        raise ConfigError(
            f"there is no configuration {call.config_name} in {call.config_dir}"
            f"{did_you_mean(call.config_name, names) or '; list-configs shows all'}"
        )


def run(call: Call, task: Callable[[Any], int | None]) -> int:
    """Check every job of the call, then run `task(config)` under Hydra, which also does sweeps and launchers.

    Raises: UserError from the check, or from the task itself where it is no trial of a sweep.
    """
    overrides, problems = _prepare(call)
    _register(call)
    overrides, search, told = _with_search(call, overrides)
    slurm, misplaced = _slurm(call, overrides)
    told += misplaced + _check_jobs(call, overrides, apart=slurm is not None)
    if problems := [*call.problems, *problems, *told]:
        raise ConfigError(*dict.fromkeys(problems), hint=f"{call.stage} --help lists every setting")
    if search and call.multirun and "--cfg" not in call.flags:
        return _sweep(call, overrides, search, task, slurm)
    if slurm and "--cfg" not in call.flags:
        return _submit(call, overrides, slurm)
    codes: list[int] = []

    def job(composed: DictConfig) -> None:
        if call.multirun:
            current = HydraConfig.get().job
            print(f"job {current.num}:", current.override_dirname.replace("++", ""), flush=True)
        codes.append(task(_loaded(call, composed)) or 0)

    _launch(call, overrides, job)
    return max(codes, default=0)


def _slurm(call: Call, overrides: list[str]) -> tuple[schema.SlurmArgs | None, list[str]]:
    """What a cluster is asked for, None where the runs are made by this process; and what is wrong with that."""
    swept = [text.split("=", 1)[0].lstrip("+") for text in overrides if _is_sweep(text)]
    try:
        composed = _compose(call, [text for text in overrides if not _is_sweep(text)])
    except (HydraException, OmegaConfBaseException):
        return None, []  # told by the check of the jobs
    given = {key: _plain(composed, key) for key in schema.SLURM_KEYS if key in composed}
    if composed.hydra.launcher._target_ != LAUNCHER:
        return None, [f"{key}={value} has no meaning without launch=slurm" for key, value in given.items()]
    problems = [f"{key} cannot differ between the jobs of a command" for key in swept if key in schema.SLURM_KEYS]
    try:
        return config.load("slurm", given), problems
    except ConfigError as error:
        return None, [*problems, *error.problems]


def _submit(call: Call, overrides: list[str], args: schema.SlurmArgs, desk: Any = None) -> int:
    """Run the jobs on a cluster, and wait for them. Returns: the worst of their exit codes."""
    from src.launch.desk import Desk
    from src.launch.job import Job

    values, _ = _composed(call, [text for text in overrides if not _is_sweep(text)])
    output_dir = str(values.get("output_dir", schema.OutputArgs.output_dir))
    desk = desk or Desk(call.stage, args, output_dir, call.multirun)
    flags = [] if call.multirun else ["--multirun"]
    where = f"hydra.sweep.dir={quoted(redact(str(desk.folder)))}"
    job = Job(call.stage, redact(runs.command()), FOR_A_CHECKPOINT * args.signal_delay_s, desk)
    _hydra(replace(call, flags=[*call.flags, *flags]), [*overrides, where], job)
    return max(desk.codes, default=0)


def _sweep(
    call: Call, overrides: list[str], search: schema.SearchArgs, task: Callable[[Any], int | None],
    slurm: schema.SlurmArgs | None,
) -> int:  # fmt: skip
    """Run the jobs as the trials of a sweep, which is told and kept however it ends."""
    from src.sweep import Sweep, plan

    shipped = call.config_dir == CONFIGS and call.config_name == call.stage
    place = ["--config-path", str(call.config_dir), "--config-name", call.config_name]
    again = ["make", call.stage] if shipped else ["python", "-m", "src.main", call.stage, *place]
    fixed, dimensions = space.split(overrides)
    swept = {d.key for d in dimensions}
    values = config.of_a_run(call.stage, _composed(call, fixed)[0])
    sweep = Sweep(plan(values, _composed(call, [])[0], overrides, search, again))

    def job(composed: DictConfig) -> float | None:
        current, loaded = HydraConfig.get(), _loaded(call, composed)
        words = [word for word in current.overrides.task if word.split("=", 1)[0] in swept]
        settings = dict(space.shown(word) for word in words)
        return sweep.trial(current.job.num, settings, loaded.output_dir, lambda: task(loaded))

    with sweep:
        if slurm:
            from src.launch.desk import SweepDesk

            _submit(call, overrides, slurm, SweepDesk(call.stage, slurm, values["output_dir"], sweep, swept))
        else:
            _launch(call, [*overrides, f"hydra.sweep.dir={quoted(redact(str(sweep.folder)))}"], job)
    return sweep.exit_code


def _launch(call: Call, overrides: list[str], job: Callable[[DictConfig], Any]) -> None:
    """Let Hydra run the jobs here. Raises: the UserError of a job, or a ConfigError in Hydra's words."""
    refused: list[UserError] = []

    def guarded(composed: DictConfig) -> Any:
        try:
            return job(composed)
        except UserError as error:
            refused.append(error)
            raise SystemExit(error.exit_code) from error  # Hydra prints a preface to any other exception

    try:
        _hydra(call, overrides, guarded)
    except SystemExit:
        if refused:
            raise refused[0] from None
        raise


def _hydra(call: Call, overrides: list[str], function: Callable[[DictConfig], Any]) -> None:
    """Hand the jobs to Hydra. Raises: ConfigError in its words."""
    argv, sys.argv = sys.argv, [f"assay-{call.stage}", *call.flags, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach the door, which knows how they should sound
    try:
        hydra_main(version_base="1.3", config_path=str(call.config_dir), config_name=ROOT)(function)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from error
    finally:
        sys.argv = argv


def _loaded(call: Call, composed: DictConfig) -> Any:
    """The configuration of one job, without what is the sweep's or the launcher's."""
    return _judged(call, {str(k): _plain(composed, str(k)) for k in composed})


def _judged(call: Call, values: dict[str, Any]) -> Any:
    return config.load(call.stage, config.of_a_run(call.stage, values), call.check)


def _with_search(call: Call, overrides: list[str]) -> tuple[list[str], schema.SearchArgs | None, list[str]]:
    """The overrides with those that a search adds, the sweep's own settings, and what is wrong with these.

    A search has a `search.space`, and is a multirun without the flag; or it is a multirun that names the
    sweeper, or an interval. A setting that the command line names is not searched for.
    """
    if call.stage != SWEPT:
        return overrides, None, []
    values, _ = _composed(call, [text for text in overrides if not _is_sweep(text)])
    try:
        search = config.load("sweep", {"search": values.get("search") or {}}).search
        given = {text.split("=", 1)[0].lstrip("+") for text in overrides}
        words = [space.word(k, v) for k, v in search.space.items() if k not in given]
        added, problems = _prepare(replace(call, overrides=words, multirun=True))
        _, dimensions = space.split([*overrides, *added])
    except ConfigError as error:
        return overrides, None, list(error.problems)
    drawn = SEARCHER in overrides or any(not d.options for d in dimensions)
    if "--cfg" in call.flags or not (search.space or (call.multirun and drawn)):
        return overrides, search, problems
    dev = Path(str(values.get("eval_path"))) / "dev.jsonl"
    if search.metric == "eval_loss" and not dev.is_file():
        problems.append(f"search.metric=eval_loss needs {dev}, which does not exist")
    if not call.multirun:
        call.multirun = True
        call.flags.append("--multirun")
    return [*(text for text in overrides if text != SEARCHER), *added, SEARCHER], search, problems


def _is_sweep(text: str) -> bool:
    return bool(OverridesParser.create().parse_override(text).is_sweep_override())


def _check_jobs(call: Call, overrides: list[str], apart: bool) -> list[str]:
    """What is wrong with any of the jobs, found without running one; `apart` if each is a process of its own."""
    problems: list[str] = []
    gpus: set[str] = set()
    for each in _jobs(call, overrides):
        values, told = _composed(call, each)
        problems += told
        gpus.add(str(values.get("cuda_visible_devices")))
        try:
            _judged(call, values)
        except UserError as error:
            problems += error.problems
    if len(gpus) > 1 and not apart and not any(text.startswith("hydra/launcher=") for text in overrides):
        problems.append("cuda_visible_devices differs between jobs of one process; start a sweep for each")
    return problems


def _composed(call: Call, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of one job as Hydra composes them, and what of them could not be."""
    try:
        composed = _compose(call, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        return {}, [_first_line(error)]
    values, problems = {}, []
    for key in (str(k) for k in composed if k != "hydra"):
        try:
            values[key] = _plain(composed, key)
        except OmegaConfBaseException as error:
            problems.append(f"{key} cannot be resolved: {_first_line(error)}")
    return values, problems


def _compose(call: Call, overrides: list[str]) -> DictConfig:
    """The configuration with Hydra's own part, composed once: that costs a tenth of a second."""
    key = tuple(overrides)
    if key not in call.composed:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(call.config_dir), version_base="1.3"):
            call.composed[key] = compose(ROOT, overrides=overrides, return_hydra_config=True)
    return call.composed[key]


def _plain(composed: DictConfig, key: str) -> Any:
    """The value of one key as plain data, its interpolations resolved."""
    value = composed[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _register(call: Call) -> None:
    """Store the root configuration: schema defaults, then the stage's file, then the preset groups."""
    store = ConfigStore.instance()
    store.store(name="assay_schema", node=config.defaults(call.stage))
    groups: list[Any] = [{g: None} for g in GROUPS]
    store.store(
        name=ROOT,
        node={
            "defaults": [
                "assay_schema", call.config_name, *groups, "_self_",
                {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"},
            ],
            "hydra": {
                # config_used.yaml and manifest.json are the snapshot; Hydra's own would repeat the
                # command line unredacted.
                "output_subdir": None,
                "run": {"dir": "."},
                "sweep": {"dir": "outputs/multirun/${now:%Y-%m-%d_%H-%M-%S}", "subdir": "."},
                "searchpath": [f"file://{CONFIGS}"],
            },
        },
    )  # fmt: skip


def _prepare(call: Call) -> tuple[list[str], list[str]]:
    """Overrides with plain values forced in, for `config.load` to judge; and what cannot be parsed."""
    ready, problems = [], []
    for text in call.overrides:
        try:
            text, parsed = _parsed(call, text)
        except HydraException as error:
            problems.append(f"{text} cannot be read as key=value: {_first_line(error)}")
            continue
        key = parsed.key_or_group
        if key.split("/")[0].split(".")[0] == "hydra" or parsed.is_delete():
            ready.append(text)
        elif key in GROUPS and parsed.value() is None:
            continue  # no preset: as it is without the word
        elif key in GROUPS:
            text, parsed = _with_files(call, text, parsed)
            unknown = _unknown_preset(call, parsed)
            problems += unknown
            ready += [] if unknown else [f"{key}={text.split('=', 1)[1]}"]
        else:
            ready.append("++" + _as_typed(call, key, parsed, text.lstrip("+")))
    return ready, problems


def _parsed(call: Call, text: str) -> tuple[str, Override]:
    """An override as Hydra reads it: as typed or, where that is none, with the value of a text setting quoted.

    Raises: HydraException if it is none even so.
    """
    parser = OverridesParser.create()
    try:
        return text, parser.parse_override(text)
    except HydraException:
        key, _, typed = text.lstrip("+").partition("=")
        if not _takes_text(call, key):
            raise
        text = f"{key}={quoted(typed)}"
        return text, parser.parse_override(text)


def _as_typed(call: Call, key: str, parsed: Override, text: str) -> str:
    """`key=value` with the value of a text setting quoted, as it was typed.

    Unquoted, Hydra reads the commit 12e4567 as a number, and the GPUs 0,1 as a sweep.
    """
    typed = text.split("=", 1)[1]
    if key.startswith("search.space.") and parsed.is_sweep_override():  # drawn from later, by another name
        return f"{key}={quoted(typed)}"
    is_text = _takes_text(call, key)
    sweep = call.multirun and parsed.is_sweep_override()
    if not is_text or sweep or typed[:1] in {"'", '"'} or typed in {"", "null"}:
        return text
    return f"{key}={quoted(typed)}"


def _takes_text(call: Call, key: str) -> bool:
    return any(config.takes_text(schema.SCHEMAS[name], key) for name in (call.stage, "slurm"))


def _with_files(call: Call, text: str, parsed: Override) -> tuple[str, Override]:
    """An override of presets in which each that is named by its file has a name of its own for Hydra.

    Raises: ConfigError if the file is not YAML.
    """
    for path in _chosen(parsed):
        if path.endswith((".yaml", ".yml")) and Path(path).is_file():
            name = f"{Path(path).stem}_{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:6]}"
            try:
                node = OmegaConf.create(redact(OmegaConf.to_container(OmegaConf.load(path))))
            except (YAMLError, OSError, ValueError) as error:
                raise ConfigError(f"{path} cannot be read as YAML: {_first_line(error)}") from None
            ConfigStore.instance().store(group=parsed.key_or_group, name=name, node=node, package="_global_")
            call.from_files.add(name)
            text = text.replace(path, name)
    return text, OverridesParser.create().parse_override(text)


def _chosen(parsed: Override) -> list[str]:
    """The presets that an override names: one, or those of a sweep."""
    value = parsed.value()
    return [str(getattr(v, "text", v)) for v in getattr(value, "list", [value]) if v is not None]


def _unknown_preset(call: Call, parsed: Override) -> list[str]:
    folders = {call.config_dir / parsed.key_or_group, CONFIGS / parsed.key_or_group}
    known = sorted(p.stem for folder in folders for p in folder.glob("*.yaml"))
    return [
        f"{parsed.key_or_group}={name} is not a preset"
        f"{did_you_mean(name, known) or '; there are: ' + (', '.join(known) or 'none')}"
        for name in _chosen(parsed)
        if name not in {*known, *call.from_files}
    ]


def _jobs(call: Call, overrides: list[str]) -> Iterator[list[str]]:
    """Each job's overrides: a sweep is checked whole before its first job runs for hours.

    Of a search, whose jobs are drawn as it goes, these are jobs that show each edge of its space.
    """
    if not call.multirun:
        yield overrides
        return
    fixed, dimensions = space.split(overrides)
    if SEARCHER in overrides:
        jobs: Iterator[list[str]] = space.corners(fixed, dimensions)
    else:
        jobs = ([*fixed, *job] for job in product(*(d.edges() for d in dimensions)))
    yield from islice(jobs, MAX_CHECKED_JOBS)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
