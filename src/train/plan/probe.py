"""Runs the first steps of a training run to measure its speed and peak memory, and discards them."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...runs import Run
from ...schema import TrainConfig
from ...utils.process_info import process_info
from .. import fit
from ..batch_sampler import Schedule, build_sampler
from ..callbacks import RunRecorder
from ..prepare import PreparedData, build_model
from .memory import MemoryPlan, ProbeResult

PROBE_STEPS, TIMED_STEPS = 20, 15  # the last TIMED_STEPS give the speed


class Stopwatch(RunRecorder):
    """Records when steps, evaluations and checkpoints end, and writes nothing to the run."""

    def __init__(self, run: Run) -> None:
        super().__init__(run, writes=False)
        self.ends: list[tuple[float, int]] = []  # of each step: time, and tokens so far
        self.since_step = {"evaluation": 0.0, "checkpoint": 0.0}
        self.last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self.last = time.monotonic()
        self.ends.append((self.last, int(state.num_input_tokens_seen)))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
        self._lap("evaluation")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_save(args, state, control, **kwargs)
        self._lap("checkpoint")

    def pace(self, steps: int) -> tuple[float, int, int]:
        """Seconds, tokens and number of the last `steps` steps, or of all if there are fewer."""
        ends = [(self.started, 0), *self.ends][-steps - 1 :]
        (began, before), (ended, after) = ends[0], ends[-1]
        return ended - began, after - before, len(ends) - 1

    def _lap(self, what: str) -> None:
        now = time.monotonic()
        self.since_step[what], self.last = now - self.last, now


def probe(data: PreparedData, cfg: TrainConfig, plan: MemoryPlan) -> ProbeResult:
    """Train for a few steps in a temporary folder, which is removed."""
    short = replace(
        cfg, max_steps=min(PROBE_STEPS, plan.steps), save_steps=plan.steps, eval_steps=plan.steps, report_to=[],
        checkpoint_mirror=None, early_stopping_patience=None, load_best_model_at_end=False,
    )  # fmt: skip
    peak = _start_peak_meter(data.device.value)
    model, _ = build_model(data, cfg, plan.steps)
    tokenizer, dtype, pack_to = data.chat.tokenizer, data.dtype.value, cfg.max_length if cfg.packing else None
    sampler = build_sampler(data.examples, short, short.seed, pack_to, process_info())
    schedule = Schedule.from_batches(len(sampler), short)
    collator_and_loss = fit.CollatorAndLoss.for_model(
        model, tokenizer, dtype, task=short.task, method=short.method, speed=short, loss=short,
        distributed=short.distributed,
    )  # fmt: skip
    fit.set_numerics(short, short.cuda_visible_devices)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        run.logs.mkdir()
        watch = Stopwatch(run)
        fit.fit(
            model, tokenizer, data.examples, data.held_out, sampler=sampler, schedule=schedule,
            collator_and_loss=collator_and_loss,
            args=fit.build_training_arguments(short, dtype, schedule, bool(data.held_out), run.checkpoints),
            dtype=dtype, loop=short, speed=short, distributed=short.distributed, seed=short.seed,
            recorder=watch, locate_row=lambda index: f"row {index}",
        )  # fmt: skip
    seconds, tokens, steps = watch.pace(TIMED_STEPS)
    return ProbeResult(
        len(watch.ends), seconds / steps, watch.since_step["evaluation"], watch.since_step["checkpoint"],
        tokens / seconds, peak(),
    )  # fmt: skip


def _start_peak_meter(device: str) -> Callable[[], int]:
    """Start measuring. Returns: a function that gives the peak in bytes since then."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated
    with suppress(OSError):  # reset the peak: proc_pid_clear_refs(5)
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_resident


def _peak_resident() -> int:
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
