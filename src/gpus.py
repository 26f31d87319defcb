"""GPUs that are named and not there: a problem where they were typed, a warning where a file names them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf

from . import config_files, schema
from .cli_args import Call
from .utils import environment

KEY = "cuda_visible_devices"
VARIABLE = "CUDA_VISIBLE_DEVICES"
REMEDY = 'name GPUs of this machine (nvidia-smi -L lists them), or "" for the CPU'


def missing(visible: str) -> list[str]:
    """The GPUs in `visible` ("0", "0,3") that do not respond on this machine."""
    named = [word.strip() for word in visible.split(",")]
    named = [word for word in named if word.isdigit() or word.startswith("GPU-")]  # nvidia-smi lists no MIG- by id
    if not named or len(environment.gpus(visible)) >= len(named):
        return []
    return [word for word in named if not environment.gpus(word)]


def check(call: Call, overrides: Sequence[str], values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The problems and the warnings of `cuda_visible_devices` in the composed `values` of one job.

    The default of the schema and of the shipped files, GPU 0, is not a wish: a machine without GPUs uses its CPU.
    """
    visible = str(values.get(KEY) or "")
    if values.get("plan_device") or not (absent := missing(visible)):
        return [], []
    fact = f"{KEY}={visible}: this machine has no GPU {' and no GPU '.join(absent)}"
    if any(word.lstrip("+").startswith(f"{KEY}=") for word in overrides):
        return [f"{fact}; {REMEDY}"], []
    used = "" if len(absent) < len(visible.split(",")) else ", so the CPU is used"
    return [], [f"{fact}{used}; {REMEDY}"] if _is_wish(call, visible) else []


def _is_wish(call: Call, visible: str) -> bool:
    """Whether a person has chosen the value: in the environment, in an own file, or in a preset."""
    if visible == os.environ.get(VARIABLE) or visible != schema.DEFAULT_GPUS:
        return True
    path = call.config_dir / f"{call.config_name}.yaml"
    if not path.is_file() or config_files.SHIPPED in path.parents or call.config_name == "config_used":
        return False
    written = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    return KEY in written and not OmegaConf.is_interpolation(OmegaConf.create(written), KEY)
