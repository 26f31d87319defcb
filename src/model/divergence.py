"""How far two models' next-token distributions lie apart."""

from __future__ import annotations

import torch

CHUNK = 64  # rows whose fp32 values exist at once


def mean_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> float:
    """The mean over the rows of KL(p || q) = sum p (log p - log q), in nats a token.

    Args:
        p_logits, q_logits: (n, vocabulary) each, of the same tokens; the distributions are their softmax.

    Kullback and Leibler (1951). Computed in fp32, whatever the logits are in. No rows give 0.
    """
    total = 0.0
    for p, q in zip(p_logits.split(CHUNK), q_logits.split(CHUNK), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return max(0.0, total / max(1, len(p_logits)))
