"""The run directory: the memory of the pipeline. Stages meet here and nowhere else.

outputs/runs/2026-01-15_10-30-45/
  config_used.yaml  manifest.json  data_report.json  logs/  checkpoints/  model/
  metrics.json  evals/<split>.predictions.jsonl  comparison.json
outputs/runs/latest -> the newest run: made, gone on with or fetched last
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import yaml

from src.aliases import current_settings
from src.errors import DivergedError, RunError, Stopped, did_you_mean
from src.utils import slurm
from src.utils.files import disk_errors, read_json, switch_link, write_json, write_text
from src.utils.logs import log
from src.utils.process_info import launcher_command, launcher_pid

FINISHED, RUNNING, FAILED, INTERRUPTED = "finished", "running", "failed", "interrupted"
LOCK = ".lock"
RUN_ID = "ASSAY_RUN_ID"  # the environment's name for the first run that this command makes
RUN_FILE = "ASSAY_RUN_FILE"  # a file that is told which run this command works in
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # another after each start of the system
_held: dict[Path, Any] = {}  # the lock files of the runs that this process writes into


@dataclass(frozen=True)
class Run:
    """One run directory. Its truth is on disk: another process may read it at any moment."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

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
    def manifest(self) -> dict[str, Any]:
        return dict(read_json(self.path / "manifest.json"))

    @property
    def settings(self) -> dict[str, Any]:
        """Its config_used.yaml with today's names. Raises: RunError if that is missing or cannot be read."""
        path = self.path / "config_used.yaml"
        try:
            return current_settings(yaml.safe_load(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise RunError(f"{path} does not exist", hint="restore it or make a new run") from None
        except (ValueError, TypeError, AttributeError, yaml.YAMLError):
            raise RunError(f"{path} cannot be read as settings", hint="restore it or make a new run") from None

    @property
    def readable(self) -> bool:
        try:
            return {"started", "stage", "status"} <= self.manifest.keys()
        except RunError:
            return False

    def update(self, **changes: Any) -> None:
        write_json(self.path / "manifest.json", self.manifest | changes)

    @property
    def status(self) -> str:
        """What the run is now: a `running` whose process is gone was interrupted."""
        return status_of(self.manifest)

    @property
    def status_in_words(self) -> str:
        """The status, and that of the evaluation where it did not finish."""
        manifest = self.manifest
        evaluation = status_of(manifest["evaluation"]) if "evaluation" in manifest else FINISHED
        return status_of(manifest) + ("" if evaluation == FINISHED else f", evaluation {evaluation}")

    def hold(self) -> bool:
        """Make this process the only one that writes into the run, until `release` or its end.

        Returns: False if another process does. The lock is one of fcntl(2): it ends with its process, however
        that ends, and no child inherits it.
        """
        if self.path in _held:
            return True
        with disk_errors(self.path):
            file = (self.path / LOCK).open("a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in {errno.EACCES, errno.EAGAIN}:
                file.close()
                return False
            log.warning("%s: files cannot be locked here; start no second training of this run", self.path)
        _held[self.path] = file
        return True

    def release(self) -> None:
        if self.path in _held:
            _held.pop(self.path).close()

    def reopen(self) -> None:
        """Take up a held run that ended before its time; its earlier commands stay in the manifest."""
        for left in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:  # what a killed process was writing
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)  # gone with its folder
        manifest = self.manifest
        earlier = [*manifest.get("attempts", []), {k: manifest.get(k) for k in ("command", "error", "ended")}]
        self.update(
            status=RUNNING, ended=None, error=None, command=command(), process=this_process(), attempts=earlier
        )
        switch_link(self.path.parent / "latest", self.path)
        self._tell()

    def _tell(self) -> None:
        """Write the path of this run where whoever started the command looks for it."""
        if file := os.environ.get(RUN_FILE):
            write_text(Path(file), f"{self.path.absolute()}\n")

    @contextmanager
    def recorded(self, part: str | None = None) -> Iterator[Run]:
        """Record how the work inside ended: finished, or failed with its error.

        `part` names work added to a run that is there already, such as its evaluation; it has a record of
        its own in the manifest, and leaves the run's status alone.
        """

        def note(**changes: Any) -> None:
            self.update(**({part: self.manifest.get(part, {}) | changes} if part else changes))

        if part:
            note(
                status=RUNNING,
                started=now(),
                ended=None,
                error=None,
                command=command(),
                process=this_process(),
            )
            self._tell()
        try:
            with disk_errors(self.path):
                yield self
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit | Stopped)
            reason = f"{type(error).__name__}: {error}"
            if stopped:
                reason = error.problems[0] if isinstance(error, Stopped) else "stopped by the user"
            again = {"resumable": False} if isinstance(error, DivergedError) else {}
            try:
                note(status=INTERRUPTED if stopped else FAILED, error=reason, ended=now(), **again)
            except RunError as full:  # the manifest still says running, of a process that is gone soon
                log.error("%s", full)
            raise
        else:
            note(status=FINISHED, ended=now())
        finally:
            if not part:
                self.release()


def create(output_dir: str | Path, stage: str, config_yaml: str, facts: Mapping[str, Any]) -> Run:
    """Make a new run directory, held by this process, and point `latest` to it.

    It is named by the time, or as the environment wishes. Two runs started in the same second get two
    directories. `latest` is switched last, to a directory that already says what it is.
    Raises: RunError if nothing can be written there, or the name that is wished for is none.
    """
    root = Path(output_dir) / "runs"
    run = Run(new_folder(root, wished()))
    run.hold()
    write_text(run.path / "config_used.yaml", config_yaml)
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
    run._tell()
    return run


def wished() -> str | None:
    """The name that the environment has for a run. It is given once: those after it are named by the time.

    Raises: RunError if no folder can have it.
    """
    name = os.environ.pop(RUN_ID, None)
    if name and (name == "latest" or not re.fullmatch(r"\w[\w.-]*", name)):
        raise RunError(f"{RUN_ID}={name} is no name for a run", hint="use letters, digits, '.', '_' and '-'")
    return name or None


def new_folder(root: Path, name: str | None = None) -> Path:
    """A new folder in `root`, named by the time unless it has a name; two of the same name get two."""
    name = name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ["", *(f"-{n}" for n in range(2, 1000))]:
        path = root / (name + suffix)
        try:
            with disk_errors(path):
                path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise RunError(f"{root} holds a thousand folders named {name}")


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command() -> list[str]:
    """The command line of this process or of its launcher, from the door on."""
    if typed := launcher_command():
        return typed
    words = sys.orig_argv
    return ["python", "-m", *words[words.index("src.main") :]] if "src.main" in words else list(words)


def status_of(record: Mapping[str, Any]) -> str:
    """The status that a record claims: a `running` whose process is gone was interrupted."""
    if record["status"] == RUNNING and not _alive(record["process"]):
        return INTERRUPTED
    return str(record["status"])


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
    """What tells this start of the system from every other, None where the system does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return None


def _alive(process: Mapping[str, Any]) -> bool:
    """Whether the recorded process still runs. On another host only Slurm can tell, or else it is believed."""
    here = process["host"] == socket.gethostname()
    if slurm.has_ended(process.get("slurm"), here):
        return False
    if not here:
        return True
    if process.get("boot_id") not in (None, boot_id()):  # the system went down with it
        return False
    try:
        found = psutil.Process(process["pid"])
        same = abs(found.create_time() - process["created"]) < 1  # a pid is reused, a start time is not
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_writable(place: str | Path, setting: str = "output_dir") -> None:
    """Raises: RunError if nothing could be written in a folder that `setting` names. Makes nothing."""
    folder = Path(place).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise RunError(f"{setting} {place}: {folder} is not a folder", hint=f"choose another {setting}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"{setting} {place}: {folder} is read-only", hint=f"choose another {setting}")


def all_runs(output_dir: str | Path) -> list[Run]:
    """Every run directory with a manifest that can be read, the one that started last first."""
    runs = [run for run in _folders(output_dir) if run.readable]
    return sorted(runs, key=lambda r: (r.manifest["started"], len(r.id), r.id), reverse=True)


def trainings(output_dir: str | Path) -> list[Run]:
    """The runs that are trainings, the newest first."""
    return [run for run in newest_first(output_dir) if run.manifest["stage"] == "train"]


def unreadable(output_dir: str | Path) -> list[Run]:
    """Every run directory whose manifest cannot be read."""
    return [run for run in _folders(output_dir) if not run.readable]


def _folders(output_dir: str | Path) -> list[Run]:
    found = (p.parent for p in (Path(output_dir) / "runs").glob("*/manifest.json"))
    return [Run(p) for p in found if not p.is_symlink()]


def newest_first(output_dir: str | Path) -> list[Run]:
    """Every run that can be read, the one that `latest` points to before the others.

    What is gone on with, or fetched from elsewhere, is the newest although it started before others.
    """
    latest = (Path(output_dir) / "runs" / "latest").resolve().name
    return sorted(all_runs(output_dir), key=lambda run: run.id != latest)


def newest(output_dir: str | Path) -> Run:
    """The newest run, in whatever state. Raises: RunError if there is none."""
    for run in newest_first(output_dir):
        return run
    raise RunError(f"no runs in {output_dir}/runs", hint="make train makes one")


def newest_finished(output_dir: str | Path) -> Run:
    """The newest run that finished and holds a model.

    Raises: RunError if there is none, naming the newest unfinished one.
    """
    runs = newest_first(output_dir)
    for run in runs:
        if run.status == FINISHED and run.model.is_dir():
            return run
    other = f"; the newest, {runs[0].id}, is {runs[0].status}" if runs else ""
    raise RunError(f"no finished run in {output_dir}/runs{other}", hint="make train makes one")


def find(path: str | None, output_dir: str | Path) -> tuple[Path, Run | None]:
    """The model folder that `path` means, and the run that it belongs to, if any.

    `path` is a run as in `named`, a model folder (with weights), or None for the newest finished run.
    Raises: RunError if there is no model there.
    """
    if path is None:
        run = newest_finished(output_dir)
        return run.model, run
    folder = Path(path)
    if not folder.exists():
        if len(folder.parts) > 1:
            raise RunError(f"{path} does not exist", hint="give a run, its directory, or a folder with a model")
        folder = named(path, output_dir).path
    resolved = folder.resolve()
    run = Run(resolved.parent if resolved.name == "model" else resolved)
    if not (run.path / "manifest.json").is_file():
        if run.path == resolved and (run.path / "config_used.yaml").is_file():
            raise RunError(f"{path} has no manifest.json", hint=f"restore it, or give {path}/model alone")
        return folder, None  # a model of its own: downloaded
    if "process" not in run.manifest:
        return folder, None  # published
    if not run.model.is_dir():
        found = "is gone, though it finished" if run.status == FINISHED else f"is not there: it is {run.status}"
        raise RunError(f"the model of run {run.id} {found}", hint="give another run")
    return run.model, run


def training(word: str, output_dir: str | Path) -> Run:
    """The run that a training is to go on with: the newest training for `latest`, else see `named`.

    Raises: RunError if there is none, or several.
    """
    if word != "latest":
        return named(word, output_dir)
    found = trainings(output_dir)
    if not found:
        raise RunError(f"there is no run in {output_dir}/runs", hint="set resume=never")
    return found[0]


def named(word: str, output_dir: str | Path) -> Run:
    """The run that `word` means: its directory, its id, the beginning of one, or `latest`.

    Raises: RunError if there is none, or several.
    """
    known = {run.id: run for run in all_runs(output_dir)}
    for path in (Path(output_dir) / "runs" / word, Path(word)):
        if (path / "manifest.json").is_file() and Run(path.resolve()).readable:
            return Run(path.resolve())
        if (path / "manifest.json").is_file() or (path / "config_used.yaml").is_file():
            raise RunError(f"{path} has no manifest.json that can be read", hint="restore it or make a new run")
    if word == "latest":  # it points to nothing any more
        return newest(output_dir)
    fitting = [name for name in known if name.startswith(word)]
    if len(fitting) == 1:
        return known[fitting[0]]
    if fitting:
        raise RunError(f"{word} is the beginning of {len(fitting)} runs: {', '.join(fitting[:5])}")
    guess = did_you_mean(word, known) or "; make runs lists them"
    raise RunError(f"there is no run {word} in {output_dir}/runs{guess}")
