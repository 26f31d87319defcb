"""What a model thinks of the reference answers: one teacher-forced pass over prompt and answer.

Logits exist at the places of the answers alone (layout.py says for how many rows at once).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from src.data.store import Example
from src.model.methods import has_virtual_tokens


class ReferenceScorer:
    """Gives each example `reference_tokens`, `reference_nll` (nats, summed) and `reference_hits` (tokens that it
    would have written itself, being at that place).

    examples: the rows as in training, the answer with its end-of-turn at the end.
    unpadded: a batch must hold examples of one length, as padding on the left cannot be told to the model.
    """

    def __init__(self, model: Any, tokenizer: Any, examples: Sequence[Example]) -> None:
        self.model, self.pad = model.eval(), tokenizer.pad_token_id
        self.examples = examples
        takes = inspect.signature(_plain(model).forward).parameters
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.positions = "position_ids" in takes
        self.few = "logits_to_keep" in takes
        self.unpadded = has_virtual_tokens(model) or not (self.seq2seq or self.positions)

    def __call__(self, places: Sequence[int], number: int) -> list[Mapping[str, Any]]:
        examples = [self.examples[i] for i in places]
        answers = [[i for i, on in zip(*e, strict=True) if on] for e in examples]
        with torch.inference_mode():
            logits = (self._decoder if self.seq2seq else self._behind)(examples, answers)
            return [_row(kept, answer) for kept, answer in zip(logits, answers, strict=True)]

    def _behind(self, examples: Sequence[Example], answers: Sequence[list[int]]) -> list[torch.Tensor]:
        """(answer's tokens, vocabulary) of each: the answers of a batch padded on the left end together."""
        ids, mask = self._padded([e.ids for e in examples], "left")
        most = max(map(len, answers)) + 1
        more: dict[str, Any] = {"logits_to_keep": most} if self.few else {}
        if self.positions and not self.unpadded:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
        return [row[-len(answer) - 1 : -1] for row, answer in zip(logits, answers, strict=True)]

    def _decoder(self, examples: Sequence[Example], answers: Sequence[list[int]]) -> list[torch.Tensor]:
        """(answer's tokens, vocabulary) of each, from a decoder that writes answers only."""
        read = [[i for i, on in zip(*e, strict=True) if not on] for e in examples]
        ids, mask = self._padded(read, "right")
        labels, _ = self._padded(answers, "right")
        shifted = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted, use_cache=False).logits
        return [row[: len(answer)] for row, answer in zip(logits, answers, strict=True)]

    def _padded(self, lists: Sequence[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [torch.tensor(ids, device=self.model.device) for ids in lists]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad, padding_side=side)
        return ids, pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side=side)


def _row(logits: torch.Tensor, answer: Sequence[int]) -> dict[str, Any]:
    targets = torch.tensor(answer, device=logits.device)
    logits = logits.float()
    return {
        "reference_tokens": len(answer),
        "reference_nll": float(cross_entropy(logits, targets, reduction="sum")),
        "reference_hits": int((logits.argmax(-1) == targets).sum()),
    }


def _plain(model: Any) -> Any:
    """The model itself, where an adapter stands around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
