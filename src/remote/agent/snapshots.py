"""Snapshots of the pushed code: each job runs from one, which no later push changes; unused ones are removed.

REMOTE_DIR/outputs/remote/code/<digest>/
  src/, configs/ ...  the pushed files
  src/code.json       commit and diff hash of the code; a flock(2) on it protects the snapshot from removal
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import shutil
import subprocess
import uuid
from typing import Any

from . import fs, jobs
from .bootstrap import AgentError

CODE = "outputs/remote/code"
STATE = "src/code.json"
KEEP = 5  # of the snapshots used last, whether or not they are in use
SQUEUE_TIMEOUT_S = 10.0


def create(folder: str, code: dict[str, Any]) -> str:
    """The folder of the snapshot of the pushed code, created if missing; missing files are copied again.

    Args:
        code: `{"digest", "files": {path: sha256}, "state"}`: the snapshot's name, its files, and the content of
            src/code.json.
    Raises: AgentError if the files on the server are not that code.
    """
    project = fs.root(folder)
    target = os.path.join(project, CODE, code["digest"])
    if os.path.isdir(target):
        _copy_missing(target, project, code)
        return target
    temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        _copy_missing(temporary, project, code)
        os.rename(temporary, target)
    except OSError:
        if not os.path.isdir(target):  # no other process has created it meanwhile
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _copy_missing(snapshot: str, project: str, code: dict[str, Any]) -> None:
    for path, digest in code["files"].items():
        new = os.path.join(snapshot, path)
        if os.path.isfile(new):
            continue
        os.makedirs(os.path.dirname(new), exist_ok=True)
        try:
            shutil.copyfile(os.path.join(project, path), f"{new}.tmp")
        except FileNotFoundError:
            raise AgentError(f"{path} is not on the server", "push again") from None
        if fs.sha256(f"{new}.tmp") != digest:
            raise AgentError(
                f"{path} on the server differs from the pushed file: another push has changed it", "push again"
            )
        os.replace(f"{new}.tmp", new)
    if not os.path.isfile(os.path.join(snapshot, STATE)):
        fs.write_text(os.path.join(snapshot, STATE), json.dumps(code["state"]))


def lock(snapshot: str) -> int:
    """Protect a snapshot from removal while any process has the returned file descriptor open.

    The supervisor of a job inherits it: this process may end before the job's record is written.
    """
    held = os.open(os.path.join(snapshot, STATE), os.O_RDONLY)
    with contextlib.suppress(OSError):  # on a file system without locks no snapshot is removed
        fcntl.flock(held, fcntl.LOCK_SH)
        os.utime(snapshot)
    return held


def prune(root: str) -> None:
    """Remove all snapshots except the KEEP used last, those in use, and locked ones.

    The caller holds the lock of the project folder, so that no other process chooses a snapshot meanwhile.
    """
    with contextlib.suppress(OSError):  # a snapshot that cannot be removed stays
        home = os.path.join(root, CODE)
        found = sorted(os.scandir(home), key=lambda entry: entry.stat().st_mtime, reverse=True)
        for entry in found:
            if entry.name.endswith(".tmp"):  # left by a killed process
                shutil.rmtree(entry.path, ignore_errors=True)
        old = [entry for entry in found if not entry.name.endswith(".tmp")][KEEP:]
        in_use = _in_use(root) if old else set()
        for entry in old:
            if entry.name not in in_use:
                _remove(entry.path)


def _remove(snapshot: str) -> None:
    temporary = f"{snapshot}.{uuid.uuid4().hex[:8]}.tmp"
    with contextlib.suppress(OSError):  # it is locked, or the file system has no locks
        with open(os.path.join(snapshot, STATE), "r+") as state:
            fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(snapshot, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def _in_use(root: str) -> set[str]:
    """The snapshots of jobs and runs that have not finished, and of jobs that wait in Slurm."""
    found, submitted = set(), []
    for job in jobs.list_jobs(root):
        done = job["status"] in ("ended", "interrupted") and job["run_status"] not in ("running", "interrupted")
        if done:
            submitted += [(id.split("_")[0], job["snapshot"]) for id in jobs.slurm_ids(root, job["id"])]
        else:
            found.add(job["snapshot"])
    queued = _queued_in_slurm() if submitted else set()
    return found | {snapshot for id, snapshot in submitted if queued is None or id in queued}


def _queued_in_slurm() -> set[str] | None:
    """The ids of this user's jobs that wait or run in Slurm; None if squeue fails."""
    command = ["squeue", "--noheader", "--format=%F", f"--user={getpass.getuser()}"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SQUEUE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return set(done.stdout.decode().split()) if done.returncode == 0 else None
