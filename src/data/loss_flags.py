"""Keys that say whether an answer has loss: on its turn, on a part of it, or on its row."""

from __future__ import annotations

from typing import Any

# fmt: off
LOSS_KEYS = (  # 1 or true: it has loss
    "weight", "loss_weight", "loss_scale", "loss", "loss_mask", "train", "training", "trainable", "need_loss",
    "output_with_loss", "with_loss", "has_loss", "compute_loss", "calculate_loss", "train_on", "is_trainable",
)
NO_LOSS_KEYS = (  # 1 or true: it has none
    "masked", "mask_loss", "ignore_loss", "no_loss", "skip_loss", "exclude_loss", "without_loss", "no_train",
)
# fmt: on
SPAN_KEYS = ("train_detail", "training_detail", "reasoning_training_detail")  # axolotl: characters
FLAGS = (*LOSS_KEYS, *NO_LOSS_KEYS)


def weight_of(value: object, key: str = "weight") -> int | None:
    """0 or 1, however it is written: 0.0, false, "false"; None for anything else.

    >>> weight_of(False), weight_of("true", "ignore_loss"), weight_of(0.5)
    (0, 0, None)
    """
    known = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
    weight: Any = known.get(value.strip().lower()) if isinstance(value, str) else value
    if isinstance(weight, list | dict) or weight not in (0, 1):
        return None
    return 1 - int(weight) if key in NO_LOSS_KEYS else int(weight)
