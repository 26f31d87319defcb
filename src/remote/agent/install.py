"""`python -m src.remote.agent.install` in REMOTE_DIR: creates or completes its Python environment.

It runs on the server as a job, from the pushed code. It resumes an installation that was killed.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import glob
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from typing import Any

from . import fs, host_info, venv
from .bootstrap import AgentError

PYTORCH_INDEX = "https://download.pytorch.org/whl"
INDEX_TIMEOUT_S = 6.0
INDEX_VARIABLE = "ASSAY_TORCH_INDEX"  # the value of REMOTE_TORCH_INDEX, which may hold a password
UNIMPORTANT = re.compile(r"Requirement already satisfied|Looking in |\[notice\]")  # lines of pip
LOCK = ".cache/init.lock"
TORCH_PROBE = (
    "import json,torch;"
    "print(json.dumps([torch.__version__, torch.version.cuda, getattr(torch.version,'hip',None),"
    " torch.cuda.is_available()]))"
)


def main() -> int:
    """Returns: 0 if the environment is complete, 1 if a program such as pip failed, 2 for an AgentError."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    root = os.getcwd()
    os.makedirs(os.path.join(root, ".cache"), exist_ok=True)
    with open(os.path.join(root, LOCK), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("another ssh-init is in progress; waiting until it ends")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return Installer(root, lock.fileno()).run()
        except AgentError as error:
            log("; ".join(filter(None, (error.problem, error.hint))))
            return 2
        except ProgramFailed as error:
            log(f"{error}; read the output above, then run make ssh-init again to continue")
            return 1


class ProgramFailed(Exception):
    """A program failed; the log has its output."""


class Installer:
    """One installation. pip inherits the file descriptor `lock`, since it survives a killed installer."""

    def __init__(self, root: str, lock: int) -> None:
        self.root, self.lock = root, lock
        self.detected = host_info.accelerator()
        self.kind = venv.accelerator(root, self.detected["kind"])
        self.requirements = venv.requirements_hash(root, self.kind)
        self.previous = venv.read_state(root) or {}

    def run(self) -> int:
        if not venv.missing(self.root, self.detected["kind"]):
            log("the environment is complete")
            return 0
        self.make_environment()
        self.install_torch()
        for name in venv.requirements(self.root, self.kind)[-1:]:  # the last file includes the others
            self.pip(name, "-r", name)
        self.write_state()
        return 0

    def make_environment(self) -> None:
        """Create the environment if it is missing; repair partially written packages of a killed installation."""
        marker = venv.path(self.root, venv.INSTALLING)
        if not venv.interpreter(self.root):
            log(f"Python {platform.python_version()}: creating {venv.path(self.root)}")
            remove(*(venv.path(self.root, name) for name in ("bin", "lib", "lib64", "include", venv.READY)))
            os.makedirs(venv.path(self.root), exist_ok=True)
            fs.write_text(marker, "")
            self.run_program("venv", sys.executable, "-m", "venv", "--without-pip", venv.path(self.root))
        elif os.path.exists(marker):
            for name in remove_incomplete(self.root):
                log(f"{name} was partially installed; reinstalling it")
        else:
            fs.write_text(marker, "")
        if host_info.output_of([self.python, "-m", "pip", "--version"]) is None:
            self.run_program("ensurepip", self.python, "-m", "ensurepip", "--upgrade", "--default-pip")

    def install_torch(self) -> None:
        """Install the build of torch for the accelerator before any package requires torch."""
        version = host_info.torch_pin(self.root)
        if version is None:
            return
        rebuilt = self.previous.get("accelerator", self.kind) != self.kind
        force = ["--force-reinstall", "--no-deps"] if rebuilt else []
        index, reason = self.torch_index(version)
        if reason:
            log(reason)
        if index:  # --no-deps: only torch comes from this index
            # Passed on the standard input: it may hold a password, and all users of a machine see command lines.
            stdin = "-r", "/dev/stdin"
            self.pip("torch", "--no-deps", *force, *stdin, stdin=f"--index-url {index}\ntorch=={version}\n")
            self.pip("the dependencies of torch", *stdin, stdin=f"--extra-index-url {index}\ntorch=={version}\n")
        else:
            self.pip("torch", *force, f"torch=={version}")

    def torch_index(self, version: str) -> tuple[str | None, str]:
        """The package index for torch, None for the server's own, and the line to log about it."""
        if os.environ.get(INDEX_VARIABLE):
            return os.environ[INDEX_VARIABLE], "installing torch from REMOTE_TORCH_INDEX"
        if self.kind == "cuda" or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            return None, ""  # the ordinary index has the right build
        index, problem = pytorch_index(self.kind, version, self.detected["runtime"])
        if index:
            return index, f"installing torch for {self.kind} from {index}"
        size = " (4 GB more)" if self.kind == "cpu" else ""
        source = f"installing torch from the server's default package index, which may have the CUDA build{size}"
        return None, f"{problem}: {source}; set REMOTE_TORCH_INDEX to use another index"

    def write_state(self) -> None:
        """Record what is installed."""
        torch = self.check_torch()
        state = {
            "python": platform.python_version(),
            "accelerator": self.kind,
            "requirements": self.requirements,
            "torch": torch[0] if torch else None,
        }
        fs.write_text(venv.path(self.root, venv.INSTALLED), "")
        fs.write_text(venv.path(self.root, venv.READY), json.dumps(state))
        os.unlink(venv.path(self.root, venv.INSTALLING))
        log(f"ready: Python {state['python']}" + (f", torch {torch[0]} for {self.kind}" if torch else ""))

    def check_torch(self) -> list[Any] | None:
        """Import torch, and warn if it does not find the GPU. Raises: ProgramFailed if it cannot be imported."""
        if host_info.torch_pin(self.root) is None:
            return None
        done = subprocess.run([self.python, "-c", TORCH_PROBE], capture_output=True, cwd="/")
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
            raise ProgramFailed(f"torch was installed but cannot be imported: {lines[-1]}")
        version, cuda, hip, available = found = json.loads(done.stdout)
        if self.detected["gpus"] and not available:
            built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU only"
            driver = {"cuda": "CUDA", "rocm": "ROCm"}[self.kind]
            log(
                f"warning: torch {version} is built for {built} but finds no GPU; the server's driver supports "
                f"{driver} {self.detected['runtime'] or 'of an unknown version'}. Update the driver; or set "
                f"REMOTE_TORCH_INDEX to an index with an older build, such as {PYTORCH_INDEX}/cu126, remove .venv "
                "and run make ssh-init again"
            )
        return list(found)

    # Programs

    @property
    def python(self) -> str:
        return venv.path(self.root, "bin", "python")

    def pip(self, what: str, *arguments: str, stdin: str = "") -> None:
        """Run `python -m pip install` and log its output without the lines about installed packages."""
        options = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
        command = [self.python, "-m", "pip", "install", *options, *arguments]
        self.run_program(f"pip install {what}", *command, stdin=stdin)

    def run_program(self, what: str, *command: str, stdin: str = "") -> None:
        """Run a program and log its output. Raises: ProgramFailed unless it succeeds."""
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(self.lock,),
            preexec_fn=os.setpgrp,
        )
        try:
            assert process.stdin
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(stdin.encode())
            for line in process.stdout or ():
                text = line.decode(errors="replace").rstrip()
                if not UNIMPORTANT.match(text):
                    log(text)
            code = process.wait()
        except BaseException:  # this process was terminated: so is pip, with the processes that it has started
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        if code:
            raise ProgramFailed(f"{what} failed (exit code {code})")

    def environment(self) -> dict[str, str]:
        """The variables of pip: it writes in the project folder only, and imports no code from PYTHONPATH."""
        cache = os.path.join(self.root, ".cache")
        temporary = os.path.join(cache, "tmp")
        os.makedirs(temporary, exist_ok=True)
        found = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", INDEX_VARIABLE)}
        return dict(found, PIP_CACHE_DIR=os.path.join(cache, "pip"), TMPDIR=temporary, PIP_USER="0")


