"""plan: what a training would take, known before it is paid for; and the refusal of what cannot fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from src.errors import ConfigError, RunError
from src.schema import PlanConfig, TrainConfig
from src.train.prepare import PreparedData, prepare_training
from src.utils import environment
from src.utils.environment import Reasoned
from src.utils.logs import log

if TYPE_CHECKING:
    from src.train.plan.estimate import MemoryPlan


def plan(cfg: PlanConfig) -> int:
    """Print what the training of these settings would take. Returns 0 if it fits, 2 if not."""
    here = environment.choose_device(cfg.cuda_visible_devices).value
    if cfg.probe and cfg.plan_device not in (None, here):
        raise ConfigError(
            f"probe=true trains here, on {here}, and plan_device={cfg.plan_device} is no such device"
        )
    ready = prepare_training(cfg, *_planned_device(cfg))
    found = plan_memory(ready, cfg)
    if found is None:
        return 2
    if cfg.probe and (found.fits or cfg.force):
        from src.train.plan import table
        from src.train.plan.probe import probe

        table.log_probe(probe(ready, resolve_checkpointing(cfg, found), found), found)
    return 0 if found.fits else 2


def _planned_device(cfg: PlanConfig) -> tuple[Reasoned, Reasoned]:
    """The device and the precision to plan for."""
    device = environment.choose_device(cfg.cuda_visible_devices)
    if cfg.plan_device in (None, device.value):
        return device, environment.choose_dtype(cfg.bf16, cfg.cuda_visible_devices)
    if cfg.plan_device == "cpu":
        return Reasoned("cpu", "plan_device=cpu"), environment.choose_dtype(cfg.bf16, "")
    value = "float16" if cfg.bf16 is False else "bfloat16"
    return Reasoned("cuda", "plan_device=cuda"), Reasoned(value, f"bf16={str(cfg.bf16).lower()}, plan_device=cuda")


def plan_memory(ready: PreparedData, cfg: TrainConfig) -> MemoryPlan | None:
    """The plan, printed, with what to change where it does not fit; None, and said, of a model that has none."""
    from src.train.plan import estimate, table

    device, dtype = ready.device.value, ready.dtype.value
    kernels = environment.choose_kernels(cfg.use_liger_kernel, cfg.cuda_visible_devices, device)
    estimator = estimate.MemoryEstimator(
        ready.base, ready.examples, ready.held_out, dtype, device, ready.chat.tokenizer,
        estimate.fixed_bytes(device), ready.labels, with_liger=kernels.value == "liger",
    )  # fmt: skip
    try:
        found = estimator.plan(cfg, estimate.available_memory(cfg, device))
    except estimate.PlanUnavailable as error:
        log.warning("what this training takes cannot be known before: %s", error)
        return None
    table.log_plan(found)
    if not found.fits_memory:
        table.log_alternatives(list(estimator.instead(found, cfg)), found.available.bytes)
    return found


def resolve_checkpointing(cfg: TrainConfig, found: MemoryPlan | None) -> TrainConfig:
    """The settings with `gradient_checkpointing=auto` decided; without a plan it is off."""
    chosen = found.checkpointing.value == "true" if found else cfg.gradient_checkpointing is True
    return replace(cfg, gradient_checkpointing=chosen)


def check_fits(found: MemoryPlan | None, cfg: TrainConfig) -> None:
    """Raises: RunError if the training cannot fit, unless force=true."""
    if found is None:
        return
    from src.train.plan.memory import format_gb

    problems = [
        f"the disk of {place} has {format_gb(free)} GB free, and the training would write {format_gb(needed)} GB"
        for place, needed, free in found.full_disks
    ]
    if not found.fits_memory:
        problems.insert(
            0, f"this training needs {format_gb(found.memory.peak)} GB of memory, and there are "
            f"{format_gb(found.available.bytes)} GB ({found.available.reason})",
        )  # fmt: skip
    if problems and cfg.force:
        for problem in problems:
            log.warning("force=true: %s", problem)
    elif problems:
        raise RunError(*problems, hint="see the plan above for what needs less; force=true trains anyway")
