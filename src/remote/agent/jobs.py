"""The jobs of a server: their records, their logs, and how a job is stopped. start.py starts them.

REMOTE_DIR/outputs/remote/jobs/<id>/
  job.json    what was started, its process and the boot id of the machine; written before the process runs
  log         its standard output and standard error
  exit.json   its exit code, when it ended, and whether the disk was full then
  run         the path of its run directory
  slurm.json  the ids of the Slurm jobs that it has submitted
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any, Dict  # noqa: UP035  (an alias is evaluated, by Python 3.8 too)

from . import bootstrap, fs

HOME = "outputs/remote"
RECORD: Dict[str, Any] = {  # noqa: UP006  what a record has at least
    "id": str, "stage": str, "words": list, "pid": int, "host": str, "boot_id": str, "started": (int, float),
}  # fmt: skip
POLL_S = 0.1
LOG_BLOCK = 1 << 16  # bytes
FULL_BYTES = 1 << 16  # a disk with less free space is full
IDLE_S = 1.0  # without new output, until the follower checks that the process still runs

Job = Dict[str, Any]  # noqa: UP006


# Records


def job_dir(folder: str, id: str) -> str:
    return os.path.join(fs.root(folder), HOME, "jobs", id)


def list_jobs(folder: str) -> list[Job]:
    """Every job, the newest first, as `get_job` returns it."""
    jobs = os.path.join(fs.root(folder), HOME, "jobs")
    found = [get_job(folder, id) for id in (os.listdir(jobs) if os.path.isdir(jobs) else [])]
    return sorted((job for job in found if job["started"]), key=lambda job: job["started"], reverse=True)


def get_job(folder: str, id: str) -> Job:
    """The record of a job and its current state.

    Returns: the record with `status` (running, ended, interrupted, elsewhere), the exit `code` and the time
        `ended`, the `run` directory and `run_status` of its manifest, `log_size` in bytes, `log_time` of the last
        output, its `last_line`, `disk_full` at its end or now, and `now`, the server's time. Times are in seconds
        since the epoch.
    """
    place = job_dir(folder, id)
    record = fs.read_json(os.path.join(place, "job.json"))
    if record is None or not all(isinstance(record.get(key), kind) for key, kind in RECORD.items()):
        return {"id": id, "status": "never started", "started": None}
    log_size, log_time, last_line = _log_end(os.path.join(place, "log"))
    # Checked before exit.json is read: a job counts as running until its supervisor has written that file.
    running = is_running(record) or _is_process(record, *record.get("supervisor", (0, 0)))
    status = "running" if running else "interrupted"
    ended = {"code": None, "ended": None, "disk_full": False}
    ended.update(fs.read_json(os.path.join(place, "exit.json")) or {"disk_full": is_full(place)})
    if ended["code"] is not None:
        status = "ended"
    elif record["host"] != socket.gethostname():
        status = "elsewhere"  # on another login node, whose processes cannot be seen
    run = fs.read_text(os.path.join(place, "run")).strip() or None
    manifest = fs.read_json(os.path.join(run, "manifest.json")) if run else None
    return dict(
        record,
        status=status,
        run=run,
        run_status=(manifest or {}).get("status"),
        log_size=log_size,
        log_time=log_time,
        last_line=last_line,
        now=time.time(),
        **ended,
    )


def is_running(record: Job) -> bool:
    """Whether the process of a record runs. Process ids are reused; start times and boot ids tell them apart."""
    return _is_process(record, record["pid"], record.get("ticks"))


def _is_process(record: Job, pid: int, ticks: int | None) -> bool:
    same_boot = record["host"] == socket.gethostname() and record["boot_id"] == boot_id()
    return same_boot and ticks is not None and start_ticks(pid) == ticks


def is_full(place: str) -> bool:
    """Whether the disk of a folder is full for this user: it has no space, or no room for new files."""
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize < FULL_BYTES or (found.f_files > 0 and found.f_favail == 0)


def boot_id() -> str:
    return fs.read_text("/proc/sys/kernel/random/boot_id").strip()


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot (proc(5), field 22); None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def slurm_ids(folder: str, id: str) -> list[str]:
    """The ids of the Slurm jobs that a job has submitted."""
    found = fs.read_json(os.path.join(job_dir(folder, id), "slurm.json"))
    return list(found["ids"]) if found else []


# Logs


def follow(folder: str, id: str, offset: int, wait: bool = True) -> Iterator[dict[str, Any]]:
    """Yield the log from byte `offset` on as `{"at", "data"}`, in base64, and at the end `{"end": the job}`.

    With `wait`, continue until the job has ended.
    """
    place = job_dir(folder, id)
    checked = time.monotonic()
    while True:
        ended = not wait or os.path.exists(os.path.join(place, "exit.json"))
        if not ended and time.monotonic() - checked > IDLE_S:
            checked = time.monotonic()
            ended = get_job(folder, id)["status"] not in ("running", "elsewhere")
        for data in _read_from(os.path.join(place, "log"), offset):
            yield {"at": offset, "data": base64.b64encode(data).decode()}
            offset += len(data)
        if ended:  # determined before the rest of the log was read
            yield {"end": get_job(folder, id)}
            return
        time.sleep(POLL_S)


def _read_from(path: str, offset: int) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(offset)
        while True:
            data = file.read(LOG_BLOCK)
            if not data:
                return
            yield data


def _log_end(path: str) -> tuple[int, float | None, str]:
    """The size of a log, the time of its last output, and its last line that is not empty."""
    try:
        with open(path, "rb") as file:
            size, changed = file.seek(0, os.SEEK_END), os.fstat(file.fileno()).st_mtime
            file.seek(max(0, size - 2000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return 0, None, ""
    return size, changed, next((line.strip() for line in reversed(lines) if line.strip()), "")


# Stopping


def stop(folder: str, id: str, grace: float) -> Job:
    """Terminate a job by a detached process, so that it ends even if this connection is lost.

    Returns: the job as it was before, so that the client can follow everything that it prints from then on.
    """
    job = get_job(folder, id)
    if job["status"] == "running":
        bootstrap.run_detached("jobs:terminate", root=fs.root(folder), id=id, grace=grace)
    return job


def terminate(root: str, id: str, grace: float) -> None:
    """Send TERM to the job's process, which saves a checkpoint; after `grace` seconds KILL its whole session."""
    record = get_job(root, id)
    submitted = slurm_ids(root, id)
    _scancel(["--signal=TERM"], submitted)  # to the job steps: --full would end srun, which kills them
    if not submitted and is_running(record):
        _kill(record["pid"], signal.SIGTERM)
    bootstrap.detach()
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline:
        if not is_running(record):
            return
        time.sleep(POLL_S)
    _scancel([], submitted)
    for pid in _session(record["pid"]):
        _kill(pid, signal.SIGKILL)


def _scancel(options: list[str], ids: list[str]) -> None:
    if ids and shutil.which("scancel"):
        subprocess.call(["scancel", *options, *ids], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _session(leader: int) -> list[int]:
    """The processes of a session and their descendants, which may be in sessions of their own."""
    parents, found = {}, []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(name)] = int(fields[1])
            if int(fields[3]) == leader:
                found.append(int(name))
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor not in found:
            ancestor = parents[ancestor]
        if ancestor in found and pid not in found:
            found.append(pid)
    return found


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
