"""The run directory, the only place through which stages exchange results.

outputs/runs/2026-01-15_10-30-45/
  config_used.yaml  manifest.json  data_report.json  logs/  checkpoints/  model/
  metrics.json  evals/<split>.predictions.jsonl  comparison.json
outputs/runs/latest -> the run that was created, resumed or fetched last
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import yaml

from . import MAIN, outcome
from .aliases import current_settings
from .errors import DivergedError, RunError, Stopped, did_you_mean
from .utils import commands, slurm
from .utils.files import disk_errors, read_object, switch_link, write_json, write_text
from .utils.logs import log
from .utils.process_info import launcher_command, launcher_pid

FINISHED, RUNNING, FAILED, INTERRUPTED = "finished", "running", "failed", "interrupted"
CONFIG = "config_used.yaml"
FETCHED = "fetched.json"  # in a run that came from a server, written on arrival
FIGURES = ("train", "eval", "metrics", "conditions", "base_model")  # groups of metrics.json
LOCK = ".lock"
RUN_ID = "ASSAY_RUN_ID"  # environment variable: id of the first run that this command creates
RUN_FILE = "ASSAY_RUN_FILE"  # environment variable: file to write the path of this command's run to
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # differs after each boot
_called: list[str] = []  # the command line that a call in Python stands for
_locks: dict[Path, Any] = {}  # open lock files of the runs that this process writes into


class _WithoutAliases(yaml.SafeLoader):
    """Settings that Assay writes have no aliases, which a few lines of a foreign file can nest without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def read_settings(path: Path, hint: str) -> dict[str, Any]:
    """The content of a config_used.yaml, under the current names of settings.

    Raises: RunError with the remedy `hint` if it is missing or holds no settings.
    """
    try:
        found = current_settings(yaml.load(path.read_text(encoding="utf-8"), _WithoutAliases))
        if not isinstance(found.get("gate") or {}, Mapping):
            raise ValueError("gate is no group of settings")
        return found
    except FileNotFoundError:
        raise RunError(f"{path} does not exist", hint=hint) from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        raise RunError(f"{path} cannot be read as settings", hint=hint) from None


def refuse_code(run: Run, settings: Mapping[str, Any], typed: Container[str]) -> None:
    """Refuse the settings of a run by which code runs that came with it, unless they are `typed`.

    Raises: RunError.
    """
    folder, is_fetched = run.path.resolve().parent, (run.path / FETCHED).exists()
    if is_fetched and settings.get("trust_remote_code") and "trust_remote_code" not in typed:
        raise RunError(
            f"run {run.id} came from a server, and its settings have trust_remote_code=true",
            hint="review the code of its model, then type trust_remote_code=true",
        )
    metrics = settings.get("metrics") or []
    for name in [] if "metrics" in typed else [metrics] if isinstance(metrics, str) else metrics:
        kind, _, where = str(name).partition(":")
        brought = Path(where.partition("?")[0]).resolve().is_relative_to(folder)
        if (kind in {"file", "evaluate"} and brought) or (kind == "evaluate" and is_fetched):
            raise RunError(
                f"run {run.id} names the metric {name}, whose code came with the run",
                hint=f"read that code; metrics='[{name}]' runs it",
            )


