"""Batches of the tasks whose models read with an encoder, or choose a label: texts padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from src.data.rows import IGNORED

Rows = Sequence[dict[str, list[int]]]


def _padded(lists: Sequence[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value)


def _read(rows: Rows, pad_token_id: int) -> dict[str, torch.Tensor]:
    """What is read of each row, all before its labels: `input_ids` and `attention_mask`, (rows, longest)."""
    sources = [[i for i, label in zip(*row.values(), strict=True) if label == IGNORED] for row in rows]
    return {
        "input_ids": _padded(sources, pad_token_id),
        "attention_mask": _padded([[1] * len(ids) for ids in sources], 0),
    }


class Seq2SeqCollator:
    """Rows of `input_ids` and `labels` to what an encoder reads and a decoder learns.

    Returns: `input_ids`, `attention_mask` (rows, longest text) and `labels` (rows, longest answer), padded with
    IGNORED. The model makes the decoder's inputs of the labels.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        answers = [[label for label in row["labels"] if label != IGNORED] for row in rows]
        return {**_read(rows, self.pad_token_id), "labels": _padded(answers, IGNORED)}


class ClassificationCollator:
    """Rows whose last element is the label's id to texts and labels.

    Returns: `input_ids`, `attention_mask` (rows, longest text) and `labels` (rows,).
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        return {**_read(rows, self.pad_token_id), "labels": torch.tensor([row["labels"][-1] for row in rows])}
