"""Mean KL divergence against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from src.eval.merge_check import mean_kl


def test_it_is_the_mean_over_positions_of_what_can_be_worked_out_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert mean_kl(p, q) == pytest.approx(by_hand, rel=1e-5)
    assert mean_kl(q, p) != pytest.approx(by_hand, rel=1e-2)  # it has a direction
    assert mean_kl(p, p) == 0


def test_logits_that_differ_by_a_constant_are_the_same_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(300, 50)
    assert mean_kl(logits, logits + 3) == pytest.approx(0, abs=1e-6)
    expected = torch.nn.functional.kl_div((logits * 2).log_softmax(-1), logits.softmax(-1), reduction="batchmean")
    assert mean_kl(logits, logits * 2) == pytest.approx(float(expected), rel=1e-5)
    assert mean_kl(logits.bfloat16(), (logits * 2).bfloat16()) == pytest.approx(float(expected), rel=0.02)


def test_divergence_is_that_of_the_definition() -> None:
    p, q = torch.randn(100, 7), torch.randn(100, 7)
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum")
    assert mean_kl(p, q) == pytest.approx(float(expected) / 100, rel=1e-5)
    assert mean_kl(p, p + 3) == pytest.approx(0, abs=1e-6)
    assert mean_kl(p.bfloat16(), p.bfloat16()) == 0
