"""Quick imports: large optional packages that a command does not use are not looked at.

transformers, peft and accelerate import whatever optional package they find: bitsandbytes alone costs more
than a second, used or not. And importing makes a million objects, which Python's garbage collector counts
again and again.
"""

from __future__ import annotations

import gc
import sys

OPTIONAL = ("scipy", "sklearn", "pandas", "datasets", "boto3", "optuna", "mlflow", "wandb")
_process_is_ours = False


def mark_cli_process() -> None:
    """Say that this process runs one command and ends: what is found missing may stay missing."""
    global _process_is_ours
    _process_is_ours = True
    gc.set_threshold(1_000_000, 50, 100)


def block_imports(*packages: str) -> None:
    """From here on `packages` that are not imported yet count as not installed, if the process is ours.

    Libraries remember what they found: elsewhere a later command of the same process would miss them.
    """
    if _process_is_ours:
        missing = dict.fromkeys(p for p in packages if p not in sys.modules)
        sys.modules.update(missing)  # type: ignore[arg-type]  # None is what makes an import fail


def freeze_gc() -> None:
    """What is there now stays: the garbage collector need not look at it again, if the process is ours.

    It looks at what comes more often than at imports: a cycle may hold a large tensor.
    """
    if _process_is_ours:
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)
