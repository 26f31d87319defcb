"""Experiment trackers besides TensorBoard: what keeps one from being used, found before anything is loaded."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

WANDB_VARIABLES = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE")  # a login, or no need of one


def problems(names: Iterable[str]) -> list[str]:
    """Why the trackers `names` of `report_to` cannot be used, one sentence each."""
    found = []
    for name in names:
        if name in {"mlflow", "wandb"} and not _is_installed(name):
            found.append(f"report_to={name}: {name} is not installed; pip install {name}")
        elif name == "wandb" and not _wandb_login():
            remedy = "run wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline"
            found.append(f"report_to=wandb: there is no login to W&B; {remedy}")
    return found


def _is_installed(package: str) -> bool:
    """Whether a package can be imported. The folder ./wandb, which wandb writes, is none: it has no origin."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _wandb_login() -> bool:
    """Whether anything that wandb reads may hold a login; with a settings file, wandb decides."""
    if any(os.environ.get(name) for name in WANDB_VARIABLES):
        return True
    settings = (Path("wandb/settings"), Path.home() / ".config/wandb/settings")
    if any(path.is_file() for path in settings):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