@dataclass(frozen=True)
class Run:
    """One run directory. Its state is on disk only, since other processes may read it at any moment."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def word(self) -> str:
        """How a command in this working directory names the run: its id, or its directory elsewhere."""
        here = Path("outputs", "runs").resolve()
        return self.id if self.path.parent.resolve() == here else str(self.path)

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics.json: figures of training, and the scores of the newest evaluation; empty if it is missing."""
        return self._optional("metrics.json", FIGURES)

    @property
    def comparison(self) -> dict[str, Any]:
        """comparison.json: the newest evaluation against its base, with its verdict; empty if it is missing."""
        return self._optional("comparison.json")

    def _optional(self, name: str, groups: Sequence[str] = ()) -> dict[str, Any]:
        path = self.path / name
        return read_object(path, groups) if path.is_file() else {}

    @property
    def manifest(self) -> dict[str, Any]:
        return read_object(self.path / "manifest.json")

    @property
    def settings(self) -> dict[str, Any]:
        """The content of config_used.yaml, under the current names of settings.

        Raises: RunError if it is missing or not a YAML mapping.
        """
        return read_settings(self.path / CONFIG, "restore it, or start a new run")

    @property
    def readable(self) -> bool:
        return self.readable_manifest is not None

    @property
    def readable_manifest(self) -> dict[str, Any] | None:
        """The manifest; None if it cannot be read."""
        try:
            manifest = self.manifest
        except RunError:
            return None
        return manifest if {"started", "stage", "status"} <= manifest.keys() else None

    def update(self, **changes: Any) -> None:
        write_json(self.path / "manifest.json", self.manifest | changes)

    @property
    def status(self) -> str:
        """The current status; `running` becomes `interrupted` if the recorded process no longer exists."""
        return status_of(self.manifest)

    @property
    def status_text(self) -> str:
        """The status, and that of an evaluation that did not finish."""
        return status_text_of(self.manifest)

    def lock(self) -> bool:
        """Make this process the only writer of the run, until `unlock` or its exit.

        The lock is fcntl(2)'s: the kernel releases it however the process ends, and children do not inherit it.
        Returns: False if another process holds the lock.
        """
        if self.path in _locks:
            return True
        with disk_errors(self.path):
            file = (self.path / LOCK).open("a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in {errno.EACCES, errno.EAGAIN}:
                file.close()
                return False
            log.warning("%s: files cannot be locked; do not train this run twice at the same time", self.path)
        _locks[self.path] = file
        return True

    def unlock(self) -> None:
        if self.path in _locks:
            _locks.pop(self.path).close()

    def reopen(self) -> None:
        """Set a run that this process has locked to running; the manifest keeps its earlier attempts."""
        for left in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:  # partial files of a killed process
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        manifest = self.manifest
        earlier = [*manifest.get("attempts", []), {k: manifest.get(k) for k in ("command", "error", "ended")}]
        self.update(
            status=RUNNING, ended=None, error=None, command=command(), process=this_process(), attempts=earlier
        )
        switch_link(self.path.parent / "latest", self.path)
        self._write_run_file()

    def _write_run_file(self) -> None:
        """Write the path of this run to the file that RUN_FILE names, for the caller of the command."""
        outcome.report(run=self.path)
        if file := os.environ.get(RUN_FILE):
            write_text(Path(file), f"{self.path.absolute()}\n")

    @contextmanager
    def record_status(self, part: str | None = None) -> Iterator[Run]:
        """Record in the manifest how the body of the `with` statement ended: finished, interrupted or failed.

        `part` names work that is added to an existing run, such as `evaluation`. It has its own record, and the
        run's status does not change.
        """

        def record(**changes: Any) -> None:
            self.update(**({part: self.manifest.get(part, {}) | changes} if part else changes))

        if part:
            record(
                status=RUNNING,
                started=now(),
                ended=None,
                error=None,
                command=command(),
                process=this_process(),
            )
            self._write_run_file()
        try:
            with disk_errors(self.path):
                yield self
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit | Stopped)
            reason = f"{type(error).__name__}: {error}"
            if stopped:
                reason = error.problems[0] if isinstance(error, Stopped) else "stopped by the user"
            extra = {"resumable": False} if isinstance(error, DivergedError) else {}
            try:
                record(status=INTERRUPTED if stopped else FAILED, error=reason, ended=now(), **extra)
            except RunError as full:  # the disk is full: once this process has exited, it counts as interrupted
                log.error("%s", full)
            raise
        else:
            record(status=FINISHED, ended=now())
        finally:
            if not part:
                self.unlock()


def create(output_dir: str | Path, stage: str, config_yaml: str, facts: Mapping[str, Any]) -> Run:
    """Create a run directory, locked by this process, and switch `latest` to it once its manifest exists.

    Its name is the requested id or the current time; a suffix makes it unique.
    Raises: RunError if the directory cannot be written, or the requested id is invalid.
    """
    root = Path(output_dir) / "runs"
    run = Run(new_folder(root, requested_run_id()))
    run.lock()
    write_text(run.path / CONFIG, config_yaml)
    run.logs.mkdir()
    write_json(
        run.path / "manifest.json",
        {
            "run": run.id,
            "stage": stage,
            "status": RUNNING,
            "started": now(),
            "ended": None,
            "command": command(),
            "process": this_process(),
            **facts,
        },
    )
    switch_link(root / "latest", run.path)
    run._write_run_file()
    return run


