"""A job is started, once, apart from the connection that asked for it."""

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

from src.remote.agent import daemonize, fs, jobs, snapshots, venv
from src.remote.agent.protocol import AgentError

CACHE = ".cache"
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
}
ROOM = 1.0  # seconds between two looks whether a full disk has some
LONGEST_TMP = 60  # of a socket's path, 108 bytes, multiprocessing needs the rest


def start(folder: str, job: jobs.Job, environment: dict[str, str], code: dict[str, Any] | None) -> jobs.Job:
    """Start `job` unless its id is there already, apart from this connection.

    `job` is `{"id", "stage", "words", "argv"}`, `environment` what it gets besides; `code` what it runs from:
    see snapshots.take.
    Returns: its record, as `look` gives it, and in `again` whether it was there before.
    """
    root = fs.root(folder)
    place = jobs.place_of(root, job["id"])
    try:
        os.makedirs(place, exist_ok=True)
    except FileNotFoundError:  # as below /proc
        raise AgentError(
            f"{root} cannot be made", "REMOTE_DIR must be a folder that REMOTE_USER may write to"
        ) from None
    with open(os.path.join(root, jobs.HOME, ".lock"), "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # ends with this process, however that ends; no child inherits it
        if os.path.exists(os.path.join(place, "job.json")):
            return dict(jobs.look(root, job["id"]), again=True)
        try:
            _ready(root, job)
            snapshot = snapshots.take(root, code) if code else None
            held = [snapshots.hold(snapshot)] if snapshot else []
            daemonize.call("start:supervise", held, root=root, job=job, environment=environment, snapshot=snapshot)
            snapshots.prune(root)
        except AgentError:
            with contextlib.suppress(OSError):
                os.rmdir(place)  # unless an earlier start, slow and given up, has just come to something there
            raise
    return dict(jobs.look(root, job["id"]), again=False)


def _ready(root: str, job: jobs.Job) -> None:
    """What runs in the environment waits until that is there; what makes it does not."""
    if not os.path.isabs(job["argv"][0]):
        venv.check(root)


def supervise(root: str, job: jobs.Job, environment: dict[str, str], snapshot: str | None) -> None:
    """Start the process of a job, wait for its end, and write down how it ended.

    The process is its own session's first, and waits until its record is on disk: what runs is recorded.
    """
    place = jobs.place_of(root, job["id"])
    surroundings = _environment(root, place, job, environment, snapshot)
    argv = [os.path.join(root, job["argv"][0]), *job["argv"][1:]]
    with open(os.path.join(place, "log"), "ab") as log:
        child = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "sh", *argv],
            cwd=root,
            env=surroundings,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    record = {key: job[key] for key in ("id", "stage", "words")}
    record.update(
        pid=child.pid,
        ticks=jobs.ticks(child.pid),
        supervisor=[os.getpid(), jobs.ticks(os.getpid())],
        boot_id=jobs.boot_id(),
        host=socket.gethostname(),
        started=time.time(),
        snapshot=os.path.basename(snapshot) if snapshot else None,
    )
    # Whoever asked for this may be gone, and another, asked again, may have started the job meanwhile.
    ours = fs.write(os.path.join(place, "job.json"), json.dumps(record), new=True)
    assert child.stdin
    if ours:
        child.stdin.write(b"\n")
    child.stdin.close()  # and the process ends that was not told to go
    daemonize.alone()
    code = child.wait()
    if ours:
        _write_down(os.path.join(place, "exit.json"), {"code": code, "ended": time.time()})


def _write_down(path: str, end: dict[str, Any]) -> None:
    """Write how a job ended, though the disk may have to get room for it first."""
    while True:
        try:
            fs.write(path, json.dumps(end))
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        time.sleep(ROOM)


def _environment(
    root: str, place: str, job: jobs.Job, given: dict[str, str], snapshot: str | None
) -> dict[str, str]:
    """What a job finds: nothing it does by itself is written outside of the project's folder."""
    found = {k: v for k, v in os.environ.items() if not k.startswith("SSH_")}
    cache = os.path.join(root, CACHE)
    found.setdefault("HF_HOME", os.path.join(cache, "huggingface"))
    found["XDG_CACHE_HOME"] = cache
    temporary = os.path.join(cache, "tmp")
    if len(temporary) <= LONGEST_TMP:
        os.makedirs(temporary, exist_ok=True)
        found["TMPDIR"] = temporary
    found.update({name: os.path.join(cache, folder) for name, folder in CACHES.items()})
    found.update(given)
    found.update(PYTHONUNBUFFERED="1", PYTHONUTF8="1")
    found.update(ASSAY_RUN_ID=job["id"], ASSAY_RUN_FILE=os.path.join(place, "run"))
    if snapshot:
        found.update(PYTHONPATH=snapshot, PYTHONSAFEPATH="1")
    return found
