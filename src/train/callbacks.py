"""Trainer callbacks: the record of a run, when it saves, evaluates and stops, and the ranks of AdaLoRA."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..learning import NOT_LEARNED, why_not_learned
from ..run_names import format_lr
from ..runs import Run
from ..schema import LoopArgs
from ..utils.event_files import Curves
from ..utils.files import read_json, write_text
from ..utils.logs import log, shows_bars
from ..utils.units import format_duration, format_rate
from . import checkpoint
from .mirror import CheckpointMirror
from .signals import StopRequest

CURVE_TAGS = {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm",
         "eval_loss": "eval/loss"}  # fmt: skip
LOGGED: dict[str, tuple[str, Callable[[float], str]]] = {  # by the Trainer's names
    "loss": ("loss", "{:.4g}".format),
    "learning_rate": ("lr", lambda rate: format_lr(rate) if rate else "0"),
    "grad_norm": ("grad", "{:.3g}".format),
    "eval_loss": ("eval_loss", "{:.4g}".format),
}
THROUGHPUT_TAG = "train/tokens_per_second"
ADALORA_STATE = "adalora.pt"
MOVING_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of the gradients, by parameter


class RunRecorder(TrainerCallback):  # type: ignore[misc]
    """Writes curves and sample indices to the run, and requests checkpoints, evaluations and the end of training.

    `logs/samples.jsonl` lists the indices of the examples of every step.
    """

    def __init__(self, run: Run, writes: bool = True, mirror: CheckpointMirror | None = None) -> None:
        self.run, self.writes, self.mirror = run, writes, mirror
        self.samples = run.logs / "samples.jsonl"
        self.indices: list[int] = []  # examples of the current step
        self.tokens = self.first_step = 0
        self.seconds_before = 0.0
        self.last_log = self.started = time.monotonic()

    def prepare(self, stop: StopRequest, args: LoopArgs, evaluates: bool, start: Path | None = None) -> None:
        """Remove what an earlier attempt recorded after the checkpoint `start`, or all of it without one."""
        self.stop, self.args, self.evaluates = stop, args, evaluates
        step = 0
        if start is not None:
            state = read_json(start / checkpoint.STATE)
            step, self.tokens = int(state["global_step"]), int(state["num_input_tokens_seen"])
            self.seconds_before = float(read_json(start / checkpoint.PROGRESS)["seconds"])
            log.info("resuming after step %d, from %s", step, start)
        if self.writes:
            checkpoint.discard_after(self.run.checkpoints, step)
            Curves.drop_after(self.run.logs, step, {*CURVE_TAGS.values(), THROUGHPUT_TAG})
            write_text(self.samples, "".join(_samples_until(self.samples, step)))
        self.curves = Curves(self.run.logs) if self.writes else None  # last, because it keeps its file open

    def close(self) -> None:
        """Close the event file and its thread; another run may follow in this process."""
        if self.curves is not None:
            self.curves.close()

    @property
    def seconds(self) -> float:
        """Training time in seconds, including earlier attempts up to their checkpoints."""
        return self.seconds_before + time.monotonic() - self.started

    def record_samples(self, step: int, indices: list[int]) -> None:
        """Record the examples of a step before it is computed."""
        self.indices = indices
        if self.writes:
            with self.samples.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "rows": indices}) + "\n")

    def flush(self) -> None:
        """Write the curves of all steps so far to disk, so that no checkpoint is newer than its curves."""
        if self.curves is not None:
            self.curves.flush()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last_log = self.started = time.monotonic()
        self.first_step = state.global_step
        for name in (
            "logging_steps",
            "eval_steps",
            "save_steps",
        ):  # resuming restores those of the checkpoint, which may differ
            setattr(state, name, getattr(args, name))
        self.stop.raise_if_stopped(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        control.should_training_stop |= self.stop.stop_requested
        control.should_save |= self.stop.save_requested or last
        control.should_evaluate |= last and self.evaluates
        # the run may end early after this evaluation
        control.should_log |= last or (control.should_evaluate and self.args.early_stopping_patience is not None)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        best = state.best_metric is None or metrics["eval_loss"] < state.best_metric
        control.should_save |= best and self.args.load_best_model_at_end
        if self.patience_exhausted(state):
            log.info("no improvement in %d evaluations: training ends", self.args.early_stopping_patience)
            control.should_training_stop = control.should_save = True

    def patience_exhausted(self, state: Any) -> bool:
        """Whether the last `early_stopping_patience` evaluations did not improve on the best before them."""
        patience = self.args.early_stopping_patience
        best, since = float("inf"), 0
        for loss in _eval_losses(state.log_history):
            better = loss < best - self.args.early_stopping_threshold
            best, since = (loss, 0) if better else (best, since + 1)
        return patience is not None and since >= patience

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not self.writes or self.curves is None:
            return
        logs, rate = logs or {}, None
        if "loss" in logs:
            trained, self.tokens = int(state.num_input_tokens_seen) - self.tokens, int(state.num_input_tokens_seen)
            rate = trained / max(time.monotonic() - self.last_log, 1e-9)
            self.curves.add(THROUGHPUT_TAG, rate, state.global_step)
            self.last_log = time.monotonic()
        for name, tag in CURVE_TAGS.items():
            if name in logs:
                self.curves.add(tag, float(logs[name]), state.global_step)
        parts = [f"{short} {form(logs[name])}" for name, (short, form) in LOGGED.items() if name in logs]
        if rate is not None:
            parts.append(f"{format_rate(rate)} tokens/s")
            if (left := self._seconds_left(state)) and not shows_bars():  # a bar has it
                parts.append(f"{format_duration(left)} left")
        if parts:
            step = f"step {state.global_step:,}/{state.max_steps:,}  epoch {state.epoch or 0:.2f}"
            log.info("%s", "  ".join([step, *parts]))

    def _seconds_left(self, state: Any) -> float:
        """The seconds to the last step at the mean pace of this attempt, evaluations included; 0 at the end."""
        done, left = state.global_step - self.first_step, state.max_steps - state.global_step
        if left <= 0 or done <= 0:
            return 0.0
        return (time.monotonic() - self.started) / done * left

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stop.on_saved()
        if self.mirror is not None:
            self.mirror.copy_now()

    def final_metrics(self, state: Any, best: bool, changed: bool = True) -> dict[str, Any]:
        """Mean loss over all steps, loss of the dev split (the lowest with `best`), steps, seconds, tokens.

        If nothing was learned, the reason as well. `changed`: whether the trained weights have changed.
        """
        logged = [(0, 0.0), *((h["step"], h["loss"]) for h in state.log_history if "loss" in h)]
        total = sum(loss * (step - before) for (before, _), (step, loss) in pairwise(logged))
        losses = _eval_losses(state.log_history)
        return {
            "train_loss": total / max(1, logged[-1][0]),
            **({"eval_loss": min(losses) if best else losses[-1]} if losses else {}),
            "steps": state.global_step,
            "seconds": round(self.seconds, 1),
            "tokens": int(state.num_input_tokens_seen),
            **({NOT_LEARNED: reason} if (reason := why_not_learned(state.log_history, changed)) else {}),
        }


def _eval_losses(history: Sequence[dict[str, Any]]) -> list[float]:
    return [h["eval_loss"] for h in history if "eval_loss" in h]


def _samples_until(samples: Path, step: int) -> list[str]:
    """The complete lines of `samples.jsonl` up to a step."""
    if not samples.exists():
        return []
    kept = []
    for line in samples.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    return kept


class TrainingBar(ProgressCallback):  # type: ignore[misc]
    """The Trainer's progress bar without its log lines, which RunRecorder writes; it is removed at the end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training_bar = tqdm(
            desc="training", total=state.max_steps, initial=state.global_step, unit="step",
            dynamic_ncols=True, leave=False,
        )  # fmt: skip
        self.current_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        pass


class AdaLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Reallocates AdaLoRA's ranks between layers after each optimizer step, which the Trainer does not do.

    peft measures the importance of a rank by the gradients, so this runs before they are cleared.
    """

    def __init__(self, model: Any) -> None:
        self.tuner = model.base_model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        settings = self.tuner.peft_config["default"]
        step = state.global_step + 1  # the Trainer counts this step later
        # In fp16, gradients may overflow and the step is skipped: infinity would stay in the moving averages.
        # The step that fixes the ranks uses no gradient.
        overflowed = getattr(optimizer, "step_was_skipped", False)
        if not overflowed or step >= settings.total_step - settings.tfinal:
            self.tuner.update_and_allocate(step)


def is_adalora(model: Any) -> bool:
    return hasattr(getattr(model, "base_model", None), "update_and_allocate")


@contextmanager
def save_all_ranks(model: Any) -> Iterator[None]:
    """Let peft save unused ranks as well: without them a model cannot resume from the checkpoint."""
    if not is_adalora(model):
        yield
        return
    settings = model.peft_config["default"]
    pattern, settings.rank_pattern = settings.rank_pattern, None
    try:
        yield
    finally:
        settings.rank_pattern = pattern


def save_adalora_state(model: Any, folder: Path) -> None:
    """Save in a checkpoint which ranks are in use, and the moving averages of their importance."""
    if is_adalora(model):
        allocator = model.base_model.rankallocator
        averages = {name: getattr(allocator, name) for name in MOVING_AVERAGES}
        torch.save(
            {"pattern": model.peft_config["default"].rank_pattern, "averages": averages}, folder / ADALORA_STATE
        )


def load_adalora_state(model: Any, folder: Path) -> None:
    """Restore the ranks of a checkpoint."""
    if is_adalora(model):
        state = torch.load(folder / ADALORA_STATE, weights_only=True, map_location=model.device)
        model.peft_config["default"].rank_pattern = state["pattern"]
        for name, values in state["averages"].items():
            setattr(model.base_model.rankallocator, name, values)
