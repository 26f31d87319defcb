"""The code that runs are made of: a snapshot of each state of it, which no push changes, until nobody needs it.

REMOTE_DIR/outputs/remote/code/<digest>/
  src/, configs/ ...  what was pushed
  src/code.json       what git says of it; flock(2) on it holds the snapshot
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

from src.remote.agent import fs, jobs
from src.remote.agent.protocol import AgentError

CODE = "outputs/remote/code"
STATE = "src/code.json"
KEPT = 5  # that were chosen last, whether or not somebody needs them
ANSWERS = 10.0  # seconds within which Slurm says what waits


def take(folder: str, code: dict[str, Any]) -> str:
    """The snapshot of the code that was pushed, made if it is not there, and what of it somebody has removed.

    `code` is `{"digest", "files": {path: sha256}, "state"}`: the name of the snapshot, what it holds, and what git
    says of it.
    Returns: the folder.
    Raises: Refused if what is there is not that code.
    """
    project = fs.root(folder)
    target = os.path.join(project, CODE, code["digest"])
    if os.path.isdir(target):
        _fill(target, project, code)
        return target
    temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        _fill(temporary, project, code)
        os.rename(temporary, target)
    except OSError:
        if not os.path.isdir(target):  # else another has just made it
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _fill(snapshot: str, project: str, code: dict[str, Any]) -> None:
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
            raise AgentError(f"{path} is another there than here: somebody else pushed", "push again")
        os.replace(f"{new}.tmp", new)
    if not os.path.isfile(os.path.join(snapshot, STATE)):
        fs.write(os.path.join(snapshot, STATE), json.dumps(code["state"]))


def hold(snapshot: str) -> int:
    """Keep a snapshot that was just chosen, while there is a process that has open what is returned.

    Who chose it may be gone before what it has started is recorded; that one inherits this, and needs no clock.
    """
    held = os.open(os.path.join(snapshot, STATE), os.O_RDONLY)
    with contextlib.suppress(OSError):  # of a file system without locks: there nothing is removed
        fcntl.flock(held, fcntl.LOCK_SH)
        os.utime(snapshot)
    return held


def prune(root: str) -> None:
    """Remove all but the snapshots that were chosen last, and those that are needed or held.

    The caller has the lock of the project's folder: nobody chooses one meanwhile.
    """
    with contextlib.suppress(OSError):  # what cannot be removed stays
        home = os.path.join(root, CODE)
        found = sorted(os.scandir(home), key=lambda entry: entry.stat().st_mtime, reverse=True)
        for entry in found:
            if entry.name.endswith(".tmp"):  # of somebody who was killed
                shutil.rmtree(entry.path, ignore_errors=True)
        old = [entry for entry in found if not entry.name.endswith(".tmp")][KEPT:]
        needed = _needed(root) if old else set()
        for entry in old:
            if entry.name not in needed:
                _remove(entry.path)


def _remove(snapshot: str) -> None:
    temporary = f"{snapshot}.{uuid.uuid4().hex[:8]}.tmp"
    with contextlib.suppress(OSError):  # it is held, or that cannot be known
        with open(os.path.join(snapshot, STATE), "r+") as state:
            fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(snapshot, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def _needed(root: str) -> set[str]:
    """The snapshots of jobs and runs that have not ended for good, and of what waits in Slurm."""
    found, submitted = set(), []
    for job in jobs.known(root):
        over = job["status"] in ("ended", "interrupted") and job["run_status"] not in ("running", "interrupted")
        if over:
            submitted += [(id.split("_")[0], job["snapshot"]) for id in jobs.submitted(root, job["id"])]
        else:
            found.add(job["snapshot"])
    waiting = _waiting() if submitted else set()
    return found | {snapshot for id, snapshot in submitted if waiting is None or id in waiting}


def _waiting() -> set[str] | None:
    """The ids of this user's jobs that wait or run in Slurm; None where it does not say."""
    asked = ["squeue", "--noheader", "--format=%F", f"--user={getpass.getuser()}"]
    try:
        done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWERS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return set(done.stdout.decode().split()) if done.returncode == 0 else None
