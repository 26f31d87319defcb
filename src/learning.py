"""Whether a training has learned: its losses, gradients and weights from the first step to the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

NOT_LEARNED = "not_learned"  # key of the group `train` of metrics.json: the reason
WINDOW = 5  # the medians of the first and the last fifth of the logged losses are compared
LEAST_DECREASE = 0.001  # of the loss at the start; less is noise


def first_and_last(losses: Sequence[float]) -> tuple[float, float]:
    """The medians of the first and the last fifth of the logged losses."""
    size = max(1, len(losses) // WINDOW)
    return median(losses[:size]), median(losses[-size:])


def why_not_learned(history: Sequence[Mapping[str, Any]], changed: bool) -> str:
    """Why a training that has ended has learned nothing, and what to change; empty if it may have learned.

    Args:
        history: the Trainer's log, with `step`, `loss` and `grad_norm`.
        changed: whether the trained weights differ from those at the start.
    """
    logged = [entry for entry in history if "loss" in entry]
    losses = [float(entry["loss"]) for entry in logged]
    if losses and not any(losses):
        return "the loss is 0 from the first step: the model knows all answers already, or focal_gamma is too high"
    if not changed:
        return "the weights are those of the start: raise lr, or max_grad_norm if it is tiny"
    if losses and losses[-1] > 0 and (step := _zero_from(logged)):
        return f"the gradient is 0 from step {step} to the end: lower lr"
    if len(losses) >= WINDOW:
        first, last = first_and_last(losses)
        if last > first * (1 - LEAST_DECREASE):
            return (
                f"the loss was {first:.4g} at the start and is {last:.4g} at the end: change lr, or train longer"
            )
    return ""


def _zero_from(logged: Sequence[Mapping[str, Any]]) -> int:
    """The first of the last logged steps that all have the gradient 0, at least a fifth of all and two; else 0."""
    zero = 0
    for entry in reversed(logged):
        if entry.get("grad_norm", 1.0) != 0:
            break
        zero += 1
    enough = min(len(logged), max(2, len(logged) // WINDOW))
    return int(logged[-zero]["step"]) if zero and zero >= enough else 0


def note(figures: Mapping[str, Any]) -> list[str]:
    """The note on a verdict about a run with this metrics.json: empty if the run may have learned."""
    reason = (figures.get("train") or {}).get(NOT_LEARNED)
    return [f"the training did not learn: {reason}"] if reason else []
