"""Properties of the server: Python, accelerators, disk, memory, and whether logind would kill a run."""

from __future__ import annotations

import getpass
import glob
import json
import os
import platform
import re
import shutil
import subprocess
from typing import Any, Dict  # noqa: UP035  (an alias is evaluated, by Python 3.8 too)

from . import fs, jobs, venv
from .bootstrap import AgentError

MIN_PYTHON = (3, 11)
PYTHONS = ("python3.13", "python3.12", "python3.11", "python3")
PYTHON_PROBE = (
    "import json,sys;from importlib.util import find_spec as f;"
    "print(json.dumps([list(sys.version_info[:3]),bool(f('venv') and f('ensurepip'))]))"
)
TIMEOUT_S = 10.0  # of a program; nvidia-smi may hang with a broken driver
TOOL_DIRS = ("/usr/local/nvidia/bin", "/usr/lib/wsl/lib", "/opt/rocm/bin")  # often not on a session's PATH
LINGER = "/var/lib/systemd/linger"

Facts = Dict[str, Any]  # noqa: UP006


def collect(folder: str, python: str | None = None) -> Facts:
    """Everything that ssh-init prints about the server, and what its environment lacks. Sizes are in bytes.

    `python` is REMOTE_PYTHON.
    Raises: AgentError if an environment is missing and no Python can create one.
    """
    root = fs.root(folder)
    detected = accelerator()
    running = [job for job in jobs.list_jobs(folder) if job["status"] == "running"]
    return {
        "root": root,
        "system": f"{platform.system()} {platform.machine()}",
        "python": find_python(root, python),
        "accelerator": detected,
        "target": venv.accelerator(root, detected["kind"]),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free": free_space(root),
        "rsync": bool(shutil.which("rsync")),
        "kills": kills_user_processes(getpass.getuser()),
        "user": getpass.getuser(),
        "ready": venv.read_state(root),
        "missing": venv.missing(root, detected["kind"]),
        "torch": torch_pin(root),
        "init": next((job["id"] for job in running if job["stage"] == "init"), None),
        "runs": [job["id"] for job in running if job["stage"] != "init"],
    }


# Python


def find_python(root: str, named: str | None) -> Facts:
    """The Python of the environment, or the one to create it with: `{"program", "version"}`.

    Raises: AgentError if no Python is suitable, or REMOTE_PYTHON differs from the environment's version.
    """
    existing = venv.interpreter(root)
    if existing is None:
        return _find_maker(named)
    version = (_probe(existing) or ([], False))[0]
    wanted = _find_maker(named)["version"] if named else version
    if wanted[:2] != version[:2]:
        raise AgentError(
            f"{venv.path(root)} has Python {dotted(version)}, but REMOTE_PYTHON is {dotted(wanted)}",
            "remove this environment on the server (make ssh-shell), then run make ssh-init again",
        )
    return {"program": existing, "version": version}


def _find_maker(named: str | None) -> Facts:
    """The newest suitable Python, or REMOTE_PYTHON if it is named."""
    found = []
    for name in [named] if named else PYTHONS:
        program = shutil.which(os.path.expanduser(name))
        answer = _probe(program) if program else None
        if program and answer:
            found.append((name, program, *answer))
    suitable = [each for each in found if tuple(each[2]) >= MIN_PYTHON]
    for _, program, version, has_venv in suitable:
        if has_venv:
            return {"program": program, "version": version}
    oldest = dotted(MIN_PYTHON)
    if suitable:
        short = f"python{dotted(suitable[0][2][:2])}"
        raise AgentError(
            f"{suitable[0][1]} cannot create an environment: the module venv or ensurepip is missing",
            f"ask the administrator to install the module; on Debian and Ubuntu: apt install {short}-venv",
        )
    if named:
        fact = (
            f"REMOTE_PYTHON={named} is {dotted(found[0][2])}"
            if found
            else f"REMOTE_PYTHON={named} is not a Python on the server"
        )
        raise AgentError(
            f"{fact}; Python {oldest} or newer is needed", "set REMOTE_PYTHON to another Python, or omit it"
        )
    fact = ", ".join(f"{name} is {dotted(version)}" for name, _, version, _ in found)
    raise AgentError(
        f"no Python {oldest} or newer was found on the server" + (f": {fact}" if fact else ""),
        f"install python{oldest} and python{oldest}-venv on the server, or set REMOTE_PYTHON",
    )


def _probe(program: str) -> tuple[list[int], bool] | None:
    """The version of a Python, and whether it can create an environment; None if it is no Python."""
    try:
        version, has_venv = json.loads(output_of([program, "-c", PYTHON_PROBE]) or "")
    except ValueError:
        return None
    return version, has_venv


