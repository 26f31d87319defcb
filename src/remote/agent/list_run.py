"""Lists a run directory of the server, each file with its sha256, for the client that fetches it."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from typing import Any

from . import fs, jobs
from .bootstrap import AgentError

RUNS = "outputs/runs"
FLOCK = "hhqqi4x"  # struct flock of a 64-bit Linux


def find_run(folder: str, id: str) -> str | None:
    """The run directory with this id, whether or not a job created it."""
    path = os.path.join(fs.root(folder), RUNS, id)
    return path if os.path.isfile(os.path.join(path, "manifest.json")) else None


def list_run(folder: str, run: str, after: str = "") -> Iterator[dict[str, Any]]:
    """Yield `{"manifest", "host", "rsync"}` of the run directory `run`, an absolute path, and then its entries.

    An entry is `{"path", "size", "mtime", "sha256"}` for a file, `{"path", "link"}` for a link with the relative
    path of what it leads to inside the run, `{"path", "outside"}` for any other link, `{"path", "folder"}` for an
    empty folder. Entries are sorted by path; those up to `after` are left out.
    Raises: AgentError if it is not a run directory, or the run is in progress.
    """
    manifest = fs.read_json(os.path.join(run, "manifest.json"))
    if manifest is None:
        raise AgentError(
            f"{run} is not a run directory: it has no manifest.json", "make ssh-status lists the runs"
        )
    if why := _in_use(folder, run, manifest):
        id = os.path.basename(run)
        raise AgentError(
            f"run {id} is still running: {why}", f"wait until the run ends, or stop it with make ssh-stop RUN={id}"
        )
    yield {"manifest": manifest, "host": socket.gethostname(), "rsync": shutil.which("rsync") is not None}
    top = os.fsencode(run)
    real = os.path.realpath(top)
    for at in sorted(_walk(top)):
        path = at[len(top) + 1 :].decode("utf-8", "surrogateescape")
        if path > after:
            yield dict(_entry(at, real), path=path)


def _walk(top: bytes) -> Iterator[bytes]:
    """Files, links and empty folders, without lock files and temporary files."""
    for at, folders, names in os.walk(top):
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        folders[:] = [name for name in folders if name not in links and not name.endswith(b".tmp")]
        kept = [name for name in (*names, *links) if name != b".lock" and not name.endswith(b".tmp")]
        yield from (os.path.join(at, name) for name in kept)
        if not kept and not folders and at != top:
            yield at


def _entry(at: bytes, real: bytes) -> dict[str, Any]:
    if os.path.islink(at):
        to = os.path.realpath(at)
        if not to.startswith(real + b"/") or not os.path.exists(to):
            return {"outside": os.readlink(at).decode("utf-8", "surrogateescape")}
        inside = os.path.relpath(to, os.path.realpath(os.path.dirname(at)))
        return {"link": inside.decode("utf-8", "surrogateescape")}
    if os.path.isdir(at):
        return {"folder": True}
    if not os.path.isfile(at):
        return {"outside": "no file"}  # a socket, a pipe
    found = os.stat(at)
    return {"size": found.st_size, "mtime": found.st_mtime, "sha256": fs.sha256(at)}


def _in_use(folder: str, run: str, manifest: dict[str, Any]) -> str:
    """Why a run directory may change at any time; empty if it cannot."""
    real, host = os.path.realpath(run), socket.gethostname()
    for job in jobs.list_jobs(folder):
        if job["run"] and os.path.realpath(job["run"]) == real:
            if job["status"] == "running":
                return f"process {job['pid']} uses the run directory"
            if job["status"] == "elsewhere" and job["run_status"] == "running":
                return f"the run was started on {job['host']}, and {host} cannot check its processes"
    if _is_locked(os.path.join(run, ".lock")):
        return "a process on the server has locked the run directory"
    for record in (manifest, manifest.get("evaluation")):
        if not isinstance(record, dict):
            continue
        if record.get("status") == "running" and _is_running(record.get("process") or {}):
            return f"process {record['process']['pid']} uses the run directory"
    return ""


def _is_locked(path: str) -> bool:
    """Whether a process holds a lock of fcntl(2) on a file. F_GETLK asks for it without taking the lock."""
    try:
        with open(path, "rb+") as file:
            query = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, query))[0] != fcntl.F_UNLCK
    except OSError:
        return False


def _is_running(process: dict[str, Any]) -> bool:
    """Whether the process of a manifest, see src/runs.py, runs on this host."""
    if process.get("host") != socket.gethostname() or process.get("boot_id") not in (None, jobs.boot_id()):
        return False
    if not isinstance(process.get("pid"), int) or not isinstance(process.get("created"), (int, float)):
        return False
    ticks = jobs.start_ticks(process["pid"])
    with open("/proc/stat") as file:
        booted = next(int(line.split()[1]) for line in file if line.startswith("btime"))
    return ticks is not None and abs(booted + ticks / os.sysconf("SC_CLK_TCK") - process["created"]) < 2
