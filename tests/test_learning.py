"""A training that does not learn says so: at its end, in its record, in the verdict and to the gate."""

from __future__ import annotations

from typing import Any

import pytest

from src.deploy.checks.files import check_loss
from src.learning import note, why_not_learned
from tests.fixtures import World

pytest_plugins = ["tests.fixtures"]


def history(*logged: tuple[float, float]) -> list[dict[str, Any]]:
    """Entries of (loss, gradient norm), one each 5 steps, with an evaluation between them."""
    entries = [{"step": 5 * n + 5, "loss": loss, "grad_norm": norm} for n, (loss, norm) in enumerate(logged)]
    return [*entries[:1], {"step": 5, "eval_loss": 9.0}, *entries[1:]]


LEARNING = [(6.0 - n / 10, 1.0) for n in range(10)]


@pytest.mark.parametrize(
    ("logged", "changed", "told"),
    [
        (LEARNING, True, ""),
        (LEARNING, False, "the weights are those of the start: raise lr, or max_grad_norm if it is tiny"),
        ([(6.0, 3.0), *[(6.2, 0.0)] * 9], True, "the gradient is 0 from step 10 to the end: lower lr"),
        ([(6.0, 0.0)], True, "the gradient is 0 from step 5 to the end: lower lr"),
        ([*LEARNING, (5.0, 0.0)], True, ""),  # once is chance
        ([*LEARNING, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)], True, ""),  # everything is learned
        (
            LEARNING[::-1],
            True,
            "the loss was 5.15 at the start and is 5.95 at the end: change lr, or train longer",
        ),
        ([(5.0, 1.0), (5.1, 1.0)], True, ""),  # too few to tell
        (
            [(6 - n / 1e5, 1.0) for n in range(10)],
            True,
            "the loss was 6 at the start and is 6 at the end: change lr, or train longer",
        ),
        (
            [(0.0, 0.0)] * 2,
            True,
            "the loss is 0 from the first step: the model knows all answers already, or focal_gamma is too high",
        ),
        ([], True, ""),
    ],
)
def test_what_a_training_log_says(logged: list[tuple[float, float]], changed: bool, told: str) -> None:
    assert why_not_learned(history(*logged), changed) == told


@pytest.mark.parametrize(
    ("lr", "told"), [("1e9", "the gradient is 0 from step"), ("1e-44", "the weights are those")]
)
def test_a_training_that_does_not_learn_says_so_at_the_end_and_in_the_verdict(
    world: World, capsys: pytest.CaptureFixture[str], lr: str, told: str
) -> None:
    run = world.train(f"lr={lr}", "optim=sgd", "max_grad_norm=1e-12") if lr == "1e-44" else world.train(f"lr={lr}")
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained in")]
    assert f"; the training did not learn: {told}" in last[-1]
    (found,) = note(run.metrics)
    assert told in found
    passed, sentence = check_loss([(1, 3.0), (2, 2.0)], 10, note(run.metrics))
    assert (passed, sentence) == (False, found)
    if lr == "1e9":
        assert [world.call(stage, "splits=[test]") for stage in ("eval", "eval-baseline")] == [0, 0]
        assert f"\n{found}\n" in capsys.readouterr().out
