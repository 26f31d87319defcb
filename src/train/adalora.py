"""AdaLoRA's ranks, which nothing in the Trainer moves by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

ADALORA_STATE = "adalora.pt"
MOVING_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of the gradients, by parameter


class AdaLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Moves rank from the layers that do not use it to those that do, after each optimizer step.

    How much a layer uses its ranks is read from the gradients: between the step and their removal.
    """

    def __init__(self, model: Any) -> None:
        self.tuner = model.base_model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        settings = self.tuner.peft_config["default"]
        step = state.global_step + 1  # the Trainer counts this one later
        # In fp16 a step is left out whose gradients overflowed: they say nothing of any layer, and once in
        # the moving averages infinity stays there. The step that fixes the ranks looks at no gradient.
        overflowed = getattr(optimizer, "step_was_skipped", False)
        if not overflowed or step >= settings.total_step - settings.tfinal:
            self.tuner.update_and_allocate(step)


def callbacks(model: Any) -> list[TrainerCallback]:
    """What the Trainer needs for this model; nothing for other methods than AdaLoRA."""
    return [AdaLoraCallback(model)] if is_adalora(model) else []


def is_adalora(model: Any) -> bool:
    return hasattr(getattr(model, "base_model", None), "update_and_allocate")


@contextmanager
def all_ranks(model: Any) -> Iterator[None]:
    """peft leaves the unused ranks out of what it saves, which then fits no model that goes on training."""
    if not is_adalora(model):
        yield
        return
    settings = model.peft_config["default"]
    pattern, settings.rank_pattern = settings.rank_pattern, None
    try:
        yield
    finally:
        settings.rank_pattern = pattern


def save(model: Any, folder: Path) -> None:
    """Keep in a checkpoint which ranks are used, and what the gradients have said of them."""
    if is_adalora(model):
        allocator = model.base_model.rankallocator
        averages = {name: getattr(allocator, name) for name in MOVING_AVERAGES}
        torch.save(
            {"pattern": model.peft_config["default"].rank_pattern, "averages": averages}, folder / ADALORA_STATE
        )


def load(model: Any, folder: Path) -> None:
    """Go on with the ranks of a checkpoint."""
    if is_adalora(model):
        state = torch.load(folder / ADALORA_STATE, weights_only=True, map_location=model.device)
        model.peft_config["default"].rank_pattern = state["pattern"]
        for name, values in state["averages"].items():
            setattr(model.base_model.rankallocator, name, values)
