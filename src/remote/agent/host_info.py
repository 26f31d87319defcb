"""What the server is: its Python, accelerators, disk and memory, and what would end a run there."""

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

from src.remote.agent import fs, jobs, venv
from src.remote.agent.protocol import AgentError

OLDEST = (3, 11)
NAMES = ("python3.13", "python3.12", "python3.11", "python3")
ASK = (
    "import json,sys;from importlib.util import find_spec as f;"
    "print(json.dumps([list(sys.version_info[:3]),bool(f('venv') and f('ensurepip'))]))"
)
ANSWERS = 10.0  # seconds in which a program answers; nvidia-smi may hang with a broken driver
ELSEWHERE = ("/usr/local/nvidia/bin", "/usr/lib/wsl/lib", "/opt/rocm/bin")  # where a session's PATH may not lead
LINGER = "/var/lib/systemd/linger"

Facts = Dict[str, Any]  # noqa: UP006


def facts(folder: str, python: str | None = None) -> Facts:
    """All that ssh-init tells of this machine, and what its environment lacks; `python` is REMOTE_PYTHON.

    Sizes are in bytes.
    Raises: Refused where an environment is missing, and no Python can make one.
    """
    root = fs.root(folder)
    gpu = accelerator()
    missing = venv.missing(root, gpu["kind"])
    running = [job for job in jobs.known(folder) if job["status"] == "running"]
    return {
        "root": root,
        "system": f"{platform.system()} {platform.machine()}",
        "python": interpreter(root, python),
        "accelerator": gpu,
        "target": venv.accelerator(root, gpu["kind"]),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free": free(root),
        "rsync": bool(shutil.which("rsync")),
        "kills": kills(getpass.getuser()),
        "user": getpass.getuser(),
        "ready": venv.ready(root),
        "missing": missing,
        "torch": torch_pin(root),
        "init": next((job["id"] for job in running if job["stage"] == "init"), None),
        "runs": [job["id"] for job in running if job["stage"] != "init"],
    }


# Python


def interpreter(root: str, named: str | None) -> Facts:
    """The Python of the environment, or the one that is to make it: `{"program", "version"}`.

    Raises: Refused where there is none that can, or REMOTE_PYTHON is another than the environment's.
    """
    made = venv.python(root)
    if made is None:
        return _maker(named)
    version = (_asked(made) or ([], False))[0]
    wanted = _maker(named)["version"] if named else version
    if wanted[:2] != version[:2]:
        raise AgentError(
            f"{venv.path(root)} is of Python {spelt(version)}, and REMOTE_PYTHON is {spelt(wanted)}",
            "remove it there (make ssh-shell) and run make ssh-init again",
        )
    return {"program": made, "version": version}


def _maker(named: str | None) -> Facts:
    found = []
    for name in [named] if named else NAMES:
        program = shutil.which(os.path.expanduser(name))
        answer = _asked(program) if program else None
        if program and answer:
            found.append((name, program, *answer))
    fitting = [each for each in found if tuple(each[2]) >= OLDEST]
    for _, program, version, whole in fitting:
        if whole:
            return {"program": program, "version": version}
    oldest = spelt(OLDEST)
    if fitting:
        short = f"python{spelt(fitting[0][2][:2])}"
        raise AgentError(
            f"{fitting[0][1]} cannot make an environment: its module venv or ensurepip is missing",
            f"have its administrator install it, on Debian and Ubuntu: apt install {short}-venv",
        )
    if named:
        said = f"REMOTE_PYTHON={named} is {spelt(found[0][2])}" if found else f"there is no REMOTE_PYTHON={named}"
        raise AgentError(f"{said}; Python {oldest} or newer is needed", "name another, or leave it out")
    said = ", ".join(f"{name} is {spelt(version)}" for name, _, version, _ in found) or "there is none"
    raise AgentError(
        f"Python {oldest} or newer is needed, and {said}",
        f"install python{oldest} and python{oldest}-venv there, or say by REMOTE_PYTHON where one is",
    )


def _asked(program: str) -> tuple[list[int], bool] | None:
    """The version of a Python, and whether it can make an environment."""
    said = answer([program, "-c", ASK])
    try:
        version, whole = json.loads(said or "")
    except ValueError:
        return None
    return version, whole


def spelt(version: Any) -> str:
    return ".".join(map(str, version))


# Accelerators


