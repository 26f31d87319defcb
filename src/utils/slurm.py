"""The Slurm job that a process is part of, and what the scheduler says of jobs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

TIMEOUT_S = 60  # seconds for an answer of the controller


class QueuedJob(NamedTuple):
    """A job in the queue: `state` is PENDING, RUNNING, COMPLETING ..., `why` what for, or where."""

    state: str
    why: str


def current_job() -> dict[str, Any] | None:
    """The job of this process: its id, how often it was requeued, the folder of its log. None outside of one.

    `{"job": "12_0", "restart": 0, "folder": "/home/me/outputs/slurm/2026-01-15_10-30-45"}`
    """
    found = os.environ
    if not (job := found.get("SLURM_JOB_ID")):
        return None
    if array := found.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{found.get('SLURM_ARRAY_TASK_ID')}"
    restart = int(found.get("SLURM_RESTART_COUNT") or 0)
    return {"job": job, "restart": restart, "folder": found.get("SUBMITIT_FOLDER")}


def has_ended(recorded: Mapping[str, Any] | None, here: bool) -> bool:
    """Whether the recorded attempt of a job has ended, as far as that can be known.

    A job is one process tree at a time: an earlier attempt of the same job has ended. Of another job on another
    host (`here` is False) the scheduler is asked, where it can be.
    """
    if not recorded:
        return False
    mine = current_job()
    if mine and mine["job"] == recorded["job"]:
        return bool(mine["restart"] > recorded["restart"])
    return not here and _left_queue(recorded["job"])


@cache
def _left_queue(job: str) -> bool:
    seen = queue([job])
    return seen is not None and job not in seen


def queue(jobs: Iterable[str]) -> dict[str, QueuedJob] | None:
    """Those of `jobs` that wait or run; None if the scheduler does not answer."""
    wanted = sorted({job.split("_")[0] for job in jobs})
    said = run_query("squeue", "--noheader", "--array", "--format=%i|%T|%r|%N", f"--jobs={','.join(wanted)}")
    if said is None:
        return None
    rows = [line.split("|") for line in said.splitlines() if line.count("|") == 3]
    return {
        job: QueuedJob(state, hosts or ("" if reason == "None" else reason)) for job, state, reason, hosts in rows
    }


def job_details(job: str) -> dict[str, str]:
    """`{"JobState": "CANCELLED", "PreemptTime": "None", ...}`, as long as the controller remembers the job."""
    return dict(re.findall(r"(\w+)=(\S+)", run_query("scontrol", "show", "--oneliner", "job", job) or ""))


def run_query(*words: str) -> str | None:
    """What one of Slurm's commands answers; empty for a job that it does not know, None if it does not answer."""
    if not shutil.which(words[0]):
        return None
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return done.stdout if not done.returncode else ""
