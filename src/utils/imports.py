"""Quick imports: large optional packages that a command does not use are not looked at.

transformers, peft and accelerate import whatever optional package they find: bitsandbytes alone costs more
than a second, used or not. And importing makes a million objects, which Python's garbage collector counts
again and again.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OPTIONAL = ("scipy", "sklearn", "pandas", "datasets", "boto3", "optuna", "mlflow", "wandb")
_process_is_ours = False


def own_process() -> None:
    """Say that this process runs one command and ends: what is found missing may stay missing."""
    global _process_is_ours
    _process_is_ours = True
    gc.set_threshold(100_000, 50, 100)


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Inside, `packages` that are not imported yet count as not installed, if the process is ours.

    Libraries remember what they found: elsewhere a later command of the same process would miss them.
    """
    hidden = [p for p in packages if p not in sys.modules] if _process_is_ours else []
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is what makes an import fail
    try:
        yield
    finally:
        for package in hidden:
            sys.modules.pop(package, None)
        if _process_is_ours:
            gc.freeze()  # what is there now stays