def accelerator(path: str | None = None) -> Facts:
    """What nvidia-smi or rocminfo of `path` answer (the session's PATH without it).

    Returns: `{"kind": "cuda"|"rocm"|"cpu", "gpus": [[name, bytes or None]], "driver", "runtime", "problem",
    "scheduled"}`; `runtime` is the version of CUDA that the driver can run, or of ROCm; `scheduled` is Slurm's.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *ELSEWHERE]) if path is None else path
    found: Facts = {"kind": "cpu", "gpus": [], "driver": None, "runtime": None, "problem": None, "scheduled": None}
    nvidia, amd = shutil.which("nvidia-smi", path=path), shutil.which("rocminfo", path=path)
    if nvidia:
        asked = [nvidia, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
        rows = [[part.strip() for part in line.split(",")] for line in (answer(asked) or "").splitlines()]
        rows = [row for row in rows if len(row) == 3]
        if rows:
            runtime = re.search(r"CUDA Version:\s*([\d.]+)", answer([nvidia]) or "")
            gpus = [[name, int(mib) << 20 if mib.isdigit() else None] for name, mib, _ in rows]
            return dict(found, kind="cuda", gpus=gpus, driver=rows[0][2], runtime=runtime[1] if runtime else None)
        found["problem"] = f"{nvidia} is there, and answers of no GPU"
    if amd:
        agents = [text for text in (answer([amd]) or "").split("Agent ") if re.search(r"Device Type:\s+GPU", text)]
        if agents:
            names = [
                re.search(r"Marketing Name:\s+(\S.*)", text) or re.search(r"Name:\s+(\S+)", text)
                for text in agents
            ]
            gpus = [[name[1].strip() if name else "AMD", None] for name in names]
            return dict(found, kind="rocm", gpus=gpus, runtime=_rocm(amd), problem=None)
        found["problem"] = found["problem"] or f"{amd} is there, and answers of no GPU"
    scheduled = slurm_gpus(path)
    return dict(found, kind="cuda", scheduled=scheduled) if scheduled else found


def slurm_gpus(path: str) -> str | None:
    """The GPUs that Slurm's nodes have, where this is a node from which one submits to it, and has none itself."""
    sinfo = shutil.which("sinfo", path=path)
    kinds = set((answer([sinfo, "-h", "-o", "%G"]) or "").split()) if sinfo else set()
    return ", ".join(sorted(kind for kind in kinds if kind.startswith("gpu"))) or None


def _rocm(program: str) -> str | None:
    folder = os.path.dirname(os.path.dirname(os.path.realpath(program)))
    for place in (folder, "/opt/rocm"):
        try:
            with open(os.path.join(place, ".info", "version")) as file:
                return file.read().split("-")[0].strip()
        except OSError:
            continue
    return None


def answer(words: list[str]) -> str | None:
    """What a program says, None where it fails or does not answer."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=ANSWERS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


# The rest


def free(root: str) -> int:
    """Bytes that may still be written to the folder's disk."""
    while not os.path.isdir(root):
        root = os.path.dirname(root)
    return shutil.disk_usage(root).free


def torch_pin(root: str) -> str | None:
    """The version of torch that requirements.txt asks for."""
    try:
        with open(os.path.join(root, venv.REQUIREMENTS), encoding="utf-8") as file:
            found = re.search(r"^torch==(\S+)", file.read(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return found[1] if found else None


def kills(user: str) -> bool:
    """Whether logind ends the processes of `user` when the last session does, runs too."""
    if user == "root" or os.path.exists(os.path.join(LINGER, user)):
        return False
    busctl = shutil.which("busctl")
    asked = ["get-property", "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"]
    said = answer([busctl, *asked, "KillUserProcesses"]) if busctl else None
    return said.strip() == "b true" if said else configured("KillUserProcesses") in ("yes", "true", "on", "1")


def configured(name: str, places: tuple[str, ...] = ("/usr/lib/systemd", "/etc/systemd")) -> str:
    """A setting of logind as its files have it, the later ones over the earlier."""
    value = ""
    paths = [
        f
        for place in places
        for f in (f"{place}/logind.conf", *sorted(glob.glob(f"{place}/logind.conf.d/*.conf")))
    ]
    for path in paths:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                for found in re.finditer(rf"^\s*{name}\s*=\s*(\S+)", file.read(), re.MULTILINE):
                    value = found[1].lower()
        except OSError:
            continue
    return value