def requested_run_id() -> str | None:
    """The id that ASSAY_RUN_ID requests for the first run of this process; None for later runs.

    Raises: RunError if it is not a valid name of a folder.
    """
    name = os.environ.pop(RUN_ID, None)
    if name and (name == "latest" or not re.fullmatch(r"\w[\w.-]*", name)):
        raise RunError(f"{RUN_ID}={name} is not a valid run id", hint="use letters, digits, '.', '_' and '-'")
    return name or None


def new_folder(root: Path, name: str | None = None) -> Path:
    """Create a folder in `root`, named `name` or by the current time, with a suffix if the name is in use."""
    name = name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ["", *(f"-{n}" for n in range(2, 1000))]:
        path = root / (name + suffix)
        try:
            with disk_errors(path):
                path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise RunError(f"{root} has a thousand folders named {name}")


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command() -> list[str]:
    """The command line of this process, of its launcher or of the call in Python, as the user typed it."""
    if typed := launcher_command() or _called:
        return list(typed)
    words = sys.orig_argv
    script = next((i for i, word in enumerate(words[:3]) if Path(word).name == "assay"), None)
    if script is not None:
        return ["assay", *words[script + 1 :]]
    return ["python", "-m", *words[words.index(MAIN) :]] if MAIN in words else list(words)


@contextmanager
def called_as(words: Sequence[str]) -> Iterator[None]:
    """Within the `with` statement, this process does what the command line `words` does."""
    _called[:] = words
    try:
        yield
    finally:
        _called.clear()


def status_of(record: Mapping[str, Any]) -> str:
    """The status in a record; `running` becomes `interrupted` if the recorded process no longer exists."""
    if record["status"] == RUNNING and not _is_alive(record["process"]):
        return INTERRUPTED
    return str(record["status"])


def status_text_of(manifest: Mapping[str, Any]) -> str:
    """The status in a manifest, and that of an evaluation that did not finish."""
    evaluation = status_of(manifest["evaluation"]) if "evaluation" in manifest else FINISHED
    return status_of(manifest) + ("" if evaluation == FINISHED else f", evaluation {evaluation}")


def this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "boot_id": boot_id(),
        "launcher": launcher_pid(),
        "slurm": slurm.current_job(),
    }


def boot_id() -> str | None:
    """The kernel's id of the current boot; None where the system has none."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return None


def _is_alive(process: Mapping[str, Any]) -> bool:
    """Whether the recorded process still runs. On another host that is assumed, unless Slurm reports its end."""
    is_local = process["host"] == socket.gethostname()
    if slurm.has_ended(process.get("slurm"), is_local):
        return False
    if not is_local:
        return True
    if process.get("boot_id") not in (None, boot_id()):  # the system has been restarted since
        return False
    try:
        found = psutil.Process(process["pid"])
        same = abs(found.create_time() - process["created"]) < 1  # pids are reused, start times are not
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_writable(path: str | Path, setting: str = "output_dir") -> None:
    """Raises: RunError if files cannot be written below `path`, the value of `setting`. Creates nothing."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise RunError(f"{setting} {path}: {folder} is not a folder", hint=f"choose another {setting}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"{setting} {path}: {folder} is read-only", hint=f"choose another {setting}")


def all_runs(output_dir: str | Path) -> list[Run]:
    """All runs with a readable manifest, the latest start first."""
    started = {run: manifest["started"] for run in run_dirs(output_dir) if (manifest := run.readable_manifest)}
    return sorted(started, key=lambda run: (started[run], len(run.id), run.id), reverse=True)


def training_runs(output_dir: str | Path) -> list[Run]:
    """All training runs, the newest first."""
    return [run for run in newest_first(output_dir) if run.manifest["stage"] == "train"]


