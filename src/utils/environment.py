"""Hardware and software of this machine, and the choices that depend on them, each with its reason.

Nothing here imports torch, so that settings which the hardware does not support are rejected at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from ..errors import ConfigError

NATIVE_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, arm64
FIRST_BF16_CAPABILITY = 8.0  # Ampere
CODE = Path(__file__).resolve().parents[1] / "code.json"  # written where the code is copied to a server
M_MMAP_THRESHOLD = -3  # malloc.h
CGROUPS = [  # limit, usage and statistics of a control group: version 2, version 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
]


class Gpu(NamedTuple):
    name: str
    memory_mib: int
    capability: float
    driver: str


class Reasoned(NamedTuple):
    """A choice and its reason."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


def gpus(visible: str) -> list[Gpu]:
    """The GPUs in `visible` ("0", "0,1", "" for none) as nvidia-smi reports them."""
    tool = shutil.which("nvidia-smi")
    return list(_gpus(tool, visible)) if tool and visible.strip() else []


@cache  # called often, and a call takes seconds if nothing keeps the driver loaded
def _gpus(tool: str, visible: str) -> tuple[Gpu, ...]:
    query = ["--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits"]
    done = subprocess.run([tool, f"--id={visible}", *query], capture_output=True, text=True, timeout=60)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    good = (r for r in rows if done.returncode == 0 and len(r) == 4)
    return tuple(
        Gpu(name, int(_number(memory)), _number(capability), driver) for name, memory, capability, driver in good
    )


def _number(text: str) -> float:
    """A number that nvidia-smi printed; 0 for `[N/A]`, as for memory that a GPU shares with the CPU."""
    try:
        return float(text)
    except ValueError:
        return 0.0


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the CPU; empty if /proc/cpuinfo does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((x.split(":")[1] for x in lines if x.startswith(("flags", "Features"))), "").split())


def choose_device(visible: str) -> Reasoned:
    """`cuda` or `cpu`."""
    found = gpus(visible)
    if found:
        return Reasoned("cuda", f"{found[0].name}, {found[0].memory_mib // 1024} GiB")
    return Reasoned("cpu", f"no GPU responds for cuda_visible_devices={visible!r}")


def choose_dtype(bf16: bool | str, visible: str) -> Reasoned:
    """`bfloat16`, `float16` or `float32` for the setting `bf16` (true, false, auto) on this hardware.

    Raises: ConfigError if bf16=true and the hardware has no bfloat16.
    """
    found = gpus(visible)
    if found:
        weakest = min(found, key=lambda gpu: gpu.capability)
        native = weakest.capability >= FIRST_BF16_CAPABILITY
        hardware = f"{weakest.name}, compute capability {weakest.capability}"
        fallback = "float16"
    else:
        native = bool(cpu_flags().intersection(NATIVE_BF16_FLAGS))
        hardware = "this CPU" if native else "this CPU has no bfloat16 instructions"
        fallback = "float32"
    if bf16 is True and not native:
        raise ConfigError(
            f"bf16=true is not supported by the hardware ({hardware})",
            hint=f"set bf16=auto or bf16=false to use {fallback}",
        )
    if bf16 is False:
        return Reasoned(fallback, "bf16=false")
    if native:
        return Reasoned("bfloat16", f"bf16={str(bf16).lower()}, native on {hardware}")
    return Reasoned(fallback, f"bf16=auto, {hardware}")


def choose_tf32(wanted: bool | str, visible: str) -> Reasoned:
    """`on` or `off`: whether fp32 matrix products use TF32, with a 10-bit mantissa (NVIDIA A100 whitepaper).

    Raises: ConfigError if tf32=true and the hardware has no TF32.
    """
    found = gpus(visible)
    native = bool(found) and min(gpu.capability for gpu in found) >= FIRST_BF16_CAPABILITY
    if wanted is True and not native:
        raise ConfigError("tf32=true needs a GPU with TF32, and this machine has none", hint="set tf32=auto")
    if wanted is False or not native:
        return Reasoned("off", "tf32=false" if wanted is False else "no GPU with TF32")
    return Reasoned("on", f"tf32={str(wanted).lower()}, {found[0].name} has it")


