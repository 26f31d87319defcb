"""The jobs of a server: the records on its disk, and what became of each. start, watch and stop do the rest.

REMOTE_DIR/outputs/remote/jobs/<id>/
  job.json   what was started, as which process of which boot; written before it runs
  log        all that it says
  exit.json  how it ended
  run        the run directory that it works in
  slurm.json the jobs that it has handed to Slurm, if it does that
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any, Dict  # noqa: UP035  (an alias is evaluated, by Python 3.8 too)

from src.remote.agent import fs

HOME = "outputs/remote"

Job = Dict[str, Any]  # noqa: UP006


def look(folder: str, id: str) -> Job:
    """The record of a job and what became of it.

    Returns: besides the record `status` (running, ended, interrupted, elsewhere), the exit `code` and when it
    `ended`, the `run` directory and the status that its manifest claims, the `size` of the log in bytes, when it
    was last `heard` of and its `last` line, and in `now` what time it is there.
    """
    place = place_of(folder, id)
    record = fs.read(os.path.join(place, "job.json"))
    if record is None:
        return {"id": id, "status": "never started", "started": None}
    size, heard, last = _tail(os.path.join(place, "log"))
    # Before its end is looked for, which may come just now; and who writes that down counts until it is there.
    running = alive(record) or _runs(record, *record.get("supervisor", (0, 0)))
    status = "running" if running else "interrupted"
    ended = fs.read(os.path.join(place, "exit.json")) or {"code": None, "ended": None}
    if ended["code"] is not None:
        status = "ended"
    elif record["host"] != socket.gethostname():
        status = "elsewhere"  # as on another login node, whose processes are not seen from here
    run = fs.text(os.path.join(place, "run")).strip() or None
    manifest = fs.read(os.path.join(run, "manifest.json")) if run else None
    return dict(
        record,
        status=status,
        run=run,
        run_status=(manifest or {}).get("status"),
        size=size,
        heard=heard,
        last=last,
        now=time.time(),
        **ended,
    )


def alive(record: Job) -> bool:
    """Whether the process of a record still runs: a pid is reused, its start and the boot are not."""
    return _runs(record, record["pid"], record["ticks"])


def _runs(record: Job, pid: int, since: int) -> bool:
    here = record["host"] == socket.gethostname() and record["boot_id"] == boot_id()
    return here and ticks(pid) == since


def boot_id() -> str:
    return fs.text("/proc/sys/kernel/random/boot_id").strip()


def ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot (proc(5), field 22); None of one that has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def submitted(folder: str, id: str) -> list[str]:
    """The ids of the jobs that a job has handed to Slurm."""
    found = fs.read(os.path.join(place_of(folder, id), "slurm.json"))
    return list(found["ids"]) if found else []


def known(folder: str) -> list[Job]:
    """Every job, the newest first, as `look` gives it."""
    jobs = os.path.join(fs.root(folder), HOME, "jobs")
    found = [look(folder, id) for id in (os.listdir(jobs) if os.path.isdir(jobs) else [])]
    return sorted((job for job in found if job["started"]), key=lambda job: job["started"], reverse=True)


# Files


def place_of(folder: str, id: str) -> str:
    return os.path.join(fs.root(folder), HOME, "jobs", id)


def _tail(path: str) -> tuple[int, float | None, str]:
    """The size of a log, when it was written last, and its last line that is not empty."""
    try:
        with open(path, "rb") as file:
            size, heard = file.seek(0, os.SEEK_END), os.fstat(file.fileno()).st_mtime
            file.seek(max(0, size - 2000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return 0, None, ""
    return size, heard, next((line.strip() for line in reversed(lines) if line.strip()), "")
