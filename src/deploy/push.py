"""Publishes the model of a run that passes the gate, to one of TARGETS: a local folder or the Hub."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .. import outcome, runs
from ..errors import RunError
from ..eval.verdict import Verdict
from ..eval.verdict_text import evaluation_text
from ..model.source import LoadArgs
from ..schema import PublishConfig
from ..utils.files import atomic_dir, disk_errors, switch_link
from ..utils.logs import log, log_verdict
from . import hub_settings
from .export import assemble, check_form, published_name
from .gate import GATE, GATE_WITH_MODEL, CheckTarget, check_gate, check_health, run_checks, save_results
from .hub import Publication


def publish(cfg: PublishConfig) -> int:
    """Publish the model of a finished, evaluated run to `cfg.target`.

    Returns: 0.
    Raises: ConfigError if the target lacks a setting; RunError or ModelError if the run cannot be published;
        NotPromoted (exit code 3) or Inconclusive (4) if the gate refuses it.
    """
    target = TARGETS[cfg.target]
    if target.check:
        target.check(cfg)
    _, run = runs.find_model(cfg.model_path, cfg.output_dir)
    if run is None:
        raise RunError(f"{cfg.model_path} is not a run directory", hint="publish a run that has been evaluated")
    if run.status != runs.FINISHED:
        raise RunError(f"run {run.id} is {run.status}, not finished", hint="publish a finished run")
    outcome.report(run=run.path)
    log.info("publishing run %s", run.id)
    check_form(run, cfg.export)
    load = LoadArgs(cfg.cuda_visible_devices, cfg.trust_remote_code)
    to_check = CheckTarget(run.model, run, gate=cfg.gate, load=load)
    results = run_checks(to_check, GATE)
    if judged_by := evaluation_text(run):
        log.info("judged by %s", judged_by)
    verdict = check_gate(run, cfg.gate, cfg.force, results, cfg.artifacts_dir)
    if all(r.passed for r in results):  # damaged files are not loaded
        results += run_checks(to_check, GATE_WITH_MODEL)
        check_health(results, cfg.force)
    save_results(run, results)
    log.info("%s: %s", "promoted" if verdict.promoted else "forced", verdict.sentence)
    for note in verdict.facts.get("notes", []):
        log.info("%s", note)
    where = target.publish(run, cfg, verdict)
    entry = run.manifest["published"][-1]
    log_verdict(f"published to {where}", document={"published": entry}, published=entry["where"])
    return 0


def publish_local(run: runs.Run, cfg: PublishConfig, verdict: Verdict) -> str:
    """Write the folder of the model under `artifacts_dir` atomically, then switch its links.

    `latest` points to the last publication, `promoted` to the last one that passed the gate. Interrupted between
    two steps, the same command completes the publication.
    """
    target = Path(cfg.artifacts_dir) / "models" / published_name(run, cfg.publish_name) / run.id
    promoted = target.parent / "promoted"
    if not verdict.promoted and promoted.is_symlink() and os.readlink(promoted) == run.id:
        raise RunError(
            f"{promoted} is run {run.id}, which passed the gate; a forced publication would replace it",
            hint="set publish_name to another name",
        )
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with publication_lock(target.parent, leftovers=".*.tmp"):
        replaced = target.exists()
        with atomic_dir(target) as temporary:
            files = assemble(run, cfg, verdict, temporary)
        switch_link(target.parent / "latest", target)
        if verdict.promoted:
            switch_link(promoted, target)
        record(run, verdict, target="local", where=str(target.absolute()), files=len(files))
    return f"{target} (replaced its earlier copy)" if replaced else str(target)


def publish_hub(run: runs.Run, cfg: PublishConfig, verdict: Verdict) -> str:
    """Push one commit to the Hub, verify it, tag it with the run's id, and record it in the run's manifest."""
    with (
        publication_lock(run.path, leftovers=".publish.*.tmp"),
        disk_errors(run.path),
        tempfile.TemporaryDirectory(dir=run.path, prefix=".publish.", suffix=".tmp") as folder,
    ):
        files = assemble(run, cfg, verdict, Path(folder), external=True)
        publication = Publication(str(cfg.repo_id), cfg.private, run.id, Path(folder), files)
        facts = publication.publish()
        with publication.explained_errors():
            record(run, verdict, target="hub", where=facts["url"], **facts)
    visibility = "private" if facts["private"] else "public"
    return f"{facts['url']} ({visibility}; commit {facts['commit'][:12]}; {len(files)} files, all verified)"


class PublishTarget(NamedTuple):
    """A place to publish to.

    Args:
        publish: publishes a run that passed the gate; returns the place, for the log.
        check: raises ConfigError if a setting is missing, before the run is read; None: there is nothing to check.
    """

    publish: Callable[[runs.Run, PublishConfig, Verdict], str]
    check: Callable[[PublishConfig], None] | None = None


TARGETS: dict[str, PublishTarget] = {
    "local": PublishTarget(publish_local),
    "hub": PublishTarget(publish_hub, hub_settings.check),
}


def record(run: runs.Run, verdict: Verdict, where: str, **facts: Any) -> None:
    """Record a publication in the run's manifest, replacing an earlier record of the same place."""
    others = [entry for entry in run.manifest.get("published", []) if entry["where"] != where]
    entry = {"at": runs.now(), "where": where, **facts, "promoted": verdict.promoted, "verdict": verdict.sentence}
    run.update(published=[*others, entry])


@contextmanager
def publication_lock(folder: Path, leftovers: str) -> Iterator[None]:
    """Hold the lock of publications in `folder`; first remove the `leftovers` (a glob) of a killed one.

    Raises: RunError if another process holds the lock.
    """
    with disk_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is publishing in {folder}", hint="wait until it has ended") from None
        except OSError:
            log.warning("%s cannot be locked on this file system; do not start a second publication", folder)
        for left in folder.glob(leftovers):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield
    finally:
        os.close(handle)
