"""A real Slurm for the tests: munged, slurmctld and slurmd on loopback, all of it in one temporary folder.

Two nodes of this one machine, in the partitions `debug` and `urgent`, whose jobs preempt those of `debug`. There
is no slurmdbd: sacct knows nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=SBIN)]
if not MISSING and os.geteuid():
    MISSING.append("root")
needs_slurm = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(MISSING), reason=f"NO SLURM HERE ({', '.join(MISSING)}): launch=slurm is NOT tested on a cluster"
    ),
]
PATIENCE = 120  # seconds until something that does not come is given up
CONF = """
ClusterName=assay
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmctldParameters=idle_on_node_suspend
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=20
MinJobAge=300
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,defer_batch=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=1000
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=1000
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=20 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2 State=UP
"""


class Cluster:
    """A Slurm that runs. `environment` is what its commands need to find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._stack = ExitStack()

    def start(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = dict(zip(("controller", "first", "second"), free_ports(3), strict=True))
        conf = CONF.format(folder=self.folder, host=socket.gethostname().split(".")[0], **ports)
        Path(self.environment["SLURM_CONF"]).write_text(conf, encoding="utf-8")
        names = {n: str(self.folder / f"munge.{n}") for n in ("socket", "log", "pid", "seed")}
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={names['socket']}",
                     f"--log-file={names['log']}", f"--pid-file={names['pid']}", f"--seed-file={names['seed']}",
                     "--num-threads=2")  # fmt: skip
        wait_for(lambda: Path(names["socket"]).exists())
        self._daemon("slurmctld", "-D")
        for name in ("one", "two"):
            (self.folder / f"spool-{name}").mkdir()
            self._daemon("slurmd", "-D", "-N", name)
        wait_for(
            lambda: self.run("sinfo", "--noheader", "--format=%T %D", "--partition=debug").strip() == "idle 2"
        )

    def stop(self) -> None:
        self.run("scancel", "--user=root", "--full", "--signal=KILL", check=False)
        self.run("scancel", "--user=root", check=False)
        self._stack.close()

    def run(self, *words: str, check: bool = True) -> str:
        """One of Slurm's commands. Returns: what it prints."""
        done = subprocess.run(
            words, env={**os.environ, **self.environment}, text=True, check=False, timeout=PATIENCE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def state(self, job: str) -> str:
        """The state of a job as the controller has it: RUNNING, PENDING, COMPLETED ..."""
        found = re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job, check=False))
        return found[1] if found else "gone"

    def _daemon(self, name: str, *words: str) -> None:
        program = shutil.which(name, path=SBIN)
        assert program
        with (self.folder / f"{name}.said").open("a") as said:
            process = subprocess.Popen(
                [program, *words], env={**os.environ, **self.environment}, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            )  # fmt: skip
        self._stack.callback(process.wait, 30)
        self._stack.callback(process.terminate)


def wait_for(there: Callable[[], bool], patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Slurm, once in each process that tests with it."""
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        found.start()
        yield found
    finally:
        found.stop()
