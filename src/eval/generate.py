"""Batched generation by transformers: greedy unless asked otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, set_seed

from src.errors import ConfigError
from src.eval.answers import Generation
from src.model.methods import has_virtual_tokens

SLACK = 4  # tokens before a stop string that are decoded with it: one may hold a part of a letter, or nothing


class Generator:
    """Answers batches of prompts. A batch draws on the seed and its own number, and on no batch before it.

    unpadded: a batch must hold prompts of one length. Virtual tokens stand to the left of the padding, and peft
        drops the position ids that would make up for it: padded, an answer would depend on the longest prompt.
    Raises: ConfigError if transformers refuses an argument in `extra`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_new_tokens: int, seed: int, extra: Mapping[str, Any],
        stop: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.seed = model.eval(), tokenizer, seed
        self.ends = end_tokens(model, tokenizer)
        marks = {text: tokenizer.convert_tokens_to_ids(text) for text in stop}
        special = tokenizer.added_tokens_decoder.keys()
        self.marks = {token for token in marks.values() if token in special}  # a text would not show them
        self.stop = [text for text, token in marks.items() if token not in special]
        self.unpadded = has_virtual_tokens(model)
        try:
            self.settings = GenerationConfig(
                **{"do_sample": False, **extra},
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(self.ends | self.marks),
                pad_token_id=tokenizer.pad_token_id,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"generation={dict(extra)}: {error}", hint="see transformers.GenerationConfig"
            ) from error
        if model.device.type == "cuda" and not self.settings.cache_implementation and not self.unpadded:
            # One block for keys and values, so that the memory a batch takes shows at its beginning. It is as long
            # as prompt and answer: virtual tokens have no place there.
            self.settings.cache_implementation = "static"
            self.settings.disable_compile = True

    def __call__(self, prompts: Sequence[list[int]], number: int) -> list[Generation]:
        set_seed((self.seed + number) % 2**32)
        with torch.inference_mode():
            return [self._read(tokens) for tokens in self._generate(prompts)]

    def _generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """The new tokens of each prompt. Padding is on the left, so that an answer follows its prompt at once; an
        encoder reads texts padded on the right, and its decoder begins with one token of its own."""
        width = max(map(len, prompts))
        own = 1 if self.model.config.is_encoder_decoder else width
        rows, mask = [], []
        for ids in prompts:
            rest = width - len(ids)
            left, right = (0, rest) if self.model.config.is_encoder_decoder else (rest, 0)
            rows.append([self.tokenizer.pad_token_id] * left + ids + [self.tokenizer.pad_token_id] * right)
            mask.append([0] * left + [1] * len(ids) + [0] * right)
        ends = [EndsWith(self.tokenizer, self.stop, own)] if self.stop else []
        made = self.model.generate(
            input_ids=torch.tensor(rows, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            generation_config=self.settings,
            stopping_criteria=StoppingCriteriaList(ends),
        )
        return made[:, own:].tolist()

    def _read(self, tokens: list[int]) -> Generation:
        end = next((i for i, token in enumerate(tokens) if token in self.ends | self.marks), None)
        kept = tokens if end is None else tokens[:end]
        text = self._decode(kept)
        if (cut := find_stop(self.stop, text)) is not None:
            count = next(
                n for n in range(1, len(kept) + 1) if find_stop(self.stop, self._decode(kept[:n])) is not None
            )
            return Generation(text[:cut], count, "stop")
        if end is None:
            return Generation(text, len(kept), "length")
        return Generation(text, len(kept), "end" if tokens[end] in self.ends else "stop")

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class EndsWith(StoppingCriteria):  # type: ignore[misc]
    """Says of each row of a batch whether its answer, which begins at token `start`, holds a stop string.

    Rows that do are finished one by one, as if they had ended their turn.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        self.reach = max(len(text.encode()) for text in stop) + SLACK

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        first = max(self.start, input_ids.shape[1] - self.reach)
        texts = self.tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
        return torch.tensor([find_stop(self.stop, text) is not None for text in texts], device=input_ids.device)


def find_stop(stop: Sequence[str], text: str) -> int | None:
    """Where the first stop string in `text` begins."""
    return min((text.find(s) for s in stop if s in text), default=None)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a turn: the tokenizer's, and those that the model's own settings name."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