def choose_kernels(use_liger: bool | str, visible: str, planned_for: str | None = None) -> Reasoned:
    """`liger` or `plain`: the kernels for norms, rotary embeddings and activations.

    `planned_for` is a device that may be on another machine, which is assumed to have Liger only if the setting
    says so.
    Raises: ConfigError if use_liger_kernel=true and Liger cannot run.
    """
    if planned_for == "cuda" and not gpus(visible):
        if use_liger is True:
            return Reasoned("liger", "use_liger_kernel=true")
        return Reasoned("plain", "use_liger_kernel=true plans for Liger")
    installed = bool(find_spec("liger_kernel"))
    if use_liger is True and not (gpus(visible) and installed):
        missing = "liger-kernel is not installed" if gpus(visible) else "it needs a GPU"
        raise ConfigError(
            f"use_liger_kernel=true: {missing}", hint="pip install -r requirements-gpu.txt, or set it to auto"
        )
    if use_liger is False or not gpus(visible):
        return Reasoned("plain", "use_liger_kernel=false" if use_liger is False else "Liger needs a GPU")
    return Reasoned(*(("liger", "installed") if installed else ("plain", "liger-kernel is not installed")))


def git_state() -> dict[str, str | None]:
    """`commit` of the code, and `diff_sha256` of its uncommitted changes (None without changes).

    A copy without its git history has both in CODE, an installed package in neither: a parent folder may be the
    checkout of another project.
    """
    root = CODE.parents[1]
    if not (root / ".git").exists():
        recorded = json.loads(CODE.read_text(encoding="utf-8")) if CODE.is_file() else {}
        return {"commit": recorded.get("commit"), "diff_sha256": recorded.get("diff_sha256")}

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], capture_output=True, cwd=root)
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None

    try:
        commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD", "--", "src", "configs", "scripts")
    except FileNotFoundError:
        return {"commit": None, "diff_sha256": None}
    digest = hashlib.sha256(diff.encode()).hexdigest() if diff else None
    return {"commit": commit.strip() if commit else None, "diff_sha256": digest}


def versions() -> dict[str, str]:
    """`{package: version}` of all installed packages."""
    read = [d.metadata for d in metadata.distributions()]  # each access reads the file again
    found = {about["Name"]: about["Version"] for about in read if about["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def hardware(visible: str) -> dict[str, Any]:
    """Platform, CPU, memory and GPUs, for the manifest."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [gpu._asdict() for gpu in gpus(visible)],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


class Capacity(NamedTuple):
    """Bytes of memory, and where the number comes from."""

    bytes: int
    reason: str


def memory_available(device: str, visible: str) -> Capacity:
    """The memory of the device that this process can use: what it uses already, and what is free."""
    if device == "cuda" and (left := _gpu_memory_free(visible)):
        return left
    own = psutil.Process().memory_info().rss
    free, reason = psutil.virtual_memory().available, "RAM available on this machine"
    limit = _cgroup_available()
    if limit is not None and limit < free:
        free, reason = limit, "RAM available in this container"
    return Capacity(free + own, f"{reason}, plus {own / 1e9:.2f} GB that this process uses")


def memory_total(device: str, visible: str) -> Capacity:
    """The total memory of the device, whatever is in use."""
    found = gpus(visible) if device == "cuda" else []
    if found and found[0].memory_mib:
        return Capacity(found[0].memory_mib << 20, f"memory of the {found[0].name}")
    total, reason = psutil.virtual_memory().total, "RAM of this machine"
    limit = _cgroup_limit()
    return Capacity(limit, "RAM of this container") if limit and limit < total else Capacity(total, reason)


def _gpu_memory_free(visible: str) -> Capacity | None:
    """Free memory of the first GPU in `visible`; None if nvidia-smi does not report it."""
    first = visible.split(",")[0]
    query = ["--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(["nvidia-smi", f"--id={first}", *query], capture_output=True, text=True, timeout=60)
    free, _, total = done.stdout.partition(",")
    if done.returncode or not _number(free):
        return None
    return Capacity(int(_number(free)) << 20, f"free of {int(_number(total)):,} MiB on the GPU {first}")


def _cgroup_available(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the control group of this process (a container) may still allocate; None without a limit."""
    for names in CGROUPS:
        limit, used, stat = (root / name for name in names)
        try:
            numbers = dict(line.split() for line in stat.read_text().splitlines())
            cached = int(numbers.get("total_inactive_file", numbers.get("inactive_file", 0)))
            return max(0, int(limit.read_text()) - int(used.read_text()) + cached)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _cgroup_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The memory limit of this process's control group in bytes; None without a limit."""
    for limit, _, _ in CGROUPS:
        with suppress(OSError, ValueError):
            return int((root / limit).read_text())
    return None


def resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    return int(psutil.Process().memory_info().rss)


def release_freed_memory() -> None:
    """Make glibc return large blocks to the system when they are freed, instead of keeping them in its heap.

    By default the threshold for that grows with the freed blocks (mallopt(3), M_MMAP_THRESHOLD) until the tensors
    of a training run are in the heap, whose fragmentation costs a fifth to a third of the memory. Does nothing
    without glibc.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
