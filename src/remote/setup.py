"""`ssh-init`: prints the hardware of the server, and installs a matching Python environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from ..errors import RemoteError
from ..utils.logs import SafeConsole
from . import jobs, push
from .connection import Connection

STAGE = "init"
INSTALLER = "src.remote.agent.install"
GB = 1e9
SPACE_NEEDED = {"cuda": 9 * GB, "rocm": 25 * GB, "cpu": 3 * GB}  # bytes of torch, its dependencies and pip's cache
PIP_VARIABLES = re.compile(r"PIP_\w+|(https?|no|all)_proxy", re.IGNORECASE)


def init(connection: Connection, environment: Mapping[str, str]) -> int:
    """Create or complete the environment in REMOTE_DIR: start a job and follow it.

    `environment` is this process's, with REMOTE_PYTHON and so on.
    Returns: the job's exit code. Raises: RemoteError if the server cannot have an environment.
    """
    code = push.push(connection)
    named = environment.get("REMOTE_PYTHON") or None
    facts = connection.call("host_info:collect", folder=connection.target.dir, python=named)
    print_facts(f"{connection.target}:{connection.target.dir}", facts)
    if facts["init"]:
        print(f"run {facts['init']} is already installing the environment", flush=True)
        return jobs.follow_to_end(connection, facts["init"])
    if not facts["missing"]:
        print("the environment is complete")
        return 0
    _check_space(facts)
    if facts["runs"]:
        print(f"warning: {', '.join(facts['runs'])} is running; the installation may change packages that it uses")
    argv = [facts["python"]["program"], "-m", INSTALLER]
    job = jobs.start(connection, STAGE, argv, [], installer_env(environment), code)
    print(f"{facts['missing'][0]}: run {job['id']} installs the environment", flush=True)
    return jobs.follow_to_end(connection, job["id"])


def installer_env(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of the installer: those of pip and of REMOTE_ENV, and no tokens of other services."""
    requested = environment.get("REMOTE_ENV", "").replace(",", " ").split()
    forwarded = jobs.forwarded_env([], environment)
    found = {k: v for k, v in forwarded.items() if k in requested or PIP_VARIABLES.fullmatch(k)}
    index = environment.get("REMOTE_TORCH_INDEX")
    return found | ({"ASSAY_TORCH_INDEX": index} if index else {})


def _check_space(facts: Mapping[str, Any]) -> None:
    """Raises: RemoteError if the disk has no space for torch, before anything is downloaded."""
    has_torch = (facts["ready"] or {}).get("torch")
    needed = SPACE_NEEDED[facts["target"]] if facts["torch"] and not has_torch else 0
    if facts["free"] < needed:
        raise RemoteError(
            f"{facts['root']} has {format_gb(facts['free'])} of free space, but torch for {facts['target']} "
            f"and its dependencies need {format_gb(needed)}",
            hint="free some space on the server, or set REMOTE_DIR to a folder on another disk",
        )


# The table


def print_facts(where: str, facts: Mapping[str, Any]) -> None:
    """Print the table of the server's hardware and environment, and the warnings below it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in table_rows(facts).items():
        table.add_row(Text(name, style="bold"), Text(value))
    console = SafeConsole(highlight=False, markup=False)
    console.print(where)
    console.print(table)
    for text in warnings(facts):
        print(f"warning: {text}", flush=True)


def table_rows(facts: Mapping[str, Any]) -> dict[str, str]:
    """The rows of the table: the text for each title, from the facts of agent/host_info.py."""
    version = ".".join(map(str, facts["python"]["version"]))
    ready = facts["ready"]
    state = "; ".join(facts["missing"])
    if not state:
        build = f"torch {ready['torch']} for {ready['accelerator']}" if ready["torch"] else "no torch"
        state = f"complete, {build}"
    return {
        "system": facts["system"],
        "Python": f"{version}, {facts['python']['program'].replace(facts['root'] + '/', '')}",
        "GPU": format_gpus(facts["accelerator"]),
        "cores": str(facts["cores"]),
        "memory": format_gb(facts["memory"]),
        "disk": f"{format_gb(facts['free'])} free",
        "rsync": "yes" if facts["rsync"] else "no; SFTP transfers complete files",
        ".venv": state,
    }


def format_gpus(found: Mapping[str, Any]) -> str:
    if not found["gpus"]:
        return f"none on this host; Slurm has {found['scheduled']}" if found["scheduled"] else "none"
    kinds = list(dict.fromkeys(map(tuple, found["gpus"])))
    parts = []
    for name, memory in kinds:
        number = sum(tuple(each) == (name, memory) for each in found["gpus"])
        parts.append(f"{number} x {name}" + (f", {format_gb(memory)}" if memory else ""))
    driver = f"driver {found['driver']}" if found["driver"] else ""
    runtime = f"{'CUDA' if found['kind'] == 'cuda' else 'ROCm'} {found['runtime']}" if found["runtime"] else ""
    return "; ".join(filter(None, (*parts, driver, runtime)))


def warnings(facts: Mapping[str, Any]) -> list[str]:
    """What may prevent runs on this server: an unusable GPU, or logind, which would kill them."""
    found = []
    if facts["accelerator"]["problem"]:
        found.append(facts["accelerator"]["problem"])
    if facts["kills"]:
        found.append(
            f"logind kills all processes of {facts['user']} when the last session ends (KillUserProcesses=yes); "
            "run loginctl enable-linger on the server to keep runs alive"
        )
    return found


def format_gb(number: float) -> str:
    """Bytes in GB or MB."""
    if number < GB / 10:
        return f"{number / 1e6:.0f} MB"
    return f"{number / GB:.{int(number < 10 * GB)}f} GB"
