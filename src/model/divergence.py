"""How far the next-token distributions of two models lie from each other."""

from __future__ import annotations

import torch

ROWS = 256  # positions computed on at once: in fp32 each takes 4 bytes a token of the vocabulary, several times


def mean_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> float:
    """The mean over positions of KL(p || q) = sum over tokens of p (log p - log q), in nats a token.

    Args:
        p_logits, q_logits: (positions, vocabulary), in any precision; computed on in fp32.
    Kullback and Leibler (1951), "On Information and Sufficiency", with p what is aimed at.
    """
    if p_logits.shape != q_logits.shape or not len(p_logits):
        raise ValueError(f"logits of shapes {tuple(p_logits.shape)} and {tuple(q_logits.shape)}")
    total = 0.0
    for p, q in zip(p_logits.split(ROWS), q_logits.split(ROWS), strict=True):
        p_log, q_log = (logits.float().log_softmax(-1) for logits in (p, q.to(p.device)))
        total += float((p_log.exp() * (p_log - q_log)).sum(-1).double().sum())
    return total / len(p_logits)
