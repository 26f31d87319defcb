"""Starts a job exactly once, in a process that outlives the connection."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import subprocess
import time
from typing import Any

from . import bootstrap, fs, jobs, snapshots, venv
from .bootstrap import AgentError

CACHE = ".cache"
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
}
RETRY_S = 1.0  # between two attempts to write to a full disk
MAX_TMPDIR = 60  # characters: a socket's path has at most 108 bytes, and multiprocessing needs the rest


def start(folder: str, job: jobs.Job, environment: dict[str, str], code: dict[str, Any] | None) -> jobs.Job:
    """Start `job` unless a job with its id exists.

    Args:
        job: `{"id", "stage", "words", "argv"}`.
        environment: variables that the job gets in addition to the session's.
        code: what it runs from, see snapshots.create; None for the project folder itself.
    Returns: the job as jobs.get_job returns it, and in `existed` whether it existed before.
    Raises: AgentError if the folder cannot be created, or the job's environment is missing.
    """
    root = fs.root(folder)
    place = jobs.job_dir(root, job["id"])
    try:
        os.makedirs(place, exist_ok=True)
    except FileNotFoundError:  # such as below /proc
        raise AgentError(f"{root} cannot be created on the server", bootstrap.NOT_WRITABLE) from None
    with open(os.path.join(root, jobs.HOME, ".lock"), "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # released when this process ends; child processes do not inherit it
        if os.path.exists(os.path.join(place, "job.json")):
            return dict(jobs.get_job(root, job["id"]), existed=True)
        try:
            if not os.path.isabs(job["argv"][0]):  # the installer, which creates .venv, has an absolute path
                venv.check(root)
            snapshot = snapshots.create(root, code) if code else None
            held = [snapshots.lock(snapshot)] if snapshot else []
            args = {"root": root, "job": job, "environment": environment, "snapshot": snapshot}
            bootstrap.run_detached("start:supervise", held, **args)
            snapshots.prune(root)
        except AgentError:
            with contextlib.suppress(OSError):
                os.rmdir(place)  # not empty if an earlier attempt, slow and given up, has written to it
            raise
    return dict(jobs.get_job(root, job["id"]), existed=False)


def supervise(root: str, job: jobs.Job, environment: dict[str, str], snapshot: str | None) -> None:
    """Start the process of a job, wait until it ends, and write its exit code.

    The process leads a session of its own. It waits until its record is on disk, so that every job that runs is
    recorded.
    """
    place = jobs.job_dir(root, job["id"])
    argv = [os.path.join(root, job["argv"][0]), *job["argv"][1:]]
    with open(os.path.join(place, "log"), "ab") as log:
        child = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "sh", *argv],
            cwd=root,
            env=_job_environment(root, place, job, environment, snapshot),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    record = {key: job[key] for key in ("id", "stage", "words")}
    record.update(
        pid=child.pid,
        ticks=jobs.start_ticks(child.pid),
        supervisor=[os.getpid(), jobs.start_ticks(os.getpid())],
        boot_id=jobs.boot_id(),
        host=socket.gethostname(),
        started=time.time(),
        snapshot=os.path.basename(snapshot) if snapshot else None,
    )
    # The client may have given up waiting, and its second request may have started the job by now.
    is_first = fs.write_text(os.path.join(place, "job.json"), json.dumps(record), exclusive=True)
    assert child.stdin
    if is_first:
        child.stdin.write(b"\n")
    child.stdin.close()  # without a line on its input the process ends
    bootstrap.detach()
    code = child.wait()
    if is_first:
        _write_exit(os.path.join(place, "exit.json"), {"code": code, "ended": time.time()})


def _write_exit(path: str, result: dict[str, Any]) -> None:
    """Write how a job ended; on a full disk wait until there is space."""
    while True:
        try:
            fs.write_text(path, json.dumps(result))
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        time.sleep(RETRY_S)


def _job_environment(
    root: str, place: str, job: jobs.Job, environment: dict[str, str], snapshot: str | None
) -> dict[str, str]:
    """The variables of a job. All caches and temporary files are in the project folder."""
    found = {k: v for k, v in os.environ.items() if not k.startswith("SSH_")}
    cache = os.path.join(root, CACHE)
    found.setdefault("HF_HOME", os.path.join(cache, "huggingface"))
    found["XDG_CACHE_HOME"] = cache
    temporary = os.path.join(cache, "tmp")
    if len(temporary) <= MAX_TMPDIR:
        os.makedirs(temporary, exist_ok=True)
        found["TMPDIR"] = temporary
    found.update({name: os.path.join(cache, folder) for name, folder in CACHES.items()})
    found.update(environment)
    found.update(PYTHONUNBUFFERED="1", PYTHONUTF8="1")
    found.update(ASSAY_RUN_ID=job["id"], ASSAY_RUN_FILE=os.path.join(place, "run"))
    if snapshot:
        found.update(PYTHONPATH=snapshot, PYTHONSAFEPATH="1")
    return found
