"""The number of processes of a training run, and how they reach each other. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import NamedTuple

from ..errors import ConfigError
from ..schema import DistributedArgs
from ..utils import environment
from ..utils.process_info import process_info
from ..utils.workers import cores

DEFAULT_PORT = 29500
SLURM_FIRST_PORT, SLURM_PORTS = 20000, 10000
WEIGHT_SHARDING = {"fsdp2", "zero3"}  # no process holds all weights


class LaunchPlan(NamedTuple):
    """Processes to start on this machine, and the address where all machines connect."""

    processes: int
    nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT

    @property
    def world_size(self) -> int:
        return self.processes * self.nodes


class SlurmStep(NamedTuple):
    """A Slurm job step with one task a machine, as one of its tasks sees it."""

    nodes: int
    node_rank: int
    first_host: str
    port: int  # the same on every machine, different for another job


def plan_launch(args: DistributedArgs, cuda_visible_devices: str) -> LaunchPlan | None:
    """The processes that a run with these settings needs; None if this process trains by itself.

    Raises: ConfigError if this machine, or the installed packages, cannot provide them.
    """
    if args.distributed.startswith("zero") and not find_spec("deepspeed"):
        raise ConfigError(
            f"distributed={args.distributed} needs DeepSpeed, which is not installed",
            hint="pip install -r requirements-deepspeed.txt",
        )
    gpus = len(environment.gpus(cuda_visible_devices))
    info = process_info()
    if info.launched:
        if gpus and info.local_rank >= gpus:
            raise ConfigError(
                f"process {info.local_rank} of this machine has no GPU: cuda_visible_devices="
                f"{cuda_visible_devices} names {gpus}",
                hint="name one GPU for each process",
            )
        return None
    rendezvous = _rendezvous(args)
    plan = LaunchPlan(_processes_per_node(args.num_processes, gpus, cuda_visible_devices), *rendezvous)
    return plan if plan.world_size > 1 or args.distributed != "ddp" else None


def _processes_per_node(requested: int | None, gpus: int, cuda_visible_devices: str) -> int:
    processes = requested or max(1, gpus)
    if gpus and processes != gpus:
        raise ConfigError(
            f"num_processes={processes}, but cuda_visible_devices={cuda_visible_devices} names "
            f"{_plural(gpus, 'GPU')}",
            hint="name one GPU for each process, or set num_processes=null",
        )
    if not gpus and processes > cores():
        raise ConfigError(
            f"num_processes={processes}, but this machine has no GPU of cuda_visible_devices="
            f"{cuda_visible_devices!r} and {_plural(cores(), 'core')}",
            hint=f"set num_processes to {cores()} or less",
        )
    return processes


def _rendezvous(args: DistributedArgs) -> tuple[int, int, str | None, int]:
    """Number of machines, rank of this machine, address and port of machine 0."""
    if args.num_nodes == 1 and (step := slurm_step(os.environ)):
        return step.nodes, step.node_rank, args.master_addr or step.first_host, args.master_port or step.port
    if args.num_nodes > 1 and not args.master_addr:
        raise ConfigError(
            f"num_nodes={args.num_nodes} needs master_addr, the address of the machine of node_rank=0"
        )
    return args.num_nodes, args.node_rank, args.master_addr, args.master_port or DEFAULT_PORT


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def slurm_step(environ: Mapping[str, str]) -> SlurmStep | None:
    """The job step of several machines that this process is a task of; None outside of such a step.

    A batch script that has not called srun trains alone, whatever machines its job has.
    Raises: ConfigError if srun started more tasks than machines: each task would start all processes.
    """

    def read(*names: str) -> str | None:
        return next((environ[n] for n in names if environ.get(n)), None)

    tasks, rank = read("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), read("SLURM_NODEID")
    without_srun = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    if tasks is None or rank is None or without_srun or int(tasks) == 1:
        return None
    nodes = int(read("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES") or 1)
    if int(tasks) != nodes:
        raise ConfigError(
            f"srun started {tasks} tasks on {nodes} machines",
            hint="start one task a machine (--ntasks-per-node=1) and set num_processes for more processes",
        )
    host = next(expand_hosts(read("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") or ""), None)
    if host is None:
        raise ConfigError("SLURM_NODELIST names no machine", hint="set master_addr, num_nodes and node_rank")
    job = int(re.sub(r"\D", "", environ.get("SLURM_JOB_ID", "")) or 0)
    return SlurmStep(nodes, int(rank), host, SLURM_FIRST_PORT + job % SLURM_PORTS)


def expand_hosts(node_list: str) -> Iterator[str]:
    """The host names of `gpu[01-03,7],login`: gpu01, gpu02, gpu03, gpu7, login."""
    for word in re.findall(r"(?:\[[^]]*\]|[^,[])+", node_list):
        yield from _expand_word(word.strip())


def _expand_word(word: str) -> Iterator[str]:
    """Expand one word of a node list. It may hold several brackets: `rack[1-2]n[1-2]`."""
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
