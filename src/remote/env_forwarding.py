"""Which variables of this environment a run on the server gets: they travel on the connection's input only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.errors import ConfigError

KNOWN = re.compile(
    r"HF_(TOKEN|ENDPOINT|REPO_ID|HUB_\w+)|HUGGING_FACE_HUB_TOKEN|LAKEFS_\w+|AWS_\w+|WANDB_\w+|MLFLOW_\w+|COMET_\w+"
)
OF_THIS_MACHINE = re.compile(  # its paths, and what is defined in a file of it
    r"REMOTE_\w+|TMPDIR|PYTHON(PATH|HOME)|VIRTUAL_ENV|HF_HOME|TRANSFORMERS_CACHE|PATH|HOME|AWS_(DEFAULT_)?PROFILE"
    r"|\w+_(CACHE|DIR|FILE|PATH|BUNDLE)"
)
REFERENCE = re.compile(r"\$\{oc\.env:(\w+)(,)?")  # with a default after the comma


def carried(words: Sequence[str], environment: Mapping[str, str], dotenv: Path = Path(".env")) -> dict[str, str]:
    """The names that `.env` gives, those of known services, of REMOTE_ENV, and those that `words` refer to.

    Paths of this machine and REMOTE_* stay here.
    Raises: ConfigError if a variable that is referred to is not set.
    """
    references = [found for word in words for found in REFERENCE.findall(word)]
    asked = [name for name, default in references if not default or name in environment]
    asked += environment.get("REMOTE_ENV", "").replace(",", " ").split()
    if missing := [name for name in dict.fromkeys(asked) if name not in environment]:
        raise ConfigError(*(f"{name} is not set in the environment" for name in missing))
    names = [name for name in (*_written(dotenv), *filter(KNOWN.fullmatch, environment)) if name in environment]
    kept = [name for name in names if not OF_THIS_MACHINE.fullmatch(name)]
    return {name: environment[name] for name in (*kept, *asked)}


def _written(dotenv: Path) -> list[str]:
    if not dotenv.is_file():
        return []
    from dotenv import dotenv_values

    return list(dotenv_values(dotenv))


def columns() -> dict[str, str]:
    """How wide tables may be: as this terminal is."""
    import shutil

    return {"COLUMNS": str(shutil.get_terminal_size((100, 24)).columns)} if os.isatty(1) else {}
