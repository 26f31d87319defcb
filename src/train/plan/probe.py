"""The first steps of the very training, thrown away: how long it will take, and what it truly holds."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from src.runs import Run
from src.schema import TrainConfig
from src.train.callbacks import RunRecorder
from src.train.fit import fit
from src.train.plan.estimate import MemoryPlan
from src.train.prepare import PreparedData, build_model

PROBE_STEPS, TIMED_STEPS = 20, 15  # taken, and those of them that the speed is the mean of


class ProbeResult(NamedTuple):
    """Steps taken; seconds of a step, an evaluation and a checkpoint; tokens a second; the peak in bytes."""

    steps: int
    step: float
    evaluation: float
    checkpoint: float
    tokens_per_second: float
    peak: int


class Stopwatch(RunRecorder):
    """Records when steps, evaluations and checkpoints ended, and writes nothing."""

    def __init__(self, run: Run) -> None:
        super().__init__(run, writes=False)
        self.ends: list[tuple[float, int]] = []  # of each step: when, and tokens until then
        self.since_step = {"evaluation": 0.0, "checkpoint": 0.0}
        self.last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        super().on_step_end(args, state, control, **named)
        self.last = time.monotonic()
        self.ends.append((self.last, int(state.num_input_tokens_seen)))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **named: Any) -> None:
        super().on_evaluate(args, state, control, metrics=metrics, **named)
        self._lap("evaluation")

    def on_save(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        super().on_save(args, state, control, **named)
        self._lap("checkpoint")

    def pace(self, steps: int) -> tuple[float, int, int]:
        """Seconds and tokens of the last `steps`, or of all, and how many these are."""
        ends = [(self.started, 0), *self.ends][-steps - 1 :]
        (began, before), (ended, after) = ends[0], ends[-1]
        return ended - began, after - before, len(ends) - 1

    def _lap(self, what: str) -> None:
        now = time.monotonic()
        self.since_step[what], self.last = now - self.last, now


def probe(ready: PreparedData, cfg: TrainConfig, plan: MemoryPlan) -> ProbeResult:
    """Take the first steps in a temporary folder, of which nothing is left."""
    short = replace(
        cfg, max_steps=min(PROBE_STEPS, plan.steps), save_steps=plan.steps, eval_steps=plan.steps, report_to=[],
        checkpoint_mirror=None, early_stopping_patience=None, load_best_model_at_end=False,
    )  # fmt: skip
    peak = _start_peak_meter(ready.device.value)
    model, _ = build_model(ready, cfg, plan.steps)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        run.logs.mkdir()
        watch = Stopwatch(run)
        fit(
            model, ready.chat.tokenizer, ready.examples, ready.held_out, short, ready.dtype.value, watch,
            run.path / "checkpoints", lambda row: f"row {row}",
        )  # fmt: skip
    seconds, tokens, steps = watch.pace(TIMED_STEPS)
    return ProbeResult(
        len(watch.ends), seconds / steps, watch.since_step["evaluation"], watch.since_step["checkpoint"],
        tokens / seconds, peak(),
    )  # fmt: skip


def _start_peak_meter(device: str) -> Callable[[], int]:
    """A function that says the most that was held since this one was called."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated
    with suppress(OSError):  # forget the peak of what came before: proc_pid_clear_refs(5)
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_resident


def _peak_resident() -> int:
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
