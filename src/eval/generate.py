"""Batched generation: longest prompts first, greedy unless asked otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig, set_seed

from src.errors import ConfigError
from src.model.methods import has_virtual_tokens


class Answer(NamedTuple):
    """`stop` is `end` where the model ended its turn, `length` where it was cut at `max_new_tokens`."""

    text: str
    tokens: int
    stop: str


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
    extra: Mapping[str, Any],
    title: str,
) -> list[Answer]:
    """Answers to `prompts` (lists of token ids), in their order. Only sampling draws on `seed`."""
    ends = end_tokens(model, tokenizer)
    try:
        settings = GenerationConfig(
            **{"do_sample": False, **extra},
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"generation={dict(extra)}: {error}", hint="see transformers.GenerationConfig"
        ) from error
    set_seed(seed)
    model.eval()
    answers: dict[int, Answer] = {}
    # The longest go first: what does not fit the memory shows at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = _batches(order, prompts, batch_size, unpadded=has_virtual_tokens(model))
    with tqdm(total=len(prompts), desc=title, unit="prompt", disable=None) as bar, torch.inference_mode():
        for batch in batches:
            for index, found in zip(batch, _generate(model, tokenizer, prompts, batch, settings), strict=True):
                answers[index] = _read(found, ends, tokenizer)
            bar.update(len(batch))
    return [answers[i] for i in range(len(prompts))]


def _batches(
    order: Sequence[int], prompts: Sequence[list[int]], batch_size: int, *, unpadded: bool
) -> Iterator[Sequence[int]]:
    """`order` in batches; `unpadded`: of prompts of one length each.

    Virtual tokens stand to the left of the padding, and peft drops the position ids that would make up for it:
    padded, an answer would depend on the longest prompt of its batch.
    """
    groups = [list(g) for _, g in groupby(order, key=lambda i: len(prompts[i]))] if unpadded else [order]
    for group in groups:
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a turn: the tokenizer's, and those that the model's own settings name."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], batch: Sequence[int], settings: GenerationConfig
) -> Iterator[list[int]]:
    """The new tokens of each prompt. Padding is on the left, so that an answer follows its prompt at once; an
    encoder reads texts padded on the right, and its decoder begins with one token of its own."""
    width = max(len(prompts[i]) for i in batch)
    own = 1 if model.config.is_encoder_decoder else width
    rows, mask = [], []
    for ids in (prompts[i] for i in batch):
        rest = width - len(ids)
        left, right = (0, rest) if model.config.is_encoder_decoder else (rest, 0)
        rows.append([tokenizer.pad_token_id] * left + ids + [tokenizer.pad_token_id] * right)
        mask.append([0] * left + [1] * len(ids) + [0] * right)
    made = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=settings,
    )
    yield from made[:, own:].tolist()


def _read(tokens: list[int], ends: set[int], tokenizer: Any) -> Answer:
    stop = next((i for i, token in enumerate(tokens) if token in ends), None)
    kept = tokens if stop is None else tokens[:stop]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Answer(text, len(kept), "length" if stop is None else "end")
