"""What happens beside the training loop: its record, its log, and when it saves, evaluates and ends."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from src.runs import Run
from src.schema import LoopArgs
from src.train import checkpoint
from src.train.mirror import CheckpointMirror
from src.train.signals import StopRequest
from src.utils.event_files import Curves
from src.utils.files import read_json, write_text
from src.utils.logs import log

CURVE_TAGS = {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm",
         "eval_loss": "eval/loss"}  # fmt: skip
THROUGHPUT_TAG = "train/tokens_per_second"


class RunRecorder(TrainerCallback):  # type: ignore[misc]
    """Writes curves and the log of rows to the run, and has checkpoints made where they are due.

    `logs/samples.jsonl` says of every step which rows it took.
    """

    def __init__(self, run: Run, writes: bool = True, mirror: CheckpointMirror | None = None) -> None:
        self.run, self.writes, self.mirror = run, writes, mirror
        self.samples = run.logs / "samples.jsonl"
        self.rows: list[int] = []  # of the current step
        self.tokens = self.first = 0
        self.seconds_before = 0.0
        self.since = self.started = time.monotonic()

    def prepare(self, asked: StopRequest, args: LoopArgs, held_out: bool, start: Path | None = None) -> None:
        """Forget what an earlier attempt recorded after the checkpoint `start`, or all of it without one."""
        self.asked, self.args, self.held_out = asked, args, held_out
        step = 0
        if start is not None:
            state = read_json(start / checkpoint.STATE)
            step, self.tokens = int(state["global_step"]), int(state["num_input_tokens_seen"])
            self.seconds_before = float(read_json(start / checkpoint.PROGRESS)["seconds"])
            log.info("going on after step %d, from %s", step, start)
        if self.writes:
            checkpoint.discard_after(self.run.checkpoints, step)
            Curves.forget_after(self.run.logs, step, {*CURVE_TAGS.values(), THROUGHPUT_TAG})
            write_text(self.samples, "".join(_samples_until(self.samples, step)))
        self.curves = Curves(self.run.logs) if self.writes else None  # after that: it keeps its file open

    def close(self) -> None:
        """Let go of the event file and its thread, however the training ended: another may follow it here."""
        if self.curves is not None:
            self.curves.close()

    @property
    def seconds(self) -> float:
        """Spent on the training, earlier attempts up to their checkpoint included."""
        return self.seconds_before + time.monotonic() - self.started

    def takes(self, step: int, rows: list[int]) -> None:
        """Note the rows of a step, before it is taken."""
        self.rows = rows
        if self.writes:
            with self.samples.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "rows": rows}) + "\n")

    def flush(self) -> None:
        """Have the points of all steps so far on the disk: a checkpoint is not older than its curves."""
        if self.curves is not None:
            self.curves.flush()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.since = self.started = time.monotonic()
        self.first = state.global_step
        for name in ("logging_steps", "eval_steps", "save_steps"):  # the checkpoint's, which need not be ours
            setattr(state, name, getattr(args, name))
        self.asked.refuse_if_stopped(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        control.should_training_stop |= self.asked.to_stop
        control.should_save |= self.asked.to_save or last
        control.should_evaluate |= last and self.held_out
        # an evaluation may be the last of an early end
        control.should_log |= last or (control.should_evaluate and self.args.early_stopping_patience is not None)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        best = state.best_metric is None or metrics["eval_loss"] < state.best_metric
        control.should_save |= best and self.args.load_best_model_at_end
        if self.patience_is_out(state):
            log.info("no better for %d evaluations: training ends", self.args.early_stopping_patience)
            control.should_training_stop = control.should_save = True

    def patience_is_out(self, state: Any) -> bool:
        """Whether the last evaluations were no better than the best before them."""
        patience = self.args.early_stopping_patience
        best, since = float("inf"), 0
        for loss in _eval_losses(state.log_history):
            better = loss < best - self.args.early_stopping_threshold
            best, since = (loss, 0) if better else (best, since + 1)
        return patience is not None and since >= patience

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not self.writes or self.curves is None:
            return
        logs = logs or {}
        if "loss" in logs:
            trained, self.tokens = int(state.num_input_tokens_seen) - self.tokens, int(state.num_input_tokens_seen)
            rate = trained / max(time.monotonic() - self.since, 1e-9)
            self.curves.add(THROUGHPUT_TAG, rate, state.global_step)
            self.since = time.monotonic()
            logs = logs | {"tokens/s": rate}
        for name, tag in CURVE_TAGS.items():
            if name in logs:
                self.curves.add(tag, float(logs[name]), state.global_step)
        said = [f"{k} {logs[k]:.4g}" for k in [*CURVE_TAGS, "tokens/s"] if k in logs]
        if "loss" in logs and (left := self._left(state)) is not None:
            said.append(f"left {left}")
        if said:
            where = f"step {state.global_step}/{state.max_steps}  epoch {state.epoch or 0:.2f}"
            log.info("%s", "  ".join([where, *said]))

    def _left(self, state: Any) -> timedelta | None:
        """The time to the last step, if the steps to come take as long as those of this attempt, with all between
        them; None at the end."""
        taken, left = state.global_step - self.first, state.max_steps - state.global_step
        if left <= 0 or taken <= 0:
            return None
        return timedelta(seconds=round((time.monotonic() - self.started) / taken * left))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.asked.saved()
        if self.mirror is not None:
            self.mirror.offer()

    def figures(self, state: Any, best: bool) -> dict[str, Any]:
        """The final figures: mean loss over all steps, loss of the dev split, steps, seconds, tokens."""
        logged = [(0, 0.0), *((h["step"], h["loss"]) for h in state.log_history if "loss" in h)]
        total = sum(loss * (step - before) for (before, _), (step, loss) in pairwise(logged))
        losses = _eval_losses(state.log_history)
        return {
            "train_loss": total / max(1, logged[-1][0]),
            **({"eval_loss": min(losses) if best else losses[-1]} if losses else {}),
            "steps": state.global_step,
            "seconds": round(self.seconds, 1),
            "tokens": int(state.num_input_tokens_seen),
        }


def _eval_losses(history: Sequence[dict[str, Any]]) -> list[float]:
    return [h["eval_loss"] for h in history if "eval_loss" in h]


def _samples_until(samples: Path, step: int) -> list[str]:
    """The whole lines of the log of rows, up to a step."""
    if not samples.exists():
        return []
    kept = []
    for line in samples.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    return kept


class PlainProgressBar(ProgressCallback):  # type: ignore[misc]
    """The Trainer's progress bars without its own lines: RunRecorder writes them, to the log as well."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        pass
