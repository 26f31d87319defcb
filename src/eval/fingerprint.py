"""The conditions of an evaluation: everything besides the model that determines the scores.

Baselines are cached by the hash of their conditions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..model.source import Source, TunedModel, content_hash
from ..schema import EvalArgs
from ..utils.files import sha256
from ..utils.secrets import redact_secrets
from . import metrics
from .evaluations import fingerprint


def eval_conditions(
    task: str, args: EvalArgs, seed: int, *, data: Mapping[str, str], prompts: Mapping[str, Sequence[list[int]]],
    tokenization: Mapping[str, str], stop_tokens: Sequence[str], batch_sizes: Mapping[str, int], dtype: str,
    device: str,
) -> dict[str, Any]:  # fmt: skip
    """The conditions of an evaluation. Two results are comparable if and only if they are equal.

    Args:
        data: the sha256 of each split's file.
        prompts: the token ids of each split's prompts.
        tokenization: hashes of tokenizer and chat template.
        stop_tokens: tokens that end an answer, if the tokenizer's end-of-sequence token is not the only one.
    """
    return {
        "task": task,
        "data": dict(data),
        "max_examples": args.max_examples,
        "prompts": {split: _hash(ids) for split, ids in prompts.items()},
        "tokenization": dict(tokenization),
        "decoding": {"max_new_tokens": args.max_new_tokens, "seed": seed, "stop": redact_secrets(list(args.stop))}
        | ({"stop_tokens": list(stop_tokens)} if stop_tokens else {})
        | redact_secrets(args.generation),
        "engine": engine_version(args.engine),
        "batch_size": dict(batch_sizes),
        "precision": dtype,
        "device": device,
        "metrics": {name: about["implementation"] for name, about in metrics.describe(args.metrics or []).items()},
    }


def engine_version(engine: str) -> str:
    """The engine that generates, with its version unless requirements.txt pins that."""
    return f"vllm {metadata.version('vllm')}" if engine == "vllm" else engine


def _hash(prompts: Sequence[Sequence[int]]) -> str:
    """The sha256 of token ids."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def differing_conditions(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The names of the conditions that differ, with the differing keys of those that are mappings."""
    found = []
    for key in sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found.append(f"{key} ({', '.join(sorted(k for k in {*a, *b} if a.get(k) != b.get(k)))})")
        else:
            found.append(key)
    return found


def baseline_folder(artifacts_dir: str, base: Mapping[str, Any], conditions: Mapping[str, Any]) -> Path:
    """The folder that caches the base model's result under these conditions."""
    revision = hashlib.sha256(str(base["revision"]).encode()).hexdigest()[:8]
    name = str(base["name"]).rstrip("/").rsplit("/", 1)[-1]
    return Path(artifacts_dir) / "metrics" / f"{name}-{revision}-{fingerprint(conditions)}"


def base_model(source: Source, recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Name and revision of the base model; for a full fine-tune those that its run's manifest `recorded`."""
    return dict(recorded or {"name": source.name, "revision": source.revision})


def without_metrics(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions that the answers depend on: all but the metrics by which they are scored."""
    return {key: value for key, value in conditions.items() if key != "metrics"}


def model_identity(
    conditions: Mapping[str, Any],
    base: Source,
    tuned: TunedModel | None = None,
    merge_adapter: bool | str | None = None,
) -> dict[str, Any]:
    """What the predictions of a model depend on, down to its weights and the versions of the libraries."""
    found = {
        "conditions": without_metrics(conditions),
        "base": base_model(base),
        "libraries": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    if tuned is None or not tuned.is_adapter:
        return found
    settings = sha256(tuned.folder / "adapter_config.json")
    return found | {"adapter": [content_hash(tuned.folder), settings], "merge_adapter": merge_adapter}
