"""Publishing: a run's model, through the gate, to a target of the table TARGETS."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from src import runs
from src.config import PublishConfig
from src.deploy import checks, describe, export, gate
from src.errors import NotYetError, RunError
from src.model import profile
from src.utils.files import point, sha256, whole_folder, write_json, write_text
from src.utils.logs import log


def publish(cfg: PublishConfig) -> int:
    """Copy the model of a run that beats its base to `artifacts/models/<name>/<run>`."""
    return _publish(cfg, "local")


def publish_hf(cfg: PublishConfig) -> int:
    """Push the model of a run that beats its base to the Hub."""
    return _publish(cfg, "hub")


def _publish(cfg: PublishConfig, target: str) -> int:
    _, run = runs.find(cfg.model_path, cfg.output_dir)
    if run is None:
        raise RunError(f"{cfg.model_path} is not a run directory", hint="publish a run that has been evaluated")
    if run.status != runs.FINISHED:
        raise RunError(f"run {run.id} is {run.status}, not finished", hint="publish a finished run")
    log.info("publishing run %s", run.id)
    export.refuse(run, cfg)
    sound = checks.run_checks(run, cfg.gate)
    verdict = gate.require(run, cfg.gate, cfg.force)
    if all(f.ok for f in sound):  # damaged files are not loaded
        sound += checks.ask_again(run, cfg)
    checks.require(run, sound, cfg.force)
    log.info("%s: %s", "promoted" if verdict.promoted else "forced", verdict.sentence)
    where = TARGETS[target](run, cfg, verdict)
    log.info("published to %s", where)
    return 0


def local(run: runs.Run, cfg: PublishConfig, verdict: gate.Verdict) -> str:
    """The model with its card, manifest, comparison and hashes, under `artifacts_dir`; whole or not at all."""
    name = cfg.publish_name or default_name(run)
    target = Path(cfg.artifacts_dir) / "models" / name / run.id
    with whole_folder(target) as temporary:
        facts = export.write(run, cfg, temporary)
        papers = ("config_used.yaml", "comparison.json", "metrics.json", "data_report.json")
        for extra in (*papers, profile.TRAINING_INFO, profile.PROFILE):
            if (run.path / extra).is_file():
                shutil.copy2(run.path / extra, temporary / extra)
        write_text(temporary / "README.md", describe.model_card(run, name, verdict, facts, cfg))
        files = [p for p in sorted(temporary.rglob("*")) if p.is_file()]
        manifest = run.manifest | {
            "published": {"name": name, "at": runs.now(), **verdict._asdict()},
            "export": facts,
            "sha256": {str(p.relative_to(temporary)): sha256(p) for p in files},
        }
        write_json(temporary / "manifest.json", manifest)
    point(target.parent / "latest", target)
    return str(target)


def hub(run: runs.Run, cfg: PublishConfig, verdict: gate.Verdict) -> str:
    raise NotYetError(
        "pushing to the Hugging Face Hub is not available in this version; the gate was passed, nothing was sent",
        hint="make publish copies the model to artifacts/models",
    )


TARGETS: dict[str, Callable[[runs.Run, PublishConfig, gate.Verdict], str]] = {"local": local, "hub": hub}


def default_name(run: runs.Run) -> str:
    """`<base>-<method>`, from the run's manifest."""
    manifest = run.manifest
    return f"{str(manifest['base_model']['name']).rstrip('/').rsplit('/', 1)[-1]}-{manifest['method']}"
