"""Batched classification: the label of the highest logit, and its probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


class Choice(NamedTuple):
    """A label, and the probability that the model gives it: its share in the softmax over the labels."""

    label: str
    probability: float


def classify(
    model: Any, pad_token_id: int, texts: Sequence[list[int]], labels: Sequence[str], batch_size: int, title: str
) -> list[Choice]:
    """The label of each text (a list of token ids), in their order; `labels` are those of the logits."""
    model.eval()
    found: dict[int, Choice] = {}
    # The longest go first: what does not fit the memory shows at once.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    with tqdm(total=len(texts), desc=title, unit="text", disable=None) as bar, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            chances = _logits(model, pad_token_id, [texts[i] for i in batch]).float().softmax(-1)
            best, places = chances.max(-1)
            for index, chance, place in zip(batch, best.tolist(), places.tolist(), strict=True):
                found[index] = Choice(labels[place], chance)
            bar.update(len(batch))
    return [found[i] for i in range(len(texts))]


def _logits(model: Any, pad_token_id: int, texts: Sequence[list[int]]) -> torch.Tensor:
    """(texts, labels)"""
    rows = [torch.tensor(ids, device=model.device) for ids in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits
