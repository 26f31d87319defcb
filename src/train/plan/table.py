"""The plan for people: a table that a log can hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta

from rich import box
from rich.table import Table

from src.train.plan.estimate import Alternative, MemoryPlan
from src.train.plan.memory import CUDA_CONTEXT, MOMENTS, format_gb
from src.train.plan.probe import ProbeResult
from src.utils.files import disk_free
from src.utils.logs import SafeConsole, log


def log_plan(plan: MemoryPlan) -> None:
    """Log what a training would take, and whether it fits."""
    _log("plan", _lines(plan))


def log_alternatives(found: Sequence[Alternative], available: int) -> None:
    """Log which changes of settings would need less."""
    if found:
        verdicts = ["fits" if i.peak <= available else "is still too much" for i in found]
        _log("instead", [(f"{format_gb(i.peak)} GB {v}", i.change) for i, v in zip(found, verdicts, strict=True)])


def log_probe(found: ProbeResult, plan: MemoryPlan) -> None:
    """Log what the first steps say of the whole training."""
    besides = plan.evaluations * found.evaluation + plan.checkpoints * found.checkpoint
    seconds = plan.tokens / found.tokens_per_second + besides
    predicted = plan.memory.peak - (CUDA_CONTEXT if plan.device == "cuda" else 0)
    rows = [
        ("tokens/s", f"{found.tokens_per_second:,.0f}"),
        ("time", f"{found.step:.3g} s a step, {found.evaluation:.3g} s an evaluation, {found.checkpoint:.3g} s a "
         "checkpoint"),
        ("whole training", f"{timedelta(seconds=round(seconds))} (h:mm:ss), {besides:.3g} s of it evaluations and "
         "checkpoints"),
        ("peak memory", f"{format_gb(found.peak)} GB measured, {format_gb(predicted)} GB planned "
         f"({predicted / found.peak - 1:+.0%})"),
    ]  # fmt: skip
    _log(f"probe of {found.steps} steps", rows)


def _log(title: str, rows: Sequence[tuple[str, str]] | Iterator[tuple[str, str]]) -> None:
    table = Table(box=box.SIMPLE, show_header=False, title=title, title_justify="left", title_style="")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = SafeConsole(width=110, color_system=None)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        if line.strip():
            log.info("%s", line.rstrip())


def _lines(plan: MemoryPlan) -> Iterator[tuple[str, str]]:
    share = 100 * plan.trainable / plan.parameters
    yield "device", f"{plan.device}, {plan.dtype}"
    yield "method", plan.method
    yield "parameters", f"{plan.parameters:,}, {plan.trainable:,} of them trained ({share:.2f} %)"
    yield "steps", f"{plan.steps:,}, {plan.steps_an_epoch:,} an epoch"
    yield "besides", f"{plan.evaluations:,} evaluations, {plan.checkpoints:,} checkpoints"
    yield "tokens", f"{plan.tokens:,}, {plan.tokens_an_epoch:,} an epoch"
    rows, tokens = plan.longest_batch
    yield "longest batch", f"{tokens:,} tokens in {rows:,} rows"
    yield "gradient_checkpointing", str(plan.checkpointing)
    yield "peak memory", f"{format_gb(plan.memory.peak)} GB, at {MOMENTS[plan.memory.at]}"
    for part, size in plan.memory.parts.items():
        yield f"  {part}", f"{format_gb(size):>9} GB"
    for need in plan.disk:
        yield "disk", f"{format_gb(need.bytes)} GB in {need.place}: {need.what}"
    yield from _verdict(plan)


def _verdict(plan: MemoryPlan) -> Iterator[tuple[str, str]]:
    compared = f"{format_gb(plan.memory.peak)} of {format_gb(plan.available.bytes)} GB ({plan.available.reason})"
    yield "memory", f"fits: {compared}" if plan.fits_memory else f"DOES NOT FIT: {compared}"
    full = {place: (needed, free) for place, needed, free in plan.full_disks}
    for place in {n.place: 0 for n in plan.disk}:
        needed, free = full.get(place, (sum(n.bytes for n in plan.disk if n.place == place), disk_free(place)))
        verdict = "DOES NOT FIT" if place in full else "fits"
        yield "disk", f"{verdict}: {format_gb(needed)} of {format_gb(free)} GB free for {place}"
