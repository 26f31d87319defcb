"""`python -m src.remote.agent.install` in REMOTE_DIR: makes its environment, or what of it is missing.

It runs on the server, as a job of its own. What was killed on the way is found by the next one, and gone on with.
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

from src.remote.agent import fs, host_info, venv
from src.remote.agent.protocol import AgentError

PUBLIC = "https://download.pytorch.org/whl"
PATIENCE = 6.0  # seconds within which PUBLIC answers
INDEX = "ASSAY_TORCH_INDEX"  # REMOTE_TORCH_INDEX, in the environment: it may hold a password
QUIET = re.compile(r"Requirement already satisfied|Looking in |\[notice\]")
LOCK = ".cache/init.lock"
TRIED = (
    "import json,torch;"
    "print(json.dumps([torch.__version__, torch.version.cuda, getattr(torch.version,'hip',None),"
    " torch.cuda.is_available()]))"
)


def main() -> int:
    """Returns: 0 where the environment is whole; 1 where pip failed; 2 where something is refused."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    root = os.getcwd()
    os.makedirs(os.path.join(root, ".cache"), exist_ok=True)
    with open(os.path.join(root, LOCK), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another ssh-init is at work here; waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return Installer(root, lock.fileno()).run()
        except AgentError as refused:
            say("; ".join(filter(None, (refused.problem, refused.hint))))
            return 2
        except ProgramFailed as failed:
            say(f"{failed}; what was said stands above, and make ssh-init goes on from here")
            return 1


class ProgramFailed(Exception):
    """A program failed, whose words stand in the log."""


class Installer:
    """`lock` is a file that pip has open too, for it outlives an installer that was killed."""

    def __init__(self, root: str, lock: int) -> None:
        self.root, self.lock = root, lock
        self.found = host_info.accelerator()
        self.kind = venv.accelerator(root, self.found["kind"])
        self.digest = venv.digest(root, self.kind)
        self.was = venv.ready(root) or {}

    def run(self) -> int:
        if not venv.missing(self.root, self.found["kind"]):
            say("nothing is missing")
            return 0
        self.environment()
        self.torch()
        for name in venv.requirements(self.root, self.kind)[-1:]:  # the last includes those before it
            self.pip(name, "-r", name)
        self.done()
        return 0

    def environment(self) -> None:
        """Make it where it is not, and mend what a killed installation has left."""
        marker = venv.path(self.root, venv.INSTALLING)
        if not venv.python(self.root):
            say(f"python {platform.python_version()}: making {venv.path(self.root)}")
            remove(*(venv.path(self.root, name) for name in ("bin", "lib", "lib64", "include", venv.READY)))
            os.makedirs(venv.path(self.root), exist_ok=True)
            fs.write(marker, "")
            self.program("venv", sys.executable, "-m", "venv", "--without-pip", venv.path(self.root))
        elif os.path.exists(marker):
            for name in mend(self.root):
                say(f"{name} was not whole; it is installed again")
        else:
            fs.write(marker, "")
        if host_info.answer([self.python, "-m", "pip", "--version"]) is None:
            self.program("ensurepip", self.python, "-m", "ensurepip", "--upgrade", "--default-pip")

    def torch(self) -> None:
        """The build of torch that fits the accelerator, before anything asks for it."""
        version = host_info.torch_pin(self.root)
        if version is None:
            return
        again = ["--force-reinstall", "--no-deps"] if self.was.get("accelerator", self.kind) != self.kind else []
        index, why = self.index(version)
        if why:
            say(why)
        if index:  # torch alone from there: with --no-deps no other package is
            # Said on the standard input: it may hold a password, and all users of a machine see command lines.
            named = "-r", "/dev/stdin"
            self.pip("torch", "--no-deps", *again, *named, given=f"--index-url {index}\ntorch=={version}\n")
            self.pip("what torch needs", *named, given=f"--extra-index-url {index}\ntorch=={version}\n")
        else:
            self.pip("torch", *again, f"torch=={version}")

    def index(self, version: str) -> tuple[str | None, str]:
        """Where torch comes from besides the server's own package index, and what is to be said about that."""
        if os.environ.get(INDEX):
            return os.environ[INDEX], "torch comes from REMOTE_TORCH_INDEX"
        if self.kind == "cuda" or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            return None, ""  # there the ordinary index has the build that fits
        index, problem = public_index(self.kind, version, self.found["runtime"])
        if index:
            return index, f"torch for {self.kind} comes from {index}"
        more = ", 4 GB more" if self.kind == "cpu" else ""
        said = f"torch comes from this server's own package index, which may give the build for CUDA{more}"
        return None, f"{problem}: {said}; REMOTE_TORCH_INDEX names another"

    def done(self) -> None:
        """Write down what there is now."""
        torch = self.tried()
        made = {
            "python": platform.python_version(),
            "accelerator": self.kind,
            "requirements": self.digest,
            "torch": torch[0] if torch else None,
        }
        fs.write(venv.path(self.root, venv.INSTALLED), "")
        fs.write(venv.path(self.root, venv.READY), json.dumps(made))
        os.unlink(venv.path(self.root, venv.INSTALLING))
        say(f"ready: Python {made['python']}" + (f", torch {torch[0]} for {self.kind}" if torch else ""))

    def tried(self) -> list[Any] | None:
        """Import torch, and say where it does not find the GPU."""
        if host_info.torch_pin(self.root) is None:
            return None
        done = subprocess.run([self.python, "-c", TRIED], capture_output=True, cwd="/")
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise ProgramFailed(
                f"torch was installed and cannot be imported: {said[-1] if said else done.returncode}"
            )
        version, cuda, hip, available = found = json.loads(done.stdout)
        if self.found["gpus"] and not available:
            built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "a CPU alone"
            here = {"cuda": "CUDA", "rocm": "ROCm"}[self.kind]
            say(
                f"warning: torch {version} is made for {built} and finds no GPU; the driver there is for {here} "
                f"{self.found['runtime'] or 'of an unknown version'}. Have it updated, or name an index with "
                f"a build for it by REMOTE_TORCH_INDEX, as {PUBLIC}/cu126, remove .venv and run ssh-init again"
            )
        return list(found)

    # Programs

    @property
    def python(self) -> str:
        return venv.path(self.root, "bin", "python")

    def pip(self, what: str, *words: str, given: str = "") -> None:
        """`python -m pip install`, of which all is shown but what is there already."""
        options = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
        self.program(f"pip install {what}", self.python, "-m", "pip", "install", *options, *words, given=given)

    def program(self, what: str, *words: str, given: str = "") -> None:
        """Run one with `given` on its standard input. Raises: Failed unless it succeeds."""
        process = subprocess.Popen(
            words,
            cwd=self.root,
            env=self.surroundings(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(self.lock,),
            process_group=0,
        )
        try:
            assert process.stdin
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(given.encode())
            for line in process.stdout or ():
                text = line.decode(errors="replace").rstrip()
                if not QUIET.match(text):
                    say(text)
            code = process.wait()
        except BaseException:  # this process was told to end, and those that pip has started with it
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        if code:
            raise ProgramFailed(f"{what} failed (exit code {code})")

    def surroundings(self) -> dict[str, str]:
        """What pip finds: nothing is written outside of the project's folder, and no code but its own is seen."""
        cache = os.path.join(self.root, ".cache")
        temporary = os.path.join(cache, "tmp")
        os.makedirs(temporary, exist_ok=True)
        found = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", INDEX)}
        return dict(found, PIP_CACHE_DIR=os.path.join(cache, "pip"), TMPDIR=temporary, PIP_USER="0")


def public_index(kind: str, version: str, runtime: str | None, base: str = PUBLIC) -> tuple[str | None, str]:
    """PyTorch's own index that has torch `version` for `kind`, "cpu" or "rocm", and this Python.

    For ROCm it is the newest that is no newer than `runtime`, the machine's, else the oldest.
    Returns: the index or None, and then why.
    """
    page = _page(f"{base}/torch/")
    host = base.partition("://")[2].partition("/")[0]
    if page is None:
        return None, f"{host} does not answer"
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    names = re.findall(rf"torch-{re.escape(version)}(?:\+|%2B)({kind}[\d.]*)-{tag}-[^\"<>]*x86_64\.whl", page)
    builds = sorted(set(names), key=_numbers)
    if not builds:
        return None, f"{host} has no torch {version} for {kind} and this Python"
    fitting = [build for build in builds if not runtime or _numbers(build) <= _numbers(runtime)[:2]]
    return f"{base}/{(fitting or builds[:1])[-1]}", ""


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _page(url: str) -> str | None:
    """A page, unless it does not come in time; a name server that does not answer counts too."""
    found: list[str] = []

    def get() -> None:
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                found.append(answer.read().decode(errors="replace"))
        except (OSError, ValueError):
            pass

    asking = threading.Thread(target=get, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return found[0] if found else None


def mend(root: str) -> list[str]:
    """Have pip take for absent what a killed pip has left half of.

    It takes for whole whatever has a METADATA. A RECORD is written last, and lists every file with its size.
    Returns: the names of what was not whole.
    """
    broken = []
    for packages in glob.glob(venv.path(glob.escape(root), "lib", "python*", "site-packages")):
        for left in glob.glob(os.path.join(glob.escape(packages), "~*")):
            shutil.rmtree(left, ignore_errors=True)
        for info in glob.glob(os.path.join(glob.escape(packages), "*.dist-info")):
            if not _whole(packages, info):
                shutil.rmtree(info)
                broken.append(os.path.basename(info)[: -len(".dist-info")])
    return sorted(broken)


def _whole(packages: str, info: str) -> bool:
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


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
