"""Batched classification: the label of the highest logit, and its probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence


class Prediction(NamedTuple):
    """A label, and the probability that the model gives it: its share in the softmax over the labels."""

    label: str
    probability: float


class Classifier:
    """Gives each text (a list of token ids) one of `labels`, which are those of the logits, in their order."""

    unpadded = False

    def __init__(self, model: Any, pad_token_id: int, labels: Sequence[str]) -> None:
        self.model, self.pad_token_id, self.labels = model.eval(), pad_token_id, labels

    def __call__(self, texts: Sequence[list[int]], number: int) -> list[Prediction]:
        with torch.inference_mode():
            chances = self.logits(texts).float().softmax(-1)
        best, places = chances.max(-1)
        return [
            Prediction(self.labels[p], chance) for p, chance in zip(places.tolist(), best.tolist(), strict=True)
        ]

    def logits(self, texts: Sequence[list[int]]) -> torch.Tensor:
        """(texts, labels)"""
        rows = [torch.tensor(ids, device=self.model.device) for ids in texts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits
