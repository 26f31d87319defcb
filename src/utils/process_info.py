"""How this process was started, and what that allows: its rank, its launcher's configuration, its imports.

torchrun sets the rank. A launcher (torchrun's agent, a Slurm job) passes its validated configuration through the
environment, so that every worker has the same one and no file holds it. Secrets are passed as references to the
environment variables that hold them, which the workers inherit.

A process that runs one command and exits may also take shortcuts: transformers, peft and accelerate import every
optional package that they find (bitsandbytes alone takes more than a second), and imports create a million objects
that the garbage collector scans repeatedly.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .secrets import URL_PART, restore_secrets, to_references

LAUNCH_CONFIG = "ASSAY_LAUNCH_CONFIG"
OPTIONAL = ("scipy", "sklearn", "pandas", "datasets", "boto3", "optuna", "mlflow", "wandb")
_is_cli_process = False


class ProcessInfo(NamedTuple):
    """Position of this process in the process group."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launched: bool = False  # by torchrun, or by a launcher that sets the same variables

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes the run directory and logs."""
        return self.rank == 0


def process_info() -> ProcessInfo:
    """Read the variables that torchrun sets; the defaults of a single process where they are missing."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(os.environ.get(name, "").isdigit() for name in names):
        return ProcessInfo()
    rank, world_size, local_rank = (int(os.environ[name]) for name in names)
    return ProcessInfo(rank, world_size, local_rank, True)


def launch_env(settings: Mapping[str, Any], command: Sequence[str]) -> dict[str, str]:
    """The environment variables that pass `settings` and the user's `command` line to a worker."""
    text = json.dumps(to_references({"settings": settings, "command": list(command), "launcher": os.getpid()}))
    parts = {name: value for name, value in os.environ.items() if name.startswith(URL_PART)}
    return parts | {LAUNCH_CONFIG: base64.b64encode(zlib.compress(text.encode())).decode()}


def inherited_settings() -> dict[str, Any] | None:
    """The settings that the launcher passed; None if the user started this process."""
    found = _inherited()
    return dict(restore_secrets(found["settings"])) if found else None


def launcher_command() -> list[str] | None:
    """The command line of the launcher; None if the user started this process."""
    found = _inherited()
    return list(found["command"]) if found else None


def launcher_pid() -> int | None:
    """The process id of the launcher; None if the user started this process."""
    found = _inherited()
    return int(found["launcher"]) if found else None


def _inherited() -> dict[str, Any] | None:
    if LAUNCH_CONFIG not in os.environ:
        return None
    return dict(json.loads(zlib.decompress(base64.b64decode(os.environ[LAUNCH_CONFIG]))))


def mark_cli_process() -> None:
    """Declare that this process runs one command and exits; without it block_imports and freeze_gc do nothing."""
    global _is_cli_process
    _is_cli_process = True
    gc.set_threshold(1_000_000, 50, 100)


def block_imports(*packages: str) -> None:
    """Make imports of `packages` fail from now on, as if they were not installed.

    Packages that are imported already stay. Libraries remember what they found, so a later command of the same
    process would miss the packages: this is for a process that runs one command.
    """
    if _is_cli_process:
        missing = dict.fromkeys(p for p in packages if p not in sys.modules)
        sys.modules.update(missing)  # type: ignore[arg-type]  # None makes the import fail


def freeze_gc() -> None:
    """Exclude the objects that exist now from later garbage collections, and collect more often than at import.

    Collections stay on: a reference cycle may hold a large tensor.
    """
    if _is_cli_process:
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)
