"""Which run a training goes on with: decided before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from src import runs
from src.config import TrainConfig, to_yaml
from src.errors import RunError
from src.runs import Run
from src.utils.logs import log

# Settings that change nothing of what is learnt.
NEUTRAL = {
    "resume", "output_dir", "artifacts_dir", "cache_dir", "data_workers", "report_to", "mirror", "mirror_endpoint",
    "save_total_limit", "save_steps", "logging_steps", "memory_gb",
    "force",
}  # fmt: skip
SAME = ("method", "base_model", "tokenization", "data", "precision", "packages")  # facts of the manifest
MATTERS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")  # of the packages


def find(cfg: TrainConfig) -> Run | None:
    """The run to go on with, None for a new one.

    Raises: RunError if `resume` names one that cannot be gone on with, or whose settings were others.
    """
    if cfg.resume == "never":
        return None
    if cfg.resume == "auto":
        alike = next((run for run in _trainings(cfg) if not _differing(run, cfg)), None)
        return alike if alike and _no_way_on(alike) is None else None
    run = _named(cfg)
    reason = _no_way_on(run)
    if reason:
        raise RunError(f"resume={cfg.resume}: run {run.id} {reason}", hint="resume=never starts a new one")
    if differing := _differing(run, cfg):
        raise RunError(
            *(f"resume={cfg.resume}: {each}" for each in differing),
            hint="a training goes on with its own settings; resume=never starts a new one",
        )
    return run


def same_facts(run: Run, facts: Mapping[str, Any], cfg: TrainConfig) -> bool:
    """Whether what the run was begun with, its data and base model above all, is what there is now.

    Raises: RunError if it is not, and the run was asked for by name.
    """
    before, now = run.manifest, dict(facts)
    changed = [key for key in SAME if _essence(key, before.get(key)) != _essence(key, now.get(key))]
    if not changed:
        return True
    said = f"run {run.id} was begun with another {', '.join(changed).replace('_', ' ')}"
    if cfg.resume != "auto":
        raise RunError(f"resume={cfg.resume}: {said}", hint="restore it, or start anew with resume=never")
    log.info("a new run: %s", said)
    return False


def _essence(key: str, fact: Any) -> Any:
    if key == "packages" and isinstance(fact, Mapping):
        return {name: fact.get(name) for name in MATTERS}
    if key == "precision" and isinstance(fact, Mapping):
        return fact.get("value")
    return fact


def _trainings(cfg: TrainConfig) -> list[Run]:
    return [run for run in runs.all_runs(cfg.output_dir) if run.manifest["stage"] == "train"]


def _named(cfg: TrainConfig) -> Run:
    if cfg.resume == "latest":
        found = _trainings(cfg)
        if not found:
            raise RunError(f"resume=latest: there is no run in {cfg.output_dir}/runs", hint="set resume=never")
        return found[0]
    run = Run(Path(cfg.resume).resolve())
    if not run.readable:
        raise RunError(f"resume={cfg.resume} is no run directory", hint="make runs lists them")
    return run


def _no_way_on(run: Run) -> str | None:
    """Why a run cannot be gone on with."""
    manifest = run.manifest
    if run.status == runs.FINISHED:
        return "is finished"
    if run.status == runs.RUNNING:
        return f"is being trained by process {manifest['process']['pid']} on {manifest['process']['host']}"
    if not manifest.get("resumable", True):
        return f"would end in the same way: {manifest.get('error')}"
    return None


def _differing(run: Run, cfg: TrainConfig) -> list[str]:
    """`lr was 0.001 and is 0.002` for every setting that is another than the run's."""
    path = run.path / "config_used.yaml"
    if not path.is_file():
        return ["its config_used.yaml is missing"]
    before = _plain(path.read_text(encoding="utf-8"))
    now = _plain(to_yaml(cfg))
    keys = sorted((before.keys() | now.keys()) - NEUTRAL)
    return [f"{k} was {before.get(k)} and is {now.get(k)}" for k in keys if before.get(k) != now.get(k)]


def _plain(text: str) -> dict[str, Any]:
    """A configuration as data, its references left as they are."""
    found: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    return dict(found)
