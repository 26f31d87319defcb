"""Batches through a model with transformers: generation, classification, log-likelihood of reference answers.

Generation is greedy by default. The log-likelihood takes one teacher-forced pass over prompt and answer, with
logits at the answers' positions only; `batching.reference_batch_size` limits the rows of its batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, set_seed

from ..data.store import Example
from ..errors import ConfigError
from ..model import stop_tokens
from ..model.methods import has_virtual_tokens

STOP_SLACK = 4  # tokens decoded in addition to a stop string: a token may hold part of a character, or nothing


class Generation(NamedTuple):
    """A generated text, of either engine.

    tokens: the number generated, without the end of the turn.
    stop: `end` where the model ended its turn, `stop` where it wrote a stop string (the text ends before it),
        `length` where `max_new_tokens` cut it.
    """

    text: str
    tokens: int
    stop: str

    def to_row(self) -> dict[str, Any]:
        return {"prediction": self.text, "tokens": self.tokens, "stop": self.stop}


class Prediction(NamedTuple):
    """The label with the highest logit, and its probability (softmax over the labels)."""

    label: str
    probability: float

    def to_row(self) -> dict[str, Any]:
        return {"prediction": self.label, "probability": self.probability}


class Generator:
    """Generates for batches of prompts (token ids). Sampling depends on `seed` and the batch's number only.

    stop_token_ids: those by which the chat template ends a turn, in addition to the model's own.
    unpadded: a batch must hold prompts of one length. Virtual tokens are to the left of the padding, and peft
        drops the position ids that would make up for it: the result would depend on the batch's longest prompt.
    Raises: ConfigError if transformers rejects an argument in `extra`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_new_tokens: int, seed: int, extra: Mapping[str, Any],
        stop: Sequence[str] = (), stop_token_ids: Iterable[int] = (),
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.seed = model.eval(), tokenizer, seed
        self.end_ids = end_tokens(model, tokenizer) | {*stop_token_ids}
        ids = {text: tokenizer.convert_tokens_to_ids(text) for text in stop}
        special = tokenizer.added_tokens_decoder.keys()
        self.stop_ids = {token for token in ids.values() if token in special}  # decoding drops these
        self.stop = [text for text, token in ids.items() if token not in special]
        self.unpadded = has_virtual_tokens(model)
        try:
            self.settings = GenerationConfig(
                **{"do_sample": False, **extra},
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(self.end_ids | self.stop_ids),
                pad_token_id=tokenizer.pad_token_id,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"generation={dict(extra)}: {error}", hint="see transformers.GenerationConfig"
            ) from error
        if model.device.type == "cuda" and not self.settings.cache_implementation and not self.unpadded:
            # Preallocated keys and values show at the start whether a batch fits into memory. The cache is as long
            # as prompt and answer, so it has no space for virtual tokens.
            self.settings.cache_implementation = "static"
            self.settings.disable_compile = True

    def __call__(self, prompts: Sequence[list[int]], number: int) -> list[Generation]:
        set_seed((self.seed + number) % 2**32)
        with torch.inference_mode():
            return [self._decode_generation(tokens) for tokens in self._generate(prompts)]

    def _generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """The new tokens of each prompt.

        A decoder's prompts are padded on the left, so that the answer follows at once. An encoder's are padded on
        the right, and its decoder starts with a single token.
        """
        width = max(map(len, prompts))
        start = 1 if self.model.config.is_encoder_decoder else width
        rows, mask = [], []
        for ids in prompts:
            padding = width - len(ids)
            left, right = (0, padding) if self.model.config.is_encoder_decoder else (padding, 0)
            rows.append([self.tokenizer.pad_token_id] * left + ids + [self.tokenizer.pad_token_id] * right)
            mask.append([0] * left + [1] * len(ids) + [0] * right)
        criteria = [StopStringCriteria(self.tokenizer, self.stop, start)] if self.stop else []
        generated = self.model.generate(
            input_ids=torch.tensor(rows, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            generation_config=self.settings,
            stopping_criteria=StoppingCriteriaList(criteria),
        )
        return generated[:, start:].tolist()

    def _decode_generation(self, tokens: list[int]) -> Generation:
        end = next((i for i, token in enumerate(tokens) if token in self.end_ids | self.stop_ids), None)
        kept = tokens if end is None else tokens[:end]
        text = self._decode(kept)
        if (cut := find_stop(self.stop, text)) is not None:
            count = next(
                n for n in range(1, len(kept) + 1) if find_stop(self.stop, self._decode(kept[:n])) is not None
            )
            return Generation(text[:cut], count, "stop")
        if end is None:
            return Generation(text, len(kept), "length")
        return Generation(text, len(kept), "end" if tokens[end] in self.end_ids else "stop")

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class StopStringCriteria(StoppingCriteria):  # type: ignore[misc]
    """Finishes each row of a batch whose answer, from token `start` on, holds a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        self.reach = max(len(text.encode()) for text in stop) + STOP_SLACK

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        first = max(self.start, input_ids.shape[1] - self.reach)
        texts = self.tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
        return torch.tensor([find_stop(self.stop, text) is not None for text in texts], device=input_ids.device)


def find_stop(stop: Sequence[str], text: str) -> int | None:
    """The index in `text` of the first stop string."""
    return min((text.find(s) for s in stop if s in text), default=None)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a turn: the tokenizer's, and those of the model's generation config."""
    return {tokenizer.eos_token_id, *stop_tokens.configured(model.generation_config)} - {None}


class Classifier:
    """Predicts one of `labels` for each text (token ids). `labels` are in the order of the logits."""

    unpadded = False

    def __init__(self, model: Any, pad_token_id: int, labels: Sequence[str]) -> None:
        self.model, self.pad_token_id, self.labels = model.eval(), pad_token_id, labels

    def __call__(self, texts: Sequence[list[int]], number: int) -> list[Prediction]:
        with torch.inference_mode():
            probabilities = self.logits(texts).float().softmax(-1)
        best, ids = probabilities.max(-1)
        return [Prediction(self.labels[i], p) for i, p in zip(ids.tolist(), best.tolist(), strict=True)]

    def logits(self, texts: Sequence[list[int]]) -> torch.Tensor:
        """(texts, labels)"""
        rows = [torch.tensor(ids, device=self.model.device) for ids in texts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits


class ReferenceScorer:
    """Gives each example `reference_tokens`, `reference_nll` (nats, summed) and `reference_hits` (tokens that are
    the model's own next token, given those before).

    examples: the rows as in training, up to the answer's end-of-turn token.
    stop_token_ids: those by which the chat template ends a turn, in addition to the model's own.
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
