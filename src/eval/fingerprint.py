"""What scores depend on, the model's weights aside: equal conditions are what makes two results comparable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from src.data.chat import ChatTokenizer
from src.eval import metrics
from src.eval.inference import BatchPlan, EvalRequests, Settings
from src.model.source import Source, Tuned, content_hash
from src.utils.environment import Reasoned
from src.utils.files import sha256
from src.utils.secrets import redact


def conditions(
    cfg: Settings, data: Mapping[str, str], asked: EvalRequests, chat: ChatTokenizer, dtype: Reasoned,
    device: Reasoned, plan: BatchPlan,
) -> dict[str, Any]:  # fmt: skip
    return {
        "task": cfg.task,
        "data": dict(data),
        "max_examples": cfg.max_examples,
        "prompts": {split: _hash_of(prompts) for split, prompts in asked.prompts.items()},
        "tokenization": chat.identity,
        "decoding": {"max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed, "stop": redact(list(cfg.stop))}
        | redact(cfg.generation),
        "engine": engine(cfg),
        "batch_size": dict(plan.sizes),
        "precision": dtype.value,
        "device": device.value,
        "metrics": {name: about["implementation"] for name, about in metrics.describe(cfg.metrics or []).items()},
    }


def engine(cfg: Settings) -> str:
    """What generates, with its version where that is not the one that requirements.txt pins."""
    return f"vllm {metadata.version('vllm')}" if cfg.engine == "vllm" else cfg.engine


def _hash_of(prompts: Sequence[Sequence[int]]) -> str:
    """sha256 over token ids."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def base_model(source: Source, recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The base model's identity; a full fine-tune knows its base only from its run's manifest."""
    return dict(recorded or {"name": source.name, "revision": source.revision})


def identity(conditions: Mapping[str, Any], base: Source, tuned: Tuned | None = None, merge: Any = None) -> Any:
    """What the answers of a model depend on, down to its weights and the libraries that compute them."""
    found = {
        "conditions": dict(conditions),
        "base": base_model(base),
        "libraries": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    if tuned is None or not tuned.is_adapter:
        return found
    settings = sha256(tuned.folder / "adapter_config.json")
    return found | {"adapter": [content_hash(tuned.folder), settings], "merge_adapter": merge}
