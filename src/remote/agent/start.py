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
RESERVED = "exit.json.reserved"  # becomes exit.json
RESERVED_BYTES = 4096
RETRY_S, GIVE_UP_S = 0.5, 10.0  # attempts to write the exit record without reserved space
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
    recorded. The space of its exit code is reserved before, so that a full disk does not hide its end.
    """
    place = jobs.job_dir(root, job["id"])
    _reserve(os.path.join(place, RESERVED))
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
        _write_exit(place, {"code": code, "ended": time.time(), "disk_full": jobs.is_full(place)})


def _reserve(path: str) -> None:
    with contextlib.suppress(FileExistsError), open(path, "xb") as file:
        file.write(b" " * RESERVED_BYTES)
        file.flush()
        os.fsync(file.fileno())


def _write_exit(place: str, result: dict[str, Any]) -> None:
    """Write how a job ended, into the reserved space, which some file systems do not overwrite in place.

    A job whose exit code cannot be written counts as interrupted once this process has ended.
    """
    reserved, path = os.path.join(place, RESERVED), os.path.join(place, "exit.json")
    text = json.dumps(result)
    with contextlib.suppress(OSError), open(reserved, "r+b") as file:
        file.write(text.encode())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        os.replace(reserved, path)
        return
    with contextlib.suppress(OSError):
        os.unlink(reserved)
    end = time.monotonic() + GIVE_UP_S
    while True:
        try:
            fs.write_text(path, text)
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > end:
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
