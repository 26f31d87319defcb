"""Publishing: a run's model, through the gate, to a target of the table TARGETS."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from src import runs
from src.deploy import checks, export, findings, gate, hub_settings
from src.deploy.hub import Publication
from src.deploy.package import assemble, name_of
from src.errors import RunError
from src.schema import PublishConfig
from src.utils.files import atomic_dir, disk_errors, switch_link
from src.utils.logs import log


def publish(cfg: PublishConfig) -> int:
    """Publish the model of a run that beats its base to `cfg.target`.

    Raises: ConfigError if the target lacks a setting; NotPromoted or CannotTell if the gate says no; RunError.
    """
    target = TARGETS[cfg.target]
    target.check(cfg)
    _, run = runs.find(cfg.model_path, cfg.output_dir)
    if run is None:
        raise RunError(f"{cfg.model_path} is not a run directory", hint="publish a run that has been evaluated")
    if run.status != runs.FINISHED:
        raise RunError(f"run {run.id} is {run.status}, not finished", hint="publish a finished run")
    log.info("publishing run %s", run.id)
    export.refuse(run, cfg)
    sound = checks.run_checks(run, cfg.gate)
    verdict = gate.require(run, cfg.gate, cfg.force, sound, cfg.artifacts_dir)
    if all(f.ok for f in sound):  # damaged files are not loaded
        sound += checks.ask_again(run, cfg)
        gate.require_sound(sound, cfg.force)
    findings.keep(run, sound)
    log.info("%s: %s", "promoted" if verdict.promoted else "forced", verdict.sentence)
    log.info("published to %s", target.publish(run, cfg, verdict))
    return 0


def local(run: runs.Run, cfg: PublishConfig, verdict: gate.Verdict) -> str:
    """The folder of the model under `artifacts_dir`, whole or not at all, and then its pointers.

    `latest` is what was published last, `promoted` what last passed the gate. Whatever stops this between two
    steps, the same command puts right.
    """
    target = Path(cfg.artifacts_dir) / "models" / name_of(run, cfg) / run.id
    promoted = target.parent / "promoted"
    if not verdict.promoted and promoted.is_symlink() and os.readlink(promoted) == run.id:
        raise RunError(
            f"{promoted} is run {run.id}, which passed the gate then, and a forced copy would take its place",
            hint="set publish_name to another name",
        )
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with alone(target.parent, leftovers=".*.tmp"):
        again = target.exists()
        with atomic_dir(target) as temporary:
            files = assemble(run, cfg, verdict, temporary)
        switch_link(target.parent / "latest", target)
        if verdict.promoted:
            switch_link(promoted, target)
        record(run, verdict, target="local", where=str(target.absolute()), files=len(files))
    return f"{target}, in the place of its earlier copy" if again else str(target)


def to_hub(run: runs.Run, cfg: PublishConfig, verdict: gate.Verdict) -> str:
    """One commit on the Hub, tagged with the run, read back, and recorded in the run's manifest."""
    with (
        alone(run.path, leftovers=".publish.*.tmp"),
        disk_errors(run.path),
        tempfile.TemporaryDirectory(dir=run.path, prefix=".publish.", suffix=".tmp") as folder,
    ):
        files = assemble(run, cfg, verdict, Path(folder), elsewhere=True)
        sent = Publication(cfg, run.id, Path(folder), files)
        found = sent.publish()
        with sent.telling():
            record(run, verdict, target="hub", where=found["url"], **found)
    seen = "private" if found["private"] else "public"
    return f"{found['url']} ({seen}; commit {found['commit'][:12]}; {len(files)} files, each read back)"


def nothing_to_check(cfg: PublishConfig) -> None:
    """The check of a target that needs no settings of its own."""


class PublishTarget(NamedTuple):
    """Somewhere to publish to.

    Args:
        publish: publishes a run that passed the gate, and returns where it is, for the log.
        check: raises ConfigError for missing settings, before the run is read.
    """

    publish: Callable[[runs.Run, PublishConfig, gate.Verdict], str]
    check: Callable[[PublishConfig], None] = nothing_to_check


TARGETS: dict[str, PublishTarget] = {
    "local": PublishTarget(local),
    "hub": PublishTarget(to_hub, hub_settings.check),
}


def record(run: runs.Run, verdict: gate.Verdict, where: str, **facts: Any) -> None:
    """Note in the run's manifest where it was published; an earlier note of the same place gives way."""
    earlier = [each for each in run.manifest.get("published", []) if each["where"] != where]
    note = {"at": runs.now(), "where": where, **facts, "promoted": verdict.promoted, "verdict": verdict.sentence}
    run.update(published=[*earlier, note])


@contextmanager
def alone(folder: Path, leftovers: str) -> Iterator[None]:
    """Be the only process that publishes in `folder`; first remove the `leftovers` of one that was killed.

    Raises: RunError if another one is at it.
    """
    with disk_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is publishing in {folder}", hint="wait for its end") from None
        except OSError:
            log.warning("%s cannot be locked here; start no second publication", folder)
        for left in folder.glob(leftovers):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield
    finally:
        os.close(handle)
