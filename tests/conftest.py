"""The number of xdist workers; the fixture `assay`, the command line in an empty folder without heavy imports."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest

from src.utils.workers import cores

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "tokenizers",
)
NUMERIC = (
    "numpy",
    "pandas",
    "scipy",
    "sklearn",
    "sacrebleu",
    "rouge_score",
    "tensorboard",
    "optuna",
    "sqlalchemy",
)

# A sitecustomize module. A forbidden package can be found, as the check of the pass-through arguments does, but
# executing it ends the process: no `except` can hide that.
SITE = """
import os, sys, traceback
from importlib.machinery import PathFinder

FORBIDDEN = set(os.environ["FORBIDDEN_IMPORTS"].split())


class Refusing:
    def create_module(self, spec):
        traceback.print_stack()
        sys.stderr.write(f"forbidden import: {spec.name}\\n")
        sys.stderr.flush()
        os._exit(99)

    def exec_module(self, module):
        raise AssertionError("never reached")


class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in FORBIDDEN:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = Refusing()
        return spec


sys.meta_path.insert(0, Forbid())
"""


MOST_NEEDED = 3 << 30  # bytes that the tests of one process take at most, their children included

os.environ["ASSAY_PROGRAM"] = "make"  # messages name commands as make has them
if "PYTEST_XDIST_WORKER" in os.environ:  # each of the processes has one core, and so have those that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: a process for each core that may be used, as far as memory goes."""
    return max(1, min(cores(), psutil.virtual_memory().available // MOST_NEEDED))


def pytest_collection_finish() -> None:
    """What was imported and collected is walked through no more when garbage is collected: each run does that."""
    gc.collect()
    gc.freeze()


class AssayCommand:
    """Runs `python -m src.main` in a child process, whose working directory is `cwd`."""

    def __init__(self, folder: Path) -> None:
        self.cwd = folder / "work"
        self.site = folder / "site"
        self.cwd.mkdir()
        self.site.mkdir()
        (self.site / "sitecustomize.py").write_text(SITE)

    def __call__(
        self,
        *words: str,
        forbidden: Iterable[str] = (*HEAVY, *NUMERIC),
        module: str = "src.main",
        stdout: Any = subprocess.PIPE,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end; `variables` are added to an environment that holds little else."""
        kept = {k: os.environ[k] for k in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if k in os.environ}
        paths = {
            "PYTHONPATH": os.pathsep.join([str(self.site), str(ROOT)]),
            "LANG": "C.UTF-8",
            "ASSAY_PROGRAM": "make",
        }
        return subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=self.cwd,
            env=kept | paths | {"FORBIDDEN_IMPORTS": " ".join(forbidden)} | variables,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )

    def left(self) -> list[str]:
        """Everything below the working directory."""
        return sorted(str(p.relative_to(self.cwd)) for p in self.cwd.rglob("*"))


@pytest.fixture
def assay(tmp_path: Path) -> AssayCommand:
    return AssayCommand(tmp_path)
