"""`ssh-init`: what the server is, and an environment there that fits it."""

from __future__ import annotations

import os
import re
from typing import Any

from rich.table import Table
from rich.text import Text

from src.errors import RemoteError
from src.remote import env_forwarding, jobs, push
from src.remote.connection import Connection
from src.utils.logs import SafeConsole

STAGE = "init"
INSTALLER = "src.remote.agent.install"
GB = 1e9
NEEDED = {"cuda": 9 * GB, "rocm": 25 * GB, "cpu": 3 * GB}  # bytes of torch, what belongs to it, and pip's cache
FOR_PIP = re.compile(r"PIP_\w+|(https?|no|all)_proxy", re.IGNORECASE)


def init(connection: Connection) -> int:
    """Make the environment in REMOTE_DIR, or what of it is missing; a run of its own does, and is followed.

    Returns: its exit code. Raises: RemoteError where the server cannot have one.
    """
    code = push.push(connection)
    named = os.environ.get("REMOTE_PYTHON") or None
    facts = connection.call("host_info:facts", folder=connection.target.dir, python=named)
    print_facts(connection, facts)
    if facts["init"]:
        print(f"run {facts['init']} is at it already", flush=True)
        return jobs.followed(connection, facts["init"])
    if not facts["missing"]:
        print("nothing is missing")
        return 0
    _room(facts)
    if facts["runs"]:
        print(f"in the midst of {', '.join(facts['runs'])}, which may notice a package that changes")
    job = jobs.start(
        connection, STAGE, [facts["python"]["program"], "-m", INSTALLER], [], environment(os.environ), code
    )
    print(f"{facts['missing'][0]}: run {job['id']} makes it", flush=True)
    return jobs.followed(connection, job["id"])


def environment(here: Any) -> dict[str, str]:
    """What goes along: what pip needs, and no token of other services."""
    asked = here.get("REMOTE_ENV", "").replace(",", " ").split()
    found = {k: v for k, v in env_forwarding.carried([], here).items() if k in asked or FOR_PIP.fullmatch(k)}
    index = here.get("REMOTE_TORCH_INDEX")
    return found | ({"ASSAY_TORCH_INDEX": index} if index else {})


def _room(facts: dict[str, Any]) -> None:
    """Raises: RemoteError where the disk has no room for torch, before anything is fetched."""
    needed = NEEDED[facts["target"]] if facts["torch"] and not (facts["ready"] or {}).get("torch") else 0
    if facts["free"] < needed:
        raise RemoteError(
            f"{facts['root']} has {size(facts['free'])} left, and torch for {facts['target']} with all that "
            f"belongs to it takes {size(needed)}",
            hint="free some space there, or name a folder on another disk by REMOTE_DIR",
        )


# The table


def print_facts(connection: Connection, facts: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows(facts).items():
        table.add_row(Text(name, style="bold"), Text(value))
    screen = SafeConsole(highlight=False, markup=False)
    screen.print(f"{connection.target}:{connection.target.dir}")
    screen.print(table)
    for text in warnings(facts):
        print(f"warning: {text}", flush=True)


def rows(facts: dict[str, Any]) -> dict[str, str]:
    """The table: what a person wants to know of the server before a training."""
    version = ".".join(map(str, facts["python"]["version"]))
    made = facts["ready"]
    state = "; ".join(facts["missing"]) or f"whole, torch {made['torch']} for {made['accelerator']}"
    return {
        "system": facts["system"],
        "Python": f"{version}, {facts['python']['program'].replace(facts['root'] + '/', '')}",
        "GPU": gpus(facts["accelerator"]),
        "cores": str(facts["cores"]),
        "memory": size(facts["memory"]),
        "disk": f"{size(facts['free'])} free",
        "rsync": "yes" if facts["rsync"] else "no: files go by SFTP, and whole",
        ".venv": state if made is None or made["torch"] or facts["missing"] else "whole, without torch",
    }


def gpus(found: dict[str, Any]) -> str:
    if not found["gpus"]:
        return f"none here; Slurm has {found['scheduled']}" if found["scheduled"] else "none"
    kinds = list(dict.fromkeys(map(tuple, found["gpus"])))
    parts = []
    for name, memory in kinds:
        number = sum(tuple(each) == (name, memory) for each in found["gpus"])
        parts.append(f"{number} x {name}" + (f", {size(memory)}" if memory else ""))
    driver = f"driver {found['driver']}" if found["driver"] else ""
    runtime = f"{'CUDA' if found['kind'] == 'cuda' else 'ROCm'} {found['runtime']}" if found["runtime"] else ""
    return "; ".join(filter(None, (*parts, driver, runtime)))


def warnings(facts: dict[str, Any]) -> list[str]:
    found = []
    if facts["accelerator"]["problem"]:
        found.append(facts["accelerator"]["problem"])
    if facts["kills"]:
        found.append(
            f"logind ends all that {facts['user']} runs when the last session ends there (KillUserProcesses=yes); "
            "let runs go on by: loginctl enable-linger"
        )
    return found


def size(number: float) -> str:
    """Bytes in GB or MB."""
    if number < GB / 10:
        return f"{number / 1e6:.0f} MB"
    return f"{number / GB:.{int(number < 10 * GB)}f} GB"
