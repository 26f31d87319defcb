"""How a model meets the questions of an evaluation: its answers, and how likely it finds the references."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from src.data.chat import Chat
from src.data.store import Example
from src.eval import ask, metrics
from src.eval.ask import Questions

MOST_POSITIONS = 2048  # whose logits are kept: 2 to 4 bytes each and token of the vocabulary


class Behaviour(NamedTuple):
    """How a model meets the sample: next-token logits (positions, vocabulary), and its score by the metric."""

    logits: torch.Tensor
    score: float


def behaviour(model: Any, chat: Chat, asked: Questions) -> Behaviour:
    """What the model says to the questions, and how likely it finds the reference answers, token by token."""
    model.eval()
    score = metrics.score(asked.metric, ask.answers(model, chat, asked)).corpus
    kept: list[torch.Tensor] = []
    with torch.inference_mode():
        for example in _examples(model.config.to_dict(), chat, asked):
            if sum(map(len, kept)) < MOST_POSITIONS:
                kept.append(LOGITS[asked.task](model, example).cpu())
    return Behaviour(torch.cat(kept)[:MOST_POSITIONS], score)


def _examples(config: Mapping[str, Any], chat: Chat, asked: Questions) -> list[Example]:
    """Prompts with their reference answers; of a classifier, whose answer is no text, the prompts alone."""
    if asked.task == "classification":
        return [Example(ids, [False] * len(ids)) for ids in ask.prompts(config, chat, asked)]
    return ask.references(config, chat, asked)


def _of_text(model: Any, example: Example) -> torch.Tensor:
    """(answer tokens, vocabulary): each from the position before the token."""
    ids = torch.tensor([example.ids], device=model.device)
    places = [i - 1 for i, learnt in enumerate(example.learnt) if learnt and i]
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, places]


def _of_pair(model: Any, example: Example) -> torch.Tensor:
    """(answer tokens, vocabulary): the decoder's, which is given the answer so far."""
    source, target = _halves(example, model.device)
    logits: torch.Tensor = model(input_ids=source, attention_mask=torch.ones_like(source), labels=target).logits
    return logits[0]


def _of_label(model: Any, example: Example) -> torch.Tensor:
    """(1, labels)"""
    source = torch.tensor([example.ids], device=model.device)
    logits: torch.Tensor = model(input_ids=source, attention_mask=torch.ones_like(source)).logits
    return logits


def _halves(example: Example, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read and what is answered, (1, tokens) each."""
    halves = (
        [i for i, learnt in zip(example.ids, example.learnt, strict=True) if learnt is answer]
        for answer in (False, True)
    )
    source, target = (torch.tensor([half], device=device) for half in halves)
    return source, target


LOGITS: dict[str, Callable[[Any, Example], torch.Tensor]] = {
    "causal_lm": _of_text,
    "seq2seq": _of_pair,
    "classification": _of_label,
}