def pytorch_index(
    kind: str, version: str, runtime: str | None, base: str = PYTORCH_INDEX
) -> tuple[str | None, str]:
    """PyTorch's own index that has torch `version` for `kind` ("cpu" or "rocm") and this Python.

    For ROCm: the newest one that is not newer than `runtime`, the server's version, else the oldest.
    Returns: the URL, or None and the reason.
    """
    page = _read_url(f"{base}/torch/")
    host = base.partition("://")[2].partition("/")[0]
    if page is None:
        return None, f"no response from {host}"
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    names = re.findall(rf"torch-{re.escape(version)}(?:\+|%2B)({kind}[\d.]*)-{tag}-[^\"<>]*x86_64\.whl", page)
    builds = sorted(set(names), key=_numbers)
    if not builds:
        return None, f"{host} has no torch {version} for {kind} and this Python"
    fitting = [build for build in builds if not runtime or _numbers(build) <= _numbers(runtime)[:2]]
    return f"{base}/{(fitting or builds[:1])[-1]}", ""


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _read_url(url: str) -> str | None:
    """A page, None if it does not arrive within INDEX_TIMEOUT_S, which a thread applies to the name lookup too."""
    found: list[str] = []

    def get() -> None:
        try:
            with urllib.request.urlopen(url, timeout=INDEX_TIMEOUT_S) as response:
                found.append(response.read().decode(errors="replace"))
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(INDEX_TIMEOUT_S)
    return found[0] if found else None


def remove_incomplete(root: str) -> list[str]:
    """Remove the metadata of packages that a killed pip has installed in part, so that pip installs them again.

    pip regards a package with METADATA as installed. RECORD is written last, and lists every file with its size.
    Returns: the names of the incomplete packages.
    """
    broken = []
    for packages in glob.glob(venv.path(glob.escape(root), "lib", "python*", "site-packages")):
        for leftover in glob.glob(os.path.join(glob.escape(packages), "~*")):
            shutil.rmtree(leftover, ignore_errors=True)
        for info in glob.glob(os.path.join(glob.escape(packages), "*.dist-info")):
            if not _is_complete(packages, info):
                shutil.rmtree(info)
                broken.append(os.path.basename(info)[: -len(".dist-info")])
    return sorted(broken)


def _is_complete(packages: str, info: str) -> bool:
    try:
        with open(os.path.join(info, "RECORD"), encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        sizes = {row[0]: int(row[2]) for row in rows if len(row) == 3 and row[2]}
        return bool(rows) and all(
            os.path.getsize(os.path.join(packages, name)) == size for name, size in sizes.items()
        )
    except (OSError, ValueError):
        return False


def remove(*paths: str) -> None:
    for path in paths:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)


def log(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
