"""What goes wrong in a training, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from src.errors import MAX_LISTED, DivergedError, OutOfMemory


@contextmanager
def explain_out_of_memory(step: int, batch: dict[str, Any]) -> Iterator[None]:
    """Raises: OutOfMemory in place of the allocator's error, with what would need less."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        shape = batch["input_ids"].shape
        rows = len(batch.get("lengths", range(shape[0])))
        raise OutOfMemory(
            f"out of memory at step {step}, in a batch of {rows} rows and {shape.numel():,} tokens",
            hint="set gradient_checkpointing=true, or half the batch_size with twice the "
            "gradient_accumulation_steps, or a smaller max_length, method=qlora, optim=paged_adamw_8bit; "
            "plan shows what each needs",
        ) from error


def divergence_error(what: str, value: float, step: int, rows: Sequence[str], good: Path | None) -> DivergedError:
    """The error of a loss that is no number: the step, its rows, and the checkpoint where it was still well."""
    more = f" and {len(rows) - MAX_LISTED} more" if len(rows) > MAX_LISTED else ""
    return DivergedError(
        f"training diverged: the {what} is {value} at step {step}, in the batch of "
        f"{', '.join(rows[:MAX_LISTED])}{more}; the last good checkpoint is {good or 'none'}",
        hint="lower lr, or look at these rows for what the model cannot learn",
    )
