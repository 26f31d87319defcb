"""Compare a model with its adapter merged to the same model with its adapter unmerged (KL divergence, score).

An evaluation merges the adapter in memory if that is exact enough (`merge_for_eval`). Publishing writes the merged
weights, and compares both models on a sample of the evaluation (`measure`, `mean_kl`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..data.chat import ChatTokenizer
from ..data.store import Example
from ..errors import ModelError
from ..model import methods
from ..utils.environment import Reasoned
from . import metrics, reevaluate
from .generate import Classifier
from .reevaluate import Reevaluation

# Nats a token. On SmolLM2-135M with a LoRA of rank 16, computing in bfloat16 instead of fp32 moves the next-token
# distribution by 1.6e-3 (docs/evaluation.md). Merged bfloat16 weights are 1.4e-3 from fp32, and 2.1e-3 from
# unmerged bfloat16 weights, as both are rounded independently. The limit is a little over twice the largest of
# these.
MAX_KL = 5e-3
SAMPLE_PROMPTS = 16  # spread over all prompts
LAST_POSITIONS = 16  # compared in each of them
MAX_POSITIONS = 2048  # whose logits are kept: 2 to 4 bytes for each token of the vocabulary
CHUNK = 64  # rows whose fp32 values exist at once


def merge_for_eval(
    model: Any, merge_adapter: bool | str, dtype: str, task: str, chat: ChatTokenizer,
    prompts: Sequence[list[int]], reload: Callable[[], Any],
) -> tuple[Any, Reasoned]:  # fmt: skip
    """`model` with its adapter merged, or as it is, and the reason.

    Args:
        prompts: token ids of the evaluation's prompts; both forms are compared on a sample of them.
        reload: loads the model again if the merged one is too far off: a merge cannot be undone exactly.
    Raises: ModelError if merge_adapter=true and the adapter cannot be merged.
    """
    if not hasattr(model, "peft_config"):
        return model, Reasoned("none", "full weights have no adapter")
    if merge_adapter is False:
        return model, Reasoned("no", "merge_adapter=false")
    if merge_adapter is True:
        return methods.merge(model), Reasoned("yes", "merge_adapter=true")
    sample = [prompts[i] for i in range(0, len(prompts), max(1, len(prompts) // SAMPLE_PROMPTS))][:SAMPLE_PROMPTS]
    exact = dtype == "float32"
    before = None if exact or methods.has_virtual_tokens(model) else next_token_logits(model, task, chat, sample)
    try:
        model = methods.merge(model)
    except ModelError as error:
        return model, Reasoned("no", error.problems[0])
    if before is None:
        return model, Reasoned("yes", "merging is exact to the rounding of float32")
    distance = mean_kl(before, next_token_logits(model, task, chat, sample))
    text = f"in {dtype} the merged weights are {distance:.1e} nats a token away (mean KL, {len(sample)} prompts)"
    if distance <= MAX_KL:
        return model, Reasoned("yes", f"{text}, at most {MAX_KL:g}")
    return reload(), Reasoned("no", f"{text}, over {MAX_KL:g}")


def next_token_logits(model: Any, task: str, chat: ChatTokenizer, prompts: Sequence[list[int]]) -> torch.Tensor:
    """Logits at the last positions of each prompt, one forward pass each: (positions, vocabulary or labels)."""
    model.eval()
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            if task == "classification":
                logits = Classifier(model, chat.tokenizer.pad_token_id, ()).logits([prompt])
            else:
                ids = {"input_ids": torch.tensor([prompt], device=model.device)}
                if model.config.is_encoder_decoder:
                    start = model.config.decoder_start_token_id
                    ids["decoder_input_ids"] = torch.tensor([[start]], device=model.device)
                logits = model(**ids, use_cache=False).logits[0, -LAST_POSITIONS:]
            found.append(logits.cpu())
    return torch.cat(found)


class Measurement(NamedTuple):
    """A model on a sample of the evaluation.

    logits: (positions, vocabulary or labels), those of the reference answers' tokens.
    score: of its predictions, by the metric of the sample.
    """

    logits: torch.Tensor
    score: float


def measure(model: Any, chat: ChatTokenizer, sample: Reevaluation) -> Measurement:
    """Score the model's predictions for `sample`, and keep its logits for the reference answers."""
    model.eval()
    score = metrics.score(sample.metric, reevaluate.predict(model, chat, sample)).corpus
    kept: list[torch.Tensor] = []
    with torch.inference_mode():
        for example in _examples(model.config.to_dict(), chat, sample):
            if sum(map(len, kept)) < MAX_POSITIONS:
                kept.append(LOGITS[sample.task](model, example).cpu())
    return Measurement(torch.cat(kept)[:MAX_POSITIONS], score)


def _examples(config: Mapping[str, Any], chat: ChatTokenizer, sample: Reevaluation) -> list[Example]:
    """Prompts with their reference answers; for a classifier the prompts alone."""
    if sample.task == "classification":
        return [Example(ids, [False] * len(ids)) for ids in reevaluate.prompt_ids(config, chat, sample)]
    return reevaluate.reference_examples(config, chat, sample)


def _causal_logits(model: Any, example: Example) -> torch.Tensor:
    """(answer tokens, vocabulary): each from the position before the token."""
    ids = torch.tensor([example.ids], device=model.device)
    positions = [i - 1 for i, has_loss in enumerate(example.loss_mask) if has_loss and i]
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, positions]


def _decoder_logits(model: Any, example: Example) -> torch.Tensor:
    """(answer tokens, vocabulary), from the decoder."""
    source, target = (
        torch.tensor([[i for i, on in zip(*example, strict=True) if on is is_target]], device=model.device)
        for is_target in (False, True)
    )
    logits: torch.Tensor = model(input_ids=source, attention_mask=torch.ones_like(source), labels=target).logits
    return logits[0]


def _label_logits(model: Any, example: Example) -> torch.Tensor:
    """(1, labels)"""
    source = torch.tensor([example.ids], device=model.device)
    logits: torch.Tensor = model(input_ids=source, attention_mask=torch.ones_like(source)).logits
    return logits


LOGITS: dict[str, Callable[[Any, Example], torch.Tensor]] = {
    "causal_lm": _causal_logits,
    "seq2seq": _decoder_logits,
    "classification": _label_logits,
}


def mean_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> float:
    """The mean over the rows of KL(p || q) = sum p (log p - log q), in nats a token (Kullback and Leibler 1951).

    Args: p_logits, q_logits: (n, vocabulary) each, of the same tokens; the distributions are their softmax.

    Computed in fp32 whatever the dtype of the logits. No rows give 0.
    """
    total = 0.0
    for p, q in zip(p_logits.split(CHUNK), q_logits.split(CHUNK), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return max(0.0, total / max(1, len(p_logits)))
