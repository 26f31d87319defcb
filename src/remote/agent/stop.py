"""A job is asked to end, and made to."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time

from src.remote.agent import daemonize, fs, jobs

POLL = 0.1  # seconds


def stop(folder: str, id: str, grace: float) -> jobs.Job:
    """Ask a job to end, and see to it that it has ended after `grace` seconds, whoever is connected then.

    Returns: its record.
    """
    record = jobs.look(folder, id)
    if record["status"] == "running":
        daemonize.call("stop:end", root=fs.root(folder), id=id, grace=grace)
    return jobs.look(folder, id)


def end(root: str, id: str, grace: float) -> None:
    """TERM to the job's process, which checkpoints; KILL to all of its session after `grace` seconds."""
    record = jobs.look(root, id)
    submitted = jobs.submitted(root, id)
    _cancel(["--signal=TERM"], submitted)  # to the steps: --full ends srun, which kills what it has started
    if not submitted and jobs.alive(record):
        _signal(record["pid"], signal.SIGTERM)
    daemonize.alone()
    until = time.monotonic() + grace
    while time.monotonic() < until:
        if not jobs.alive(record):
            return
        time.sleep(POLL)
    _cancel([], submitted)
    for pid in _session(record["pid"]):
        _signal(pid, signal.SIGKILL)


def _cancel(how: list[str], ids: list[str]) -> None:
    """Pass a signal to the jobs that a job has submitted to Slurm."""
    if ids and shutil.which("scancel"):
        subprocess.call(["scancel", *how, *ids], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _session(leader: int) -> list[int]:
    """The processes of the session that `leader` began, and those that they have started, whatever theirs is."""
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
        above = pid
        while above in parents and above not in found:
            above = parents[above]
        if above in found and pid not in found:
            found.append(pid)
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
