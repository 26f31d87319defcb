"""Log-likelihood of the reference answers: one teacher-forced pass over prompt and answer.

Logits are computed at the answers' positions only; `batching.reference_batch_size` limits the rows of a batch.
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
    """Gives each example `reference_tokens`, `reference_nll` (nats, summed) and `reference_hits` (tokens that are
    the model's own next token, given those before).

    examples: the rows as in training, up to the answer's end-of-turn token.
    unpadded: a batch must hold examples of one length, as the model cannot be given positions behind padding.
    """

    def __init__(self, model: Any, tokenizer: Any, examples: Sequence[Example]) -> None:
        self.model, self.pad = model.eval(), tokenizer.pad_token_id
        self.examples = examples
        parameters = inspect.signature(_base_model(model).forward).parameters
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.has_position_ids = "position_ids" in parameters
        self.has_logits_to_keep = "logits_to_keep" in parameters
        self.unpadded = has_virtual_tokens(model) or not (self.seq2seq or self.has_position_ids)

    def __call__(self, indices: Sequence[int], number: int) -> list[Mapping[str, Any]]:
        examples = [self.examples[i] for i in indices]
        answers = [[i for i, on in zip(*e, strict=True) if on] for e in examples]
        with torch.inference_mode():
            logits = (self._decoder_logits if self.seq2seq else self._causal_logits)(examples, answers)
            return [_score(row, answer) for row, answer in zip(logits, answers, strict=True)]

    def _causal_logits(self, examples: Sequence[Example], answers: Sequence[list[int]]) -> list[torch.Tensor]:
        """(answer's tokens, vocabulary) of each example. With padding on the left, all answers end together."""
        ids, mask = self._padded([e.ids for e in examples], "left")
        longest = max(map(len, answers)) + 1
        more: dict[str, Any] = {"logits_to_keep": longest} if self.has_logits_to_keep else {}
        if self.has_position_ids and not self.unpadded:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
        return [row[-len(answer) - 1 : -1] for row, answer in zip(logits, answers, strict=True)]

    def _decoder_logits(self, examples: Sequence[Example], answers: Sequence[list[int]]) -> list[torch.Tensor]:
        """(answer's tokens, vocabulary) of each example, from the decoder of an encoder-decoder."""
        sources = [[i for i, on in zip(*e, strict=True) if not on] for e in examples]
        ids, mask = self._padded(sources, "right")
        labels, _ = self._padded(answers, "right")
        shifted = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted, use_cache=False).logits
        return [row[: len(answer)] for row, answer in zip(logits, answers, strict=True)]

    def _padded(self, lists: Sequence[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, (rows, longest) each."""
        rows = [torch.tensor(ids, device=self.model.device) for ids in lists]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad, padding_side=side)
        return ids, pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side=side)


def _score(logits: torch.Tensor, answer: Sequence[int]) -> dict[str, Any]:
    targets = torch.tensor(answer, device=logits.device)
    logits = logits.float()
    return {
        "reference_tokens": len(answer),
        "reference_nll": float(cross_entropy(logits, targets, reduction="sum")),
        "reference_hits": int((logits.argmax(-1) == targets).sum()),
    }


def _base_model(model: Any) -> Any:
    """The transformers model, without the adapter around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
