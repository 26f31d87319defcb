"""Whether an adapter is merged into its base for an evaluation, which saves its own products in every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from src.data.chat import Chat
from src.errors import ModelError
from src.eval.classify import Chooser
from src.model import methods
from src.model.divergence import mean_kl
from src.utils.environment import Reasoned

# Nats a token. Computing in bfloat16 instead of fp32 alone moves the next token's distribution by 1.6e-3 (measured
# on SmolLM2-135M with a LoRA of rank 16, docs/evaluation.md). Merged weights are rounded at other places, no more
# coarsely: they lie 1.4e-3 from fp32 and 2.1e-3 from the adapter. Two roundings that know nothing of each other
# may lie as far apart as both together, and a little more; what is far beyond is no rounding.
MOST_KL = 5e-3
SAMPLE = 16  # prompts, spread over all of them
LAST = 16  # places of each, the last ones


def merged(
    model: Any, asked: bool | str, dtype: str, task: str, chat: Chat, prompts: Sequence[list[int]],
    again: Callable[[], Any],
) -> tuple[Any, Reasoned]:  # fmt: skip
    """`model` with its adapter merged or as it is, and why.

    Args:
        asked: the setting merge_adapter.
        prompts: token ids of the evaluation's prompts, on some of which both ways are compared.
        again: loads the model anew, if the merged one is too far off: merging cannot be undone exactly.
    Raises: ModelError if merge_adapter=true and it cannot be merged.
    """
    if not hasattr(model, "peft_config"):
        return model, Reasoned("none", "full weights have no adapter")
    if asked is False:
        return model, Reasoned("no", "merge_adapter=false")
    if asked is True:
        return methods.merge(model), Reasoned("yes", "merge_adapter=true")
    few = [prompts[i] for i in range(0, len(prompts), max(1, len(prompts) // SAMPLE))][:SAMPLE]
    exact = dtype == "float32"
    before = None if exact or methods.has_virtual_tokens(model) else next_tokens(model, task, chat, few)
    try:
        model = methods.merge(model)
    except ModelError as error:
        return model, Reasoned("no", error.problems[0])
    if before is None:
        return model, Reasoned("yes", "merging is exact to the rounding of float32")
    distance = mean_kl(before, next_tokens(model, task, chat, few))
    told = f"in {dtype} the merged weights are {distance:.1e} nats a token away (mean KL, {len(few)} prompts)"
    if distance <= MOST_KL:
        return model, Reasoned("yes", f"{told}, at most {MOST_KL:g}")
    return again(), Reasoned("no", f"{told}, over {MOST_KL:g}")


def next_tokens(model: Any, task: str, chat: Chat, prompts: Sequence[list[int]]) -> torch.Tensor:
    """(places, vocabulary or labels) what the model says next at the ends of the prompts, one by one."""
    model.eval()
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            if task == "classification":
                logits = Chooser(model, chat.tokenizer.pad_token_id, ()).logits([prompt])
            else:
                ids = {"input_ids": torch.tensor([prompt], device=model.device)}
                if model.config.is_encoder_decoder:
                    first = model.config.decoder_start_token_id
                    ids["decoder_input_ids"] = torch.tensor([[first]], device=model.device)
                logits = model(**ids, use_cache=False).logits[0, -LAST:]
            found.append(logits.cpu())
    return torch.cat(found)