def dotted(version: Any) -> str:
    return ".".join(map(str, version))


# Accelerators


def accelerator(path: str | None = None) -> Facts:
    """The accelerators that nvidia-smi or rocminfo on `path` report (the session's PATH by default).

    Returns: `{"kind": "cuda"|"rocm"|"cpu", "gpus": [[name, bytes or None]], "driver", "runtime", "problem",
    "scheduled"}`; `runtime` is the newest CUDA version that the driver supports, or the ROCm version; `scheduled`
    names the GPUs of Slurm's nodes.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *TOOL_DIRS]) if path is None else path
    found: Facts = {"kind": "cpu", "gpus": [], "driver": None, "runtime": None, "problem": None, "scheduled": None}
    nvidia, amd = shutil.which("nvidia-smi", path=path), shutil.which("rocminfo", path=path)
    if nvidia:
        query = [nvidia, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
        rows = [[part.strip() for part in line.split(",")] for line in (output_of(query) or "").splitlines()]
        rows = [row for row in rows if len(row) == 3]
        if rows:
            runtime = re.search(r"CUDA Version:\s*([\d.]+)", output_of([nvidia]) or "")
            gpus = [[name, int(mib) << 20 if mib.isdigit() else None] for name, mib, _ in rows]
            return dict(found, kind="cuda", gpus=gpus, driver=rows[0][2], runtime=runtime[1] if runtime else None)
        found["problem"] = f"{nvidia} is installed but reports no GPU"
    if amd:
        agents = [t for t in (output_of([amd]) or "").split("Agent ") if re.search(r"Device Type:\s+GPU", t)]
        if agents:
            patterns = r"Marketing Name:\s+(\S.*)", r"Name:\s+(\S+)"
            names = [re.search(patterns[0], text) or re.search(patterns[1], text) for text in agents]
            gpus = [[name[1].strip() if name else "AMD", None] for name in names]
            return dict(found, kind="rocm", gpus=gpus, runtime=_rocm_version(amd), problem=None)
        found["problem"] = found["problem"] or f"{amd} is installed but reports no GPU"
    scheduled = slurm_gpus(path)
    return dict(found, kind="cuda", scheduled=scheduled) if scheduled else found


def slurm_gpus(path: str) -> str | None:
    """The GPUs of Slurm's nodes, as sinfo lists them; None if it lists none."""
    sinfo = shutil.which("sinfo", path=path)
    kinds = set((output_of([sinfo, "-h", "-o", "%G"]) or "").split()) if sinfo else set()
    return ", ".join(sorted(kind for kind in kinds if kind.startswith("gpu"))) or None


def _rocm_version(program: str) -> str | None:
    folder = os.path.dirname(os.path.dirname(os.path.realpath(program)))
    for place in (folder, "/opt/rocm"):
        try:
            with open(os.path.join(place, ".info", "version")) as file:
                return file.read().split("-")[0].strip()
        except OSError:
            continue
    return None


def output_of(command: list[str]) -> str | None:
    """The standard output of a program, None if it fails or takes longer than TIMEOUT_S."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


# Disk, requirements, logind


def free_space(root: str) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    while not os.path.isdir(root):
        root = os.path.dirname(root)
    return shutil.disk_usage(root).free


def torch_pin(root: str) -> str | None:
    """The version of torch that requirements.txt pins."""
    try:
        with open(os.path.join(root, venv.REQUIREMENTS), encoding="utf-8") as file:
            found = re.search(r"^torch==(\S+)", file.read(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return found[1] if found else None


def kills_user_processes(user: str) -> bool:
    """Whether logind kills all processes of `user`, runs included, when the last session ends."""
    if user == "root" or os.path.exists(os.path.join(LINGER, user)):
        return False
    busctl = shutil.which("busctl")
    query = ["get-property", "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"]
    answer = output_of([busctl, *query, "KillUserProcesses"]) if busctl else None
    if answer:
        return answer.strip() == "b true"
    return logind_setting("KillUserProcesses") in ("yes", "true", "on", "1")


def logind_setting(name: str, places: tuple[str, ...] = ("/usr/lib/systemd", "/etc/systemd")) -> str:
    """A setting in logind's configuration files; later files override earlier ones."""
    value = ""
    for place in places:
        for path in (f"{place}/logind.conf", *sorted(glob.glob(f"{place}/logind.conf.d/*.conf"))):
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    for found in re.finditer(rf"^\s*{name}\s*=\s*(\S+)", file.read(), re.MULTILINE):
                        value = found[1].lower()
            except OSError:
                continue
    return value
