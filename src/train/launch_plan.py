"""How many processes train, and where they are. Decided without torch."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import NamedTuple

from src.errors import ConfigError
from src.schema import TrainConfig
from src.train import slurm
from src.utils import environment
from src.utils.process_info import process_info
from src.utils.workers import cores

DEFAULT_PORT = 29500
WEIGHT_SHARDING = {"fsdp2", "zero3"}  # no process holds all weights


class LaunchPlan(NamedTuple):
    """Processes to start on this machine, and where they meet those of the others."""

    processes: int
    nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT

    @property
    def world(self) -> int:
        return self.processes * self.nodes


def plan_launch(cfg: TrainConfig) -> LaunchPlan | None:
    """What has to be started for a training with these settings; None if this process trains by itself.

    Raises: ConfigError if this machine, or what is installed, cannot do that.
    """
    if cfg.distributed.startswith("zero") and not find_spec("deepspeed"):
        raise ConfigError(
            f"distributed={cfg.distributed} needs DeepSpeed, which is not installed",
            hint="pip install -r requirements-deepspeed.txt",
        )
    gpus = len(environment.gpus(cfg.cuda_visible_devices))
    now = process_info()
    if now.launched:
        if gpus and now.local_rank >= gpus:
            raise ConfigError(
                f"process {now.local_rank} of this machine has no GPU: cuda_visible_devices="
                f"{cfg.cuda_visible_devices} names {gpus}",
                hint="name a GPU a process",
            )
        return None
    nodes, node_rank, address, port = _rendezvous(cfg)
    found = LaunchPlan(_processes_per_node(cfg, gpus), nodes, node_rank, address, port)
    return found if found.world > 1 or cfg.distributed != "ddp" else None


def _processes_per_node(cfg: TrainConfig, gpus: int) -> int:
    wanted = cfg.num_processes or max(1, gpus)
    if gpus and wanted != gpus:
        raise ConfigError(
            f"num_processes={wanted}, but cuda_visible_devices={cfg.cuda_visible_devices} names "
            f"{_plural(gpus, 'GPU')}",
            hint="name a GPU a process, or leave num_processes=null",
        )
    if not gpus and wanted > cores():
        raise ConfigError(
            f"num_processes={wanted}, but this machine has no GPU of cuda_visible_devices="
            f"{cfg.cuda_visible_devices!r} and {_plural(cores(), 'core')}",
            hint="set num_processes to that at most",
        )
    return wanted


def _rendezvous(cfg: TrainConfig) -> tuple[int, int, str | None, int]:
    """Number of machines, which this one is, and address and port of machine 0."""
    if cfg.num_nodes == 1 and (step := slurm.slurm_step(os.environ)):
        return step.nodes, step.node_rank, cfg.master_addr or step.first_host, cfg.master_port or step.port
    if cfg.num_nodes > 1 and not cfg.master_addr:
        raise ConfigError(
            f"num_nodes={cfg.num_nodes} needs master_addr, the address of the machine of node_rank=0"
        )
    return cfg.num_nodes, cfg.node_rank, cfg.master_addr, cfg.master_port or DEFAULT_PORT


def _plural(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
