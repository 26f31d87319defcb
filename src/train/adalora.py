"""AdaLoRA's ranks, which nothing in the Trainer moves by itself."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class RankMover(TrainerCallback):  # type: ignore[misc]
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
    return [RankMover(model)] if hasattr(getattr(model, "base_model", None), "update_and_allocate") else []
