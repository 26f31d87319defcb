"""What happens beside the training loop: TensorBoard curves and the marker of a whole checkpoint."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from src.errors import RunError
from src.runs import Run
from src.utils.curves import Curves
from src.utils.files import write_text
from src.utils.logs import log

COMPLETE = "COMPLETE"  # written last: a checkpoint folder without it is torn

SHOWN = {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm",
         "eval_loss": "eval/loss"}  # fmt: skip


class RunRecorder(TrainerCallback):  # type: ignore[misc]
    """Writes the curves to the run's logs, with the tokens trained a second, and marks checkpoints."""

    def __init__(self, run: Run) -> None:
        self.curves = Curves(run.logs)
        self.tokens = 0
        self.interrupted = False
        self.since = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.since = time.monotonic()

    @contextmanager
    def heeding_interrupts(self) -> Iterator[None]:
        """Ctrl-C ends the training even where a library swallows it: it is raised again at the next step."""

        def note(number: int, frame: FrameType | None) -> None:
            self.interrupted = True
            signal.default_int_handler(number, frame)

        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        for name, tag in SHOWN.items():
            if name in logs:
                self.curves.add(tag, float(logs[name]), state.global_step)
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise RunError(
                    f"training diverged: the loss is {logs['loss']} at step {state.global_step}",
                    hint="lower lr, or look at the rows for what the model cannot learn",
                )
            trained, self.tokens = (
                int(state.num_input_tokens_seen) - self.tokens,
                int(state.num_input_tokens_seen),
            )
            rate = trained / max(time.monotonic() - self.since, 1e-9)
            self.curves.add("train/tokens_per_second", rate, state.global_step)
            self.since = time.monotonic()
            logs = logs | {"tokens/s": rate}
        said = "  ".join(f"{k} {logs[k]:.4g}" for k in [*SHOWN, "tokens/s"] if k in logs)
        if said:
            log.info("step %d/%d  epoch %.2f  %s", state.global_step, state.max_steps, state.epoch or 0, said)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # a pickle of the settings that nobody reads, unredacted
        (folder / "training_args.bin").unlink(missing_ok=True)
        write_text(folder / COMPLETE, f"step {state.global_step}\n")


class Bar(ProgressCallback):  # type: ignore[misc]
    """The Trainer's progress bars without its own lines: RunRecorder writes them, to the log as well."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        pass
