"""Which run a training goes on with: decided before anything heavy is loaded."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from src import runs
from src.aliases import current_settings
from src.config import to_yaml
from src.errors import RunError
from src.runs import Run
from src.schema import TrainConfig
from src.train import mirror
from src.utils.logs import log

# Settings that change nothing of what is learnt.
NEUTRAL_KEYS = {
    "resume", "output_dir", "artifacts_dir", "cache_dir", "num_proc", "report_to", "checkpoint_mirror",
    "checkpoint_mirror_endpoint", "save_total_limit", "save_steps", "logging_steps", "num_processes", "num_nodes",
    "node_rank", "master_addr", "master_port", "memory_gb", "force",
}  # fmt: skip
IDENTITY_FACTS = (
    "method",
    "base_model",
    "tokenization",
    "data",
    "precision",
    "processes",
    "packages",
)  # of the manifest
MAX_SETTINGS_SHOWN = 3
NUMERIC_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")  # of the packages


def find_resumable(cfg: TrainConfig, store: mirror.MirrorStore | None = None) -> list[Run | mirror.MirroredRun]:
    """The runs that could be gone on with, the newest first; none for a new one.

    Those in the mirror, `store`, come after those that are here.
    Raises: RunError if `resume` names one that cannot be gone on with, or whose settings were others.
    """
    if cfg.resume == "never":
        return []
    if cfg.resume == "auto":
        here = {path.name for path in (Path(cfg.output_dir) / "runs").glob("*")}
        there = [run for run in mirror.list_mirrored_runs(store) if run.id not in here] if store else []
        return _resumable_with([*runs.training_runs(cfg.output_dir), *there], cfg)
    run = _find_named(cfg, store)
    if reason := _blocked_reason(run, by_name=True):
        raise _refusal(run, reason, cfg)
    if differing := _changed_settings(run, cfg):
        raise RunError(
            *(f"resume={cfg.resume}: {each}" for each in differing),
            hint="a training goes on with its own settings; resume=never starts a new one",
        )
    return [run]


def resume_first(
    found: Sequence[Run | mirror.MirroredRun], facts: Mapping[str, Any], cfg: TrainConfig
) -> Run | None:
    """Reopen the first of the runs `found` that was begun with what there is now, and that nobody else trains.

    Raises: RunError if there is none, and the run was asked for by name.
    """
    for run in found:
        reason = _changed_facts(run, facts) or _claim(run, cfg)
        if isinstance(reason, Run):
            return reason
        if cfg.resume != "auto":
            raise _refusal(run, reason, cfg)
        log.info("not going on with run %s: it %s", run.id, reason)
    return None


def _claim(run: Run | mirror.MirroredRun, cfg: TrainConfig) -> Run | str:
    """The run, held and open again, or why it cannot be."""
    if isinstance(run, mirror.MirroredRun):
        try:
            run = run.fetch(Path(cfg.output_dir) / "runs", cfg.load_best_model_at_end)
        except RunError as error:
            return f"cannot be fetched: {error.problems[0]}"
    if not run.lock():
        return "is being trained by another process"
    if reason := _blocked_reason(run, by_name=cfg.resume != "auto"):  # since it was found
        run.unlock()
        return reason
    run.reopen()
    return run


def _refusal(run: Run | mirror.MirroredRun, reason: str, cfg: TrainConfig) -> RunError:
    return RunError(f"resume={cfg.resume}: run {run.id} {reason}", hint="resume=never starts a new one")


def _resumable_with(known: Sequence[Run | mirror.MirroredRun], cfg: TrainConfig) -> list[Run | mirror.MirroredRun]:
    """Those with these settings that ended before their time; why the newest is none, if there is none."""
    found, others = [], []
    for run in known:
        reason = _blocked_reason(run)
        if reason is None and (differing := _changed_settings(run, cfg)):
            reason = f"had other settings: {'; '.join(differing[:MAX_SETTINGS_SHOWN])}"
        if reason is None:
            found.append(run)
        elif run.manifest["status"] != runs.FINISHED:
            others.append(f"not going on with run {run.id}: it {reason}")
    if others and not found:
        log.info(others[0])
    return found


def _changed_facts(run: Run | mirror.MirroredRun, facts: Mapping[str, Any]) -> str | None:
    """What the run was begun with that is another now: its data and base model above all."""
    before, now = run.manifest, dict(facts)
    changed = [
        key for key in IDENTITY_FACTS if _comparable(key, before.get(key)) != _comparable(key, now.get(key))
    ]
    return f"was begun with another {', '.join(changed).replace('_', ' ')}" if changed else None


def _comparable(key: str, fact: Any) -> Any:
    if key == "packages" and isinstance(fact, Mapping):
        return {name: fact.get(name) for name in NUMERIC_PACKAGES}
    if key == "precision" and isinstance(fact, Mapping):
        return fact.get("value")
    return fact


def _find_named(cfg: TrainConfig, store: mirror.MirrorStore | None) -> Run | mirror.MirroredRun:
    """The run that `resume` names, here or else in the mirror."""
    try:
        return runs.find_training(cfg.resume, cfg.output_dir)
    except RunError as error:
        here = {run.id for run in runs.all_runs(cfg.output_dir)}
        there = [run for run in mirror.list_mirrored_runs(store) if run.id not in here] if store else []
        beginning = "" if cfg.resume == "latest" else Path(cfg.resume).name
        found = [run for run in there if run.id.startswith(beginning)]
        found = [run for run in found if run.id == beginning] or found
        if len(found) == 1 or (found and cfg.resume == "latest"):
            return found[0]
        raise RunError(f"resume={cfg.resume}: {error.problems[0]}", hint=error.hint) from None


def _blocked_reason(run: Run | mirror.MirroredRun, by_name: bool = False) -> str | None:
    """Why a run cannot be gone on with.

    Of a run on another host it cannot be seen whether it is alive. Whoever names it is believed that it is
    not, as far as its lock is free.
    """
    manifest = run.manifest
    if manifest["status"] == runs.FINISHED:
        return "is finished"
    elsewhere = manifest["process"]["host"] != socket.gethostname()
    if isinstance(run, Run) and run.status == runs.RUNNING and not (by_name and elsewhere):
        return f"is being trained by process {manifest['process']['pid']} on {manifest['process']['host']}"
    if not manifest.get("resumable", True):
        return f"would end in the same way: {manifest.get('error')}"
    return None


def _changed_settings(run: Run | mirror.MirroredRun, cfg: TrainConfig) -> list[str]:
    """`lr was 0.001 and is 0.002` for every setting that is another than the run's."""
    if isinstance(run, mirror.MirroredRun):
        text = run.settings
    elif (path := run.path / "config_used.yaml").is_file():
        text = path.read_text(encoding="utf-8")
    else:
        return ["its config_used.yaml is missing"]
    before = _comparable_settings(text)
    now = _comparable_settings(to_yaml(cfg))
    keys = sorted((before.keys() | now.keys()) - NEUTRAL_KEYS)
    return [f"{k} was {before.get(k)} and is {now.get(k)}" for k in keys if before.get(k) != now.get(k)]


def _comparable_settings(text: str) -> dict[str, Any]:
    """A configuration as data, its references left as they are."""
    read: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    found = current_settings(read)
    devices = str(found.get("cuda_visible_devices") or "")
    return found | {"cuda_visible_devices": len(devices.split(",")) if devices else 0}  # whichever they are
