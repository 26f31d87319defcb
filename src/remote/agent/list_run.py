"""A run directory of the server, file by file with its sha256, for who fetches it."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from typing import Any

from src.remote.agent import fs, jobs
from src.remote.agent.protocol import AgentError

RUNS = "outputs/runs"
FLOCK = "hhqqi4x"  # struct flock of a 64-bit Linux


def place(folder: str, id: str) -> str | None:
    """The run directory of an id, whoever made it."""
    path = os.path.join(fs.root(folder), RUNS, id)
    return path if os.path.isfile(os.path.join(path, "manifest.json")) else None


def listing(folder: str, run: str, after: str = "") -> Iterator[dict[str, Any]]:
    """What is in the run directory `run`, absolute: first `{"manifest", "host", "rsync"}`, then an entry each.

    An entry is `{"path", "size", "mtime", "sha256"}` of a file, `{"path", "link"}` of a link that stays inside,
    `{"path", "outside"}` of another, `{"path", "folder"}` of an empty folder. They are sorted; `after` is the last
    that was heard of before.
    Raises: Refused if it is no run, or one that still runs.
    """
    manifest = fs.read(os.path.join(run, "manifest.json"))
    if manifest is None:
        raise AgentError(f"{run} is no run: it has no manifest.json", "make ssh-status lists the runs")
    if why := _busy(folder, run, manifest):
        id = os.path.basename(run)
        raise AgentError(f"run {id} still runs: {why}", f"wait for its end, or make ssh-stop RUN={id}")
    yield {"manifest": manifest, "host": socket.gethostname(), "rsync": shutil.which("rsync") is not None}
    top = os.fsencode(run)
    real = os.path.realpath(top)
    for at in sorted(_below(top)):
        path = at[len(top) + 1 :].decode("utf-8", "surrogateescape")
        if path > after:
            yield dict(_entry(at, real), path=path)


def _below(top: bytes) -> Iterator[bytes]:
    """Files, links and empty folders, without locks and what was being written."""
    for at, folders, names in os.walk(top):
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        folders[:] = [name for name in folders if name not in links and not name.endswith(b".tmp")]
        kept = [name for name in (*names, *links) if name != b".lock" and not name.endswith(b".tmp")]
        yield from (os.path.join(at, name) for name in kept)
        if not kept and not folders and at != top:
            yield at


def _entry(at: bytes, real: bytes) -> dict[str, Any]:
    if os.path.islink(at):
        to, target = os.path.realpath(at), os.readlink(at)
        if not to.startswith(real + b"/") or not os.path.exists(to):
            return {"outside": target.decode("utf-8", "surrogateescape")}
        inside = os.path.relpath(to, os.path.realpath(os.path.dirname(at))) if target.startswith(b"/") else target
        return {"link": inside.decode("utf-8", "surrogateescape")}
    if os.path.isdir(at):
        return {"folder": True}
    if not os.path.isfile(at):
        return {"outside": "no file"}  # a socket, a pipe
    found = os.stat(at)
    return {"size": found.st_size, "mtime": found.st_mtime, "sha256": fs.sha256(at)}


def _busy(folder: str, run: str, manifest: dict[str, Any]) -> str:
    """Why a run directory may change at any moment."""
    here = os.path.realpath(run)
    for job in jobs.known(folder):
        if job["run"] and os.path.realpath(job["run"]) == here:
            if job["status"] == "running":
                return f"process {job['pid']} works in it"
            if job["status"] == "elsewhere" and job["run_status"] == "running":
                return (
                    f"it was started on {job['host']}, and what runs there is not seen from {socket.gethostname()}"
                )
    if _locked(os.path.join(run, ".lock")):
        return "a process of the server holds it"
    for record in (manifest, manifest.get("evaluation", {})):
        if record.get("status") == "running" and _alive(record.get("process") or {}):
            return f"process {record['process']['pid']} works in it"
    return ""


def _locked(path: str) -> bool:
    """Whether a process has a lock of fcntl(2) on a file. It is only asked: to try would be to take it."""
    try:
        with open(path, "rb+") as file:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
    except OSError:
        return False


def _alive(process: dict[str, Any]) -> bool:
    """Whether the process of a manifest, see src/runs.py, runs on this host."""
    if process.get("host") != socket.gethostname() or process.get("boot_id") not in (None, jobs.boot_id()):
        return False
    since = jobs.ticks(process["pid"])
    with open("/proc/stat") as file:
        booted = next(int(line.split()[1]) for line in file if line.startswith("btime"))
    return since is not None and abs(booted + since / os.sysconf("SC_CLK_TCK") - process["created"]) < 2
