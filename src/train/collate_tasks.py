"""Batches of the tasks whose answers stand apart from what is read: texts padded on the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from src.data.store import IGNORE_INDEX, Example
from src.train.collators import Item


def _pad_lists(lists: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value)


def _input_batch(items: Sequence[Item], pad_token_id: int) -> dict[str, Any]:
    """What is read of each row, all before its answer: `input_ids` and `attention_mask`, (rows, longest text).

    And, as every batch has them, the numbers of the `rows`, and how many `tokens` are read.
    """
    texts = [[i for i, on in zip(*e, strict=True) if not on] for _, e in items]
    filled = texts or [[pad_token_id]]
    return {
        "input_ids": _pad_lists(filled, pad_token_id),
        "attention_mask": _pad_lists([[1] * len(ids) for ids in filled], 0),
        "rows": [number for number, _ in items],
        "tokens": sum(map(len, texts)),
    }


def _answer_ids(example: Example) -> list[int]:
    return [i for i, on in zip(*example, strict=True) if on]


class Seq2SeqCollator:
    """Texts for an encoder, answers for a decoder.

    Gives, besides what is read, `labels` (rows, longest answer), padded with IGNORE_INDEX, and `decoder_input_ids`
    of that shape, the labels moved one place on behind the model's own first token. `tokens` are those of both.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        self.decoder_inputs = model.prepare_decoder_input_ids_from_labels

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        batch = _input_batch(items, self.pad_token_id)
        answers = [_answer_ids(example) for _, example in items]
        labels = _pad_lists(answers or [[IGNORE_INDEX]], IGNORE_INDEX)
        batch["tokens"] += sum(map(len, answers))
        return {**batch, "labels": labels, "decoder_input_ids": self.decoder_inputs(labels=labels)}


class ClassificationCollator:
    """Texts and, as `labels` (rows,), the id of the label of each."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.pad_token_id = tokenizer.pad_token_id

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        labels = [_answer_ids(example)[0] for _, example in items] or [IGNORE_INDEX]
        return {**_input_batch(items, self.pad_token_id), "labels": torch.tensor(labels)}


COLLATORS: dict[str, Callable[[Any, Any], Any]] = {
    "seq2seq": Seq2SeqCollator,
    "classification": ClassificationCollator,
}
