"""From tokenised examples to the tensors of a batch: packed into one sequence, or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..data.store import IGNORE_INDEX, Example
from ..model.packed_attention import position_ids

Item = tuple[int, Example]  # index and tokens of an example
Collator = Callable[[Sequence[Item]], dict[str, Any]]


class TokenDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Tokenised examples with their indices."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Item:
        return index, self.examples[index]


class PackedCollator:
    """Concatenates examples into one sequence of T tokens, of which K are targets.

    Returns `input_ids` and `position_ids` (1, T); `target_positions` (K,), the positions that predict a target,
    and `labels` (K,), the targets; the `lengths` of the examples, their indices `rows`, and the number of their
    `tokens`.
    """

    def __init__(self, multiple: int = 1) -> None:
        """`multiple`: T and K are rounded up to it, T by an example without loss, K by ignored labels."""
        self.multiple = multiple

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        examples = [example for _, example in items]
        tokens = sum(len(e.ids) for e in examples)
        if fill := -tokens % self.multiple or int(not examples):
            examples.append(Example([0] * fill, [False] * fill))
        lengths = [len(e.ids) for e in examples]
        ids = torch.tensor([i for e in examples for i in e.ids])
        # no position predicts the first token of an example
        trained = torch.tensor([on for e in examples for on in (False, *e.loss_mask[1:])])
        targets = trained.nonzero().flatten()
        fill = -len(targets) % self.multiple
        return {
            "input_ids": ids[None],
            "position_ids": position_ids(lengths),
            "target_positions": pad(targets - 1, (0, fill)),
            "labels": pad(ids[targets], (0, fill), value=IGNORE_INDEX),
            "lengths": lengths,
            "rows": [index for index, _ in items],
            "tokens": tokens,
        }


class PaddingCollator:
    """Pads examples on the right: `input_ids`, `attention_mask`, `labels`, each (examples, longest example).

    `labels` are shifted already: the next token at each position, IGNORE_INDEX where there is no loss.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        examples = [example for _, example in items] or [Example([self.pad_token_id], [False])]
        return {
            "input_ids": _pad_lists([e.ids for e in examples], self.pad_token_id),
            "attention_mask": _pad_lists([[1] * len(e.ids) for e in examples], 0),
            "labels": _pad_lists([[*e.labels[1:], IGNORE_INDEX] for e in examples], IGNORE_INDEX),
            "rows": [index for index, _ in items],
            "tokens": sum(len(e.ids) for _, e in items),
        }


class Seq2SeqCollator:
    """Prompts for the encoder, answers for the decoder.

    Returns `input_ids` and `attention_mask` (examples, longest prompt); `labels` (examples, longest answer),
    padded with IGNORE_INDEX; `decoder_input_ids`, the labels shifted right behind the model's start token.
    `tokens` counts prompts and answers.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        self.decoder_inputs = model.prepare_decoder_input_ids_from_labels

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        batch = _collate_prompts(items, self.pad_token_id)
        answers = [_answer_ids(example) for _, example in items]
        labels = _pad_lists(answers or [[IGNORE_INDEX]], IGNORE_INDEX)
        batch["tokens"] += sum(map(len, answers))
        return {**batch, "labels": labels, "decoder_input_ids": self.decoder_inputs(labels=labels)}


class ClassificationCollator:
    """Prompts as `input_ids` and `attention_mask`, and the class of each as `labels` (examples,)."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.pad_token_id = tokenizer.pad_token_id

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        labels = [_answer_ids(example)[0] for _, example in items] or [IGNORE_INDEX]
        return {**_collate_prompts(items, self.pad_token_id), "labels": torch.tensor(labels)}


COLLATORS: dict[str, Callable[[Any, Any], Collator]] = {
    "seq2seq": Seq2SeqCollator,
    "classification": ClassificationCollator,
}


def build_collator(task: str, tokenizer: Any, model: Any, pack: bool, multiple: int) -> Collator:
    """The collator of a task. A causal language model has two: `pack` chooses, `multiple` rounds packed shapes."""
    if pack:
        return PackedCollator(multiple)
    if task == "causal_lm":
        return PaddingCollator(tokenizer.pad_token_id)
    return COLLATORS[task](tokenizer, model)


def _pad_lists(lists: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value)


def _collate_prompts(items: Sequence[Item], pad_token_id: int) -> dict[str, Any]:
    """The tokens of each example that are not trained on, padded; `rows` and `tokens` as in every batch."""
    prompts = [[i for i, on in zip(*e, strict=True) if not on] for _, e in items]
    padded = prompts or [[pad_token_id]]
    return {
        "input_ids": _pad_lists(padded, pad_token_id),
        "attention_mask": _pad_lists([[1] * len(ids) for ids in padded], 0),
        "rows": [index for index, _ in items],
        "tokens": sum(map(len, prompts)),
    }


def _answer_ids(example: Example) -> list[int]:
    return [i for i, on in zip(*example, strict=True) if on]
