"""The Slurm job of this process, and the states of jobs in the queue."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

TIMEOUT_S = 60  # for an answer of the controller


class QueuedJob(NamedTuple):
    """A job in the queue.

    state: PENDING, RUNNING, COMPLETING ...
    detail: the reason why it is pending, or the nodes that it runs on.
    """

    state: str
    detail: str


def current_job() -> dict[str, Any] | None:
    """The id of this process's job, how often it was requeued, and the folder of its log; None outside a job.

    `{"job": "12_0", "restart": 0, "folder": "/home/me/outputs/slurm/2026-01-15_10-30-45"}`
    """
    found = os.environ
    if not (job := found.get("SLURM_JOB_ID")):
        return None
    if array := found.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{found.get('SLURM_ARRAY_TASK_ID')}"
    restart = int(found.get("SLURM_RESTART_COUNT") or 0)
    return {"job": job, "restart": restart, "folder": found.get("SUBMITIT_FOLDER")}


def has_ended(recorded: Mapping[str, Any] | None, is_local: bool) -> bool:
    """Whether a job, as `current_job` recorded it, is known to have ended.

    Earlier attempts of this process's job have ended. For another job, on another host (`is_local` is False), the
    queue is queried; False if it does not answer.
    """
    if not recorded:
        return False
    mine = current_job()
    if mine and mine["job"] == recorded["job"]:
        return bool(mine["restart"] > recorded["restart"])
    return not is_local and _left_queue(recorded["job"])


@cache
def _left_queue(job: str) -> bool:
    seen = queue([job])
    return seen is not None and job not in seen


def queue(jobs: Iterable[str]) -> dict[str, QueuedJob] | None:
    """The pending and running ones among `jobs`, by id; None if the scheduler does not answer."""
    wanted = sorted({job.split("_")[0] for job in jobs})
    output = run_query("squeue", "--noheader", "--array", "--format=%i|%T|%r|%N", f"--jobs={','.join(wanted)}")
    if output is None:
        return None
    rows = [line.split("|") for line in output.splitlines() if line.count("|") == 3]
    return {
        job: QueuedJob(state, hosts or ("" if reason == "None" else reason)) for job, state, reason, hosts in rows
    }


def job_details(job: str) -> dict[str, str]:
    """`{"JobState": "CANCELLED", "PreemptTime": "None", ...}`, empty once the controller has forgotten the job."""
    return dict(re.findall(r"(\w+)=(\S+)", run_query("scontrol", "show", "--oneliner", "job", job) or ""))


def run_query(*words: str) -> str | None:
    """The output of a Slurm command: empty for an unknown job, None if the command fails or times out."""
    if not shutil.which(words[0]):
        return None
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return done.stdout if not done.returncode else ""
