"""What Slurm's environment says of the machines that train together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from src.errors import ConfigError

FIRST_PORT, PORTS = 20000, 10000


class SlurmStep(NamedTuple):
    """A job step of one task a machine, as seen by one of its tasks."""

    nodes: int
    node_rank: int
    first_host: str
    port: int  # the same on every machine, another for another job


def slurm_step(environment: Mapping[str, str]) -> SlurmStep | None:
    """The job step of several machines that this process is a task of; None outside of one.

    A batch script that has not called srun is alone, whatever its job has been given.
    Raises: ConfigError if srun started more tasks than machines: each would start all processes.
    """

    def read(*names: str) -> str | None:
        return next((environment[n] for n in names if environment.get(n)), None)

    tasks, rank = read("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), read("SLURM_NODEID")
    without_srun = environment.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environment
    if tasks is None or rank is None or without_srun or int(tasks) == 1:
        return None
    nodes = int(read("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES") or 1)
    if int(tasks) != nodes:
        raise ConfigError(
            f"srun started {tasks} tasks on {nodes} machines",
            hint="start one a machine (--ntasks-per-node=1); num_processes says how many processes it starts",
        )
    host = next(expand_hosts(read("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") or ""), None)
    if host is None:
        raise ConfigError(
            "Slurm names no machine in SLURM_NODELIST", hint="set master_addr, num_nodes and node_rank"
        )
    job = int(re.sub(r"\D", "", environment.get("SLURM_JOB_ID", "")) or 0)
    return SlurmStep(nodes, int(rank), host, FIRST_PORT + job % PORTS)


def expand_hosts(listed: str) -> Iterator[str]:
    """The host names of `gpu[01-03,7],login`: gpu01, gpu02, gpu03, gpu7, login."""
    for word in re.findall(r"(?:\[[^]]*\]|[^,[])+", listed):
        yield from _expand_word(word.strip())


def _expand_word(word: str) -> Iterator[str]:
    """One word of a list of hosts, which may hold several brackets, as `rack[1-2]n[1-2]` does."""
    found = re.match(r"([^[]*)\[([^]]*)\](.*)$", word)
    if found is None:
        yield word
        return
    before, ranges, after = found.groups()
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for rest in _expand_word(after):
                yield f"{before}{number:0{len(first)}d}{rest}"
