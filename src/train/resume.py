"""The run that a training command resumes. Imports no torch, so an error comes early."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .. import runs
from ..aliases import current_settings
from ..config import to_yaml
from ..data.sources import Version, data_cache, fetch_parts, fetch_recorded
from ..errors import DataError, RunError
from ..runs import Run
from ..schema import LoopArgs, TrainConfig
from ..utils import environment
from ..utils.commands import command
from ..utils.logs import log
from ..utils.secrets import redact
from . import mirror
from .batch_sampler import BatchShape

# Settings that may differ when a run resumes: they do not change the trained weights.
NEUTRAL_KEYS = {
    "resume", "run_name", "output_dir", "artifacts_dir", "cache_dir", "num_proc", "report_to", "checkpoint_mirror",
    "checkpoint_mirror_endpoint", "save_total_limit", "save_steps", "logging_steps", "num_processes", "num_nodes",
    "node_rank", "master_addr", "master_port", "memory_gb", "force",
    "splits", "metrics", "gate",
}  # fmt: skip
# May differ if their product does not, where the run is named: after an out-of-memory error, 2 x 2 for 4 x 1.
BATCH_KEYS = ("batch_size", "gradient_accumulation_steps")
# Parts of the manifest that must be equal when a run resumes.
IDENTITY_FACTS = (
    "method",
    "base_model",
    "init_from",
    "tokenization",
    "data",
    "precision",
    "processes",
    "packages",
)
MAX_SETTINGS_SHOWN, MAX_VALUE_CHARS = 3, 20
WAS = ", but the run was started with "
NUMERIC_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")  # compared in `packages`


def find_resumable(
    cfg: TrainConfig, store: mirror.MirrorStore | None = None, announce: bool = True
) -> list[Run | mirror.MirroredRun]:
    """The runs that the command may resume, newest first, runs of the mirror `store` last; empty for a new run.

    announce: log why the newest unfinished run is not resumed.

    Raises: RunError if `resume` names a run that cannot be resumed, or that has different settings.
    """
    if cfg.resume == "never":
        return []
    if cfg.resume == "auto":
        local = {path.name for path in (Path(cfg.output_dir) / "runs").glob("*")}
        mirrored = [run for run in mirror.list_mirrored_runs(store) if run.id not in local] if store else []
        return _with_equal_settings([*runs.training_runs(cfg.output_dir), *mirrored], cfg, announce)
    run = _find_named(cfg.resume, cfg.output_dir, store)
    if reason := _blocked_reason(run, by_name=True):
        raise _refusal(run, reason, cfg.resume)
    same_steps = (
        isinstance(run, Run)
        and (before := started_with(cfg))
        and before.size == BatchShape(cfg.batch_size, cfg.gradient_accumulation_steps).size
    )
    if differences := _setting_differences(run, cfg, but=BATCH_KEYS if same_steps else ()):
        hint = "a run resumes with its own settings"
        if any(each.startswith("batch_size is") for each in differences):
            hint += ", or with another batch_size and the gradient_accumulation_steps that keep their product"
        problems = (f"resume={cfg.resume}: {each}" for each in differences)
        raise RunError(*problems, hint=f"{hint}; resume=never starts a new run")
    return [run]


def pin_data(
    candidates: Sequence[Run | mirror.MirroredRun], cfg: TrainConfig
) -> tuple[list[Run | mirror.MirroredRun], list[Version]]:
    """The candidates from the first one on whose data is still to be had, and the versions of that data.

    A run resumes with the data that it was started with, although its source may hold a newer version by now.

    Raises: RunError if the data is gone, and `resume` names the run.
    """
    cache = data_cache(cfg.cache_dir, cfg.output_dir)
    for number, run in enumerate(candidates):
        versions = run.manifest.get("data", {}).get("sources", [])
        reason = _fact_differences(run, {"packages": environment.versions()}, ["packages"])
        try:
            pins = [] if reason else fetch_recorded(cfg, cache, versions, same_url=cfg.resume == "auto")
        except DataError as error:
            reason = f"was started with data that cannot be fetched again: {error.problems[0]}"
        if not reason:
            for pin in pins:
                log.info("run %s resumes with %s; resume=never reads the newest version", run.id, pin)
            return list(candidates[number:]), versions if pins else []
        if cfg.resume != "auto":
            raise _refusal(run, reason, cfg.resume)
        log.info("not resuming run %s: it %s", run.id, reason)
    return [], []


def refuse_older_data(cfg: TrainConfig, versions: Sequence[Version]) -> None:
    """Raises: RunError if `versions`, read for a run that cannot be resumed after all, are not the newest."""
    cache = data_cache(cfg.cache_dir, cfg.output_dir)
    newest = [part.version | {"weight": part.weight} for part in fetch_parts(cfg, cache)] if versions else []
    if newest != list(versions):
        raise RunError(
            "the run whose version of the data was read cannot be resumed, and the source holds a newer version",
            hint="resume=never starts a new run with the newest data",
        )


def started_with(cfg: TrainConfig) -> BatchShape | None:
    """The batches of the run that `resume` names, if they are not those of `cfg`."""
    if cfg.resume in ("never", "auto"):
        return None
    try:
        settings = runs.find_training(cfg.resume, cfg.output_dir).settings
    except RunError:  # it is in the mirror
        return None
    before = BatchShape(*(settings.get(key, getattr(cfg, key)) for key in BATCH_KEYS))
    return None if before == (cfg.batch_size, cfg.gradient_accumulation_steps) else before


def record_batches(run: Run, cfg: TrainConfig) -> None:
    """Log and record that a run is resumed with other batches, of as many examples in a step."""
    if before := started_with(cfg):
        log.warning(
            "resuming with batch_size=%d x gradient_accumulation_steps=%d in place of %d x %d: each step has "
            "the same examples, and the bytes of the result may differ",
            *(getattr(cfg, key) for key in BATCH_KEYS), *before,
        )  # fmt: skip
        run.update(resumed_with={key: getattr(cfg, key) for key in BATCH_KEYS})


def resume_first(
    candidates: Sequence[Run | mirror.MirroredRun], facts: Mapping[str, Any], args: LoopArgs, output_dir: str
) -> Run | None:
    """Reopen the first candidate that was started with the same `facts` and that no other process trains.

    Raises: RunError if there is none, and `resume` names the run.
    """
    for run in candidates:
        reason = _fact_differences(run, facts) or _claim(run, args, output_dir)
        if isinstance(reason, Run):
            return reason
        if args.resume != "auto":
            raise _refusal(run, reason, args.resume)
        log.info("not resuming run %s: it %s", run.id, reason)
    return None


def log_repetition(cfg: TrainConfig, facts: Mapping[str, Any]) -> None:
    """Log that a finished run has done the same training before, if one has."""
    for run in runs.training_runs(cfg.output_dir):
        finished = run.manifest["status"] == runs.FINISHED
        if finished and not _setting_differences(run, cfg) and not _fact_differences(run, facts):
            log.info(
                "run %s did this already, with the same settings and data; training again (%s evaluates that run)",
                run.id, command("eval", run.word),
            )  # fmt: skip
            return


def _claim(run: Run | mirror.MirroredRun, args: LoopArgs, output_dir: str) -> Run | str:
    """Lock and reopen the run, downloaded if necessary. Returns: the run, or why it cannot be resumed."""
    if isinstance(run, mirror.MirroredRun):
        try:
            run = run.fetch(Path(output_dir) / "runs", args.load_best_model_at_end)
        except RunError as error:
            return f"cannot be downloaded: {error.problems[0]}"
    if not run.lock():
        return "is being trained by another process"
    if reason := _blocked_reason(run, by_name=args.resume != "auto"):  # it may have changed since find_resumable
        run.unlock()
        return reason
    run.reopen()
    return run


def _refusal(run: Run | mirror.MirroredRun, reason: str, resume: str) -> RunError:
    return RunError(f"resume={resume}: run {run.id} {reason}", hint="resume=never starts a new run")


def _with_equal_settings(
    known: Sequence[Run | mirror.MirroredRun], cfg: TrainConfig, announce: bool
) -> list[Run | mirror.MirroredRun]:
    """The unfinished runs with the settings of `cfg`. If there is none, the log says why the newest is not."""
    found, others = [], []
    for run in known:
        reason = _blocked_reason(run)
        if reason is None and (differences := _setting_differences(run, cfg)):
            reason = f"had other settings: {_in_short(differences)}"
        if reason is None:
            found.append(run)
        elif run.manifest["status"] != runs.FINISHED:
            others.append(f"not resuming run {run.id}: it {reason}")
    if others and not found and announce:
        log.info(others[0])
    return found


def _in_short(differences: Sequence[str]) -> str:
    """`lr=0.003, seed=5 and 2 more`: what the run was started with, from sentences of _setting_differences."""
    pairs = (each.partition(WAS) for each in differences[:MAX_SETTINGS_SHOWN])
    shown = [f"{now.split(' ', 1)[0]}={was}" if len(was) <= MAX_VALUE_CHARS else now.split(" ", 1)[0]
             for now, _, was in pairs]  # fmt: skip
    more = f" and {len(differences) - len(shown)} more" if len(differences) > len(shown) else ""
    return ", ".join(shown) + more


def _fact_differences(
    run: Run | mirror.MirroredRun, facts: Mapping[str, Any], compared: Sequence[str] = IDENTITY_FACTS
) -> str | None:
    """The facts of the manifest that differ now: data and base model above all."""
    before, now = run.manifest, dict(facts)
    changed = [
        key for key in compared if _comparable_fact(key, before.get(key)) != _comparable_fact(key, now.get(key))
    ]
    return f"was started with another {', '.join(changed).replace('_', ' ')}" if changed else None


def _comparable_fact(key: str, fact: Any) -> Any:
    if key == "packages" and isinstance(fact, Mapping):
        return {name: fact.get(name) for name in NUMERIC_PACKAGES}
    if key == "precision" and isinstance(fact, Mapping):
        return fact.get("value")
    return fact


def _find_named(resume: str, output_dir: str, store: mirror.MirrorStore | None) -> Run | mirror.MirroredRun:
    """The run that `resume` names, on this machine or else in the mirror."""
    try:
        return runs.find_training(resume, output_dir)
    except RunError as error:
        local = {run.id for run in runs.all_runs(output_dir)}
        mirrored = [run for run in mirror.list_mirrored_runs(store) if run.id not in local] if store else []
        prefix = "" if resume == "latest" else Path(resume).name
        found = [run for run in mirrored if run.id.startswith(prefix)]
        found = [run for run in found if run.id == prefix] or found
        if len(found) == 1 or (found and resume == "latest"):
            return found[0]
        raise RunError(f"resume={resume}: {error.problems[0]}", hint=error.hint) from None


def _blocked_reason(run: Run | mirror.MirroredRun, by_name: bool = False) -> str | None:
    """Why a run cannot be resumed.

    Whether a process on another host is alive cannot be seen. A run that is named counts as dead if its lock is
    free.
    """
    manifest = run.manifest
    if manifest["status"] == runs.FINISHED:
        return "is finished"
    other_host = manifest["process"]["host"] != socket.gethostname()
    if isinstance(run, Run) and run.status == runs.RUNNING and not (by_name and other_host):
        return f"is being trained by process {manifest['process']['pid']} on {manifest['process']['host']}"
    if not manifest.get("resumable", True):
        return f"would fail in the same way: {manifest.get('error')}"
    return None


def _setting_differences(run: Run | mirror.MirroredRun, cfg: TrainConfig, but: Sequence[str] = ()) -> list[str]:
    """`lr is 0.002, but the run was started with 0.001` for every setting that differs, except `but`."""
    if isinstance(run, mirror.MirroredRun):
        text = run.settings
    elif (path := run.path / "config_used.yaml").is_file():
        text = path.read_text(encoding="utf-8")
    else:
        return ["its config_used.yaml is missing"]
    before = _comparable_settings(to_yaml(TrainConfig())) | _comparable_settings(text)  # of settings since then
    now = _comparable_settings(to_yaml(cfg))
    keys = sorted((before.keys() | now.keys()) - NEUTRAL_KEYS - {*but})
    return [f"{k} is {now.get(k)}{WAS}{before.get(k)}" for k in keys if before.get(k) != now.get(k)]


def _comparable_settings(text: str) -> dict[str, Any]:
    """A configuration as data with unresolved references; GPUs replaced by their count, since any may be used."""
    read: Any = redact(OmegaConf.to_container(OmegaConf.create(text), resolve=False))  # of a run before URLs were
    found = current_settings(read)
    devices = str(found.get("cuda_visible_devices") or "")
    comparable: dict[str, Any] = {"cuda_visible_devices": len(devices.split(",")) if devices else 0}
    if found.get("eval_path"):
        comparable["eval_path"] = os.path.normpath(str(found["eval_path"]))
    return found | comparable
