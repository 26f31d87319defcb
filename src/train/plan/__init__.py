"""The planner: steps, memory and disk of a training run before it starts. The stage plan prints them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich import box
from rich.table import Table

from ... import outcome
from ...errors import ConfigError, RunError
from ...model.folder_check import has_weights
from ...schema import PlanConfig, TrainConfig
from ...utils import environment
from ...utils.environment import Reasoned
from ...utils.files import disk_free
from ...utils.logs import SafeConsole, log, log_verdict
from ...utils.units import count, format_duration, format_rate, format_size
from ..prepare import PreparedData, load_rows, tokenize, with_eval_path
from .memory import CUDA_CONTEXT, MOMENTS, Alternative, MemoryPlan, ProbeResult, format_bytes, format_of


def plan(cfg: PlanConfig) -> int:
    """Print what a training run with these settings needs. Returns 0 if it fits, 2 if not."""
    cfg = with_eval_path(cfg)
    device = environment.choose_device(cfg.cuda_visible_devices).value
    if cfg.probe and cfg.plan_device not in (None, device):
        raise ConfigError(
            f"probe=true trains on this machine's {device}, which is not plan_device={cfg.plan_device}",
            hint="remove probe or plan_device",
        )
    planned_device, dtype = _planned_device(cfg)
    data = tokenize(load_rows(cfg), cfg, planned_device, dtype)
    found = plan_memory(data, cfg)
    if found is None:
        return 2
    folder = data.base.folder
    if folder and not has_weights(folder):
        log.warning("%s has no safetensors weights: download them before you train", folder)
    outcome.report(document={"plan": found.as_dict()})
    if cfg.probe and (found.fits or cfg.force):
        from .probe import probe

        measured = probe(data, resolve_checkpointing(cfg, found), found)
        outcome.report(document={"probe": measured._asdict()})
        log_probe(measured, found)
    report_verdict(found)
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


def plan_memory(data: PreparedData, cfg: TrainConfig) -> MemoryPlan | None:
    """Log the plan, and alternatives if it does not fit. None if the sizes of the model are unknown."""
    from . import arithmetic, estimate

    device, dtype = data.device.value, data.dtype.value
    kernels = environment.choose_kernels(cfg.use_liger_kernel, cfg.cuda_visible_devices, device)
    available, fixed = estimate.available_memory(cfg, device), estimate.fixed_bytes(device)
    for kind in (estimate.MemoryEstimator, arithmetic.ArithmeticEstimator):
        estimator = kind(
            data.base, data.examples, data.held_out, dtype, device, data.chat.tokenizer, fixed, data.labels,
            with_liger=kernels.value == "liger",
        )  # fmt: skip
        try:
            found = estimator.plan(cfg, available)
            break
        except estimate.PlanUnavailable as error:
            log.warning(kind.unavailable, error)
    else:
        return None
    _log_table("plan", _plan_rows(found))
    if not found.fits_memory:
        log_alternatives(list(estimator.alternatives(found, cfg)), found.available.bytes)
    return found


def resolve_checkpointing(cfg: TrainConfig, found: MemoryPlan | None) -> TrainConfig:
    """The settings with `gradient_checkpointing=auto` resolved; without a plan it is off."""
    chosen = found.checkpointing.value == "true" if found else cfg.gradient_checkpointing is True
    return replace(cfg, gradient_checkpointing=chosen)


def check_fits(found: MemoryPlan | None, cfg: TrainConfig) -> None:
    """Raises: RunError if the run does not fit into memory or disk, unless force=true."""
    if found is None:
        return
    problems = [
        f"the disk of {place} has {format_bytes(free)} free, and the run would write {format_bytes(needed)}"
        for place, needed, free in found.full_disks
    ]
    if not found.fits_memory:
        problems.insert(
            0, f"this run needs {format_bytes(found.memory.peak)} of memory, and "
            f"{format_bytes(found.available.bytes)} are available ({found.available.reason})"
            + f"; the estimate is rough: {found.roughness}" * bool(found.roughness),
        )  # fmt: skip
    if problems and cfg.force:
        for problem in problems:
            log.warning("force=true: %s", problem)
    elif problems:
        raise RunError(*problems, hint="the plan above lists settings that need less; force=true trains anyway")


def report_verdict(found: MemoryPlan) -> None:
    """Report in one sentence whether the run fits: the end of the stage."""
    rough = " (a rough estimate by arithmetic)" if found.roughness else ""
    needs = f"{format_of(found.memory.peak, found.available.bytes)} of memory{rough}"
    if found.fits:
        log_verdict(f"fits: {needs}, {count(found.steps, 'step')}")
        return
    full = [f"{place} has {format_size(free)} free of {format_size(n)}" for place, n, free in found.full_disks]
    log_verdict("does not fit: " + "; ".join([*([] if found.fits_memory else [f"needs {needs}"]), *full]))


# Tables in the log


def log_alternatives(found: Sequence[Alternative], available: int) -> None:
    """Log which changes of settings need less memory."""
    fitting = [each.change for each in found if each.peak <= available]
    outcome.report(document={"alternatives": [each._asdict() for each in found]}, fitting=(*fitting, "")[0])
    if found:
        verdicts = ["fits" if each.peak <= available else "is still too much" for each in found]
        rows = [(f"{format_bytes(a.peak)} {v}", a.change) for a, v in zip(found, verdicts, strict=True)]
        _log_table("alternatives", rows)


def log_probe(found: ProbeResult, plan: MemoryPlan) -> None:
    """Log what the first steps predict for the complete run."""
    other = plan.evaluations * found.evaluation + plan.checkpoints * found.checkpoint
    seconds = plan.tokens / found.tokens_per_second + other
    predicted = plan.memory.peak - (CUDA_CONTEXT if plan.device == "cuda" else 0)
    rows = [
        ("tokens/s", format_rate(found.tokens_per_second)),
        ("time", f"{found.step:.3g} s per step, {found.evaluation:.3g} s per evaluation, "
         f"{found.checkpoint:.3g} s per checkpoint"),
        ("complete run", f"{format_duration(seconds)}, {format_duration(other)} of it evaluations and "
         "checkpoints"),
        ("peak memory", f"{format_bytes(found.peak)} measured, {format_bytes(predicted)} planned "
         f"({predicted / found.peak - 1:+.0%})"),
    ]  # fmt: skip
    _log_table(f"probe of {found.steps} steps", rows)


def _log_table(title: str, rows: Sequence[tuple[str, str]] | Iterator[tuple[str, str]]) -> None:
    table = Table(box=box.SIMPLE, show_header=False, title=title, title_justify="left", title_style="")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = SafeConsole(
        width=min(110, shutil.get_terminal_size((110, 24)).columns), color_system=None, quiet=False
    )
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        if line.strip():
            log.info("%s", line.rstrip())


def _plan_rows(plan: MemoryPlan) -> Iterator[tuple[str, str]]:
    share = 100 * plan.trainable / plan.parameters
    yield "device", f"{plan.device}, {plan.dtype}"
    yield "method", plan.method
    yield "parameters", f"{plan.parameters:,}, {plan.trainable:,} of them trained ({share:.2f} %)"
    yield "steps", f"{plan.steps:,}, {plan.steps_per_epoch:,} per epoch"
    yield "evaluations", f"{plan.evaluations:,}"
    yield "checkpoints", f"{plan.checkpoints:,}"
    yield "tokens", f"{plan.tokens:,}, {plan.tokens_per_epoch:,} per epoch"
    rows, tokens = plan.longest_batch
    yield "longest batch", f"{count(tokens, 'token')} in {count(rows, 'example')}"
    yield "gradient_checkpointing", str(plan.checkpointing)
    if plan.roughness:
        yield "estimate", f"{plan.estimate}: {plan.roughness}"
    yield "peak memory", f"{format_bytes(plan.memory.peak)}, at {MOMENTS[plan.memory.at]}"
    for part, size in plan.memory.parts.items():
        yield f"  {part}", f"{format_bytes(size):>12}"
    for need in plan.disk:
        yield "disk", f"{format_bytes(need.bytes)} in {need.place}: {need.what}"
    yield from _verdict_rows(plan)


def _verdict_rows(plan: MemoryPlan) -> Iterator[tuple[str, str]]:
    compared = f"{format_of(plan.memory.peak, plan.available.bytes)} ({plan.available.reason})"
    yield "memory", f"fits: {compared}" if plan.fits_memory else f"DOES NOT FIT: {compared}"
    full = {place: (needed, free) for place, needed, free in plan.full_disks}
    for place in {n.place: 0 for n in plan.disk}:
        needed, free = full.get(place, (sum(n.bytes for n in plan.disk if n.place == place), disk_free(place)))
        verdict = "DOES NOT FIT" if place in full else "fits"
        yield "disk", f"{verdict}: {format_of(needed, free)} free for {place}"
