"""Examples to the tensors of a batch: laid end to end, or padded for models that cannot take that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from src.data.store import IGNORE_INDEX, Example
from src.model.packed_attention import positions

Item = tuple[int, Example]  # the number of a row, and its tokens


class TokenDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Tokenised rows with their numbers."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Item:
        return index, self.examples[index]


class PackedCollator:
    """Lays rows end to end: one row of T tokens, of which K are followed by a label.

    Gives `input_ids` and `position_ids` (1, T); `kept` (K,), the places that predict a label, and `labels` (K,);
    the `lengths` of the rows, their numbers `rows`, and how many `tokens` they have.
    """

    def __init__(self, multiple: int = 1) -> None:
        """`multiple`: T and K are filled up to it, T by a row of no meaning, K by labels without loss."""
        self.multiple = multiple

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        examples = [example for _, example in items]
        tokens = sum(len(e.ids) for e in examples)
        if fill := -tokens % self.multiple or int(not examples):
            examples.append(Example([0] * fill, [False] * fill))
        lengths = [len(e.ids) for e in examples]
        ids = torch.tensor([i for e in examples for i in e.ids])
        learnt = torch.tensor(
            [on for e in examples for on in (False, *e.loss_mask[1:])]
        )  # nothing predicts the first
        labelled = learnt.nonzero().flatten()
        fill = -len(labelled) % self.multiple
        return {
            "input_ids": ids[None],
            "position_ids": positions(lengths),
            "kept": pad(labelled - 1, (0, fill)),
            "labels": pad(ids[labelled], (0, fill), value=IGNORE_INDEX),
            "lengths": lengths,
            "rows": [number for number, _ in items],
            "tokens": tokens,
        }


class PaddingCollator:
    """Pads a batch on the right: `input_ids`, `attention_mask`, `labels`, each (rows, longest row).

    `labels` are already shifted: at each place the token that comes next, IGNORE_INDEX where there is no loss.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        examples = [example for _, example in items] or [Example([self.pad_token_id], [False])]

        def padded(lists: list[list[int]], value: int) -> torch.Tensor:
            return pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value)

        return {
            "input_ids": padded([e.ids for e in examples], self.pad_token_id),
            "attention_mask": padded([[1] * len(e.ids) for e in examples], 0),
            "labels": padded([[*e.labels[1:], IGNORE_INDEX] for e in examples], IGNORE_INDEX),
            "rows": [number for number, _ in items],
            "tokens": sum(len(e.ids) for _, e in items),
        }