def run_dirs(output_dir: str | Path) -> list[Run]:
    """All folders with a manifest, readable or not, in no order."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(Path(output_dir) / "runs") as entries:
        return [
            Run(Path(entry.path))
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and os.path.exists(os.path.join(entry.path, "manifest.json"))
        ]
    return []


def newest_first(output_dir: str | Path) -> list[Run]:
    """All readable runs, the one that `latest` points to first, then the latest start.

    A run that was resumed or fetched last is the newest, although others may have started after it.
    """
    latest = (Path(output_dir) / "runs" / "latest").resolve().name
    return sorted(all_runs(output_dir), key=lambda run: run.id != latest)


def newest(output_dir: str | Path) -> Run:
    """The newest run, whatever its status. Raises: RunError if no run exists."""
    for run in newest_first(output_dir):
        return run
    raise RunError(f"no runs in {output_dir}/runs", hint=f"{commands.command('train')} makes one")


def newest_finished(output_dir: str | Path) -> Run:
    """The newest finished run with a model.

    Raises: RunError if no run qualifies; it names the newest unfinished run.
    """
    runs = newest_first(output_dir)
    for run in runs:
        if run.status == FINISHED and run.model.is_dir():
            return run
    other = f"; the newest, {runs[0].id}, is {runs[0].status}" if runs else ""
    raise RunError(f"no finished run in {output_dir}/runs{other}", hint=f"{commands.command('train')} makes one")


def find_model(path: str | None, output_dir: str | Path) -> tuple[Path, Run | None]:
    """Resolve `path` to a model folder, and to its run if the model belongs to one.

    `path` is a run as `find_run` takes it, a model folder (with weights), or None for the newest finished run.
    Raises: RunError if it has no model.
    """
    if path is None:
        run = newest_finished(output_dir)
        return run.model, run
    folder = Path(path)
    if not folder.exists():
        if len(folder.parts) > 1:
            raise RunError(f"{path} does not exist", hint="give a run, its directory, or a folder with a model")
        folder = find_run(path, output_dir).path
    resolved = folder.resolve()
    run = Run(resolved.parent if resolved.name == "model" else resolved)
    if not (run.path / "manifest.json").is_file():
        if run.path == resolved and (run.path / CONFIG).is_file():
            raise RunError(f"{path} has no manifest.json", hint=f"restore it, or give {path}/model")
        return folder, None  # a model without a run, such as a downloaded one
    if "process" not in run.manifest:
        return folder, None  # a published model
    if not run.model.is_dir():
        found = "was removed" if run.status == FINISHED else f"does not exist: the run is {run.status}"
        raise RunError(f"the model of run {run.id} {found}", hint="give another run")
    return run.model, run


def find_training(word: str, output_dir: str | Path) -> Run:
    """The run to resume: the newest training run for `latest`, otherwise as `find_run`.

    Raises: RunError if no run matches, or several do.
    """
    if word != "latest":
        return find_run(word, output_dir)
    found = training_runs(output_dir)
    if not found:
        raise RunError(f"there is no training run in {output_dir}/runs", hint="set resume=never")
    return found[0]


def find_run(word: str, output_dir: str | Path) -> Run:
    """The run that `word` names by its directory, its id, its run_name, a prefix of its id, or `latest`.

    Raises: RunError if no run matches, or several do.
    """
    known = {run.id: run for run in all_runs(output_dir)}
    for path in (Path(output_dir) / "runs" / word, Path(word)):
        if (path / "manifest.json").is_file() and Run(path.resolve()).readable:
            return Run(path.resolve())
        if (path / "manifest.json").is_file() or (path / CONFIG).is_file():
            raise RunError(f"{path} has no readable manifest.json", hint="restore it, or start a new run")
    if word == "latest":  # a dangling link
        return newest(output_dir)
    named = [run for run in known.values() if run.manifest.get("run_name") == word]
    if len(named) > 1:
        raise RunError(f"{word} is the name of {len(named)} runs: {', '.join(run.id for run in named[:5])}")
    matches = [run.id for run in named] or [name for name in known if name.startswith(word)]
    if len(matches) == 1:
        return known[matches[0]]
    if matches:
        more = " ..." if len(matches) > 5 else ""
        raise RunError(f"{word} is a prefix of {len(matches)} runs: {', '.join(matches[:5])}{more}")
    guess = did_you_mean(word, known) or f"; {commands.command('runs')} lists them"
    raise RunError(f"there is no run {word} in {output_dir}/runs{guess}")
