"""Find values of a config.json that no model can have, or that its weights do not have. No torch.

A library that builds such a model may take all memory, or give the layers that the files lack random weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Values that are a number of something, or a list of such numbers, one for each layer.
LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "encoder_layers",
    "decoder_layers",
)  # fmt: skip
# Numbers of modules, each of which is a Python object.
MODULES = (
    *LAYERS, "num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "num_experts",
    "num_local_experts", "n_routed_experts",
)  # fmt: skip
SIZES = (
    "hidden_size", "intermediate_size", "vocab_size", "head_dim", "d_model", "d_ff", "d_kv", "n_embd",
    "n_positions", "n_ctx", "n_inner", "max_position_embeddings",
)  # fmt: skip
MAX_MODULES, MAX_SIZE = 10_000, 2**31 - 1
LIMITS = {name: MAX_SIZE for name in SIZES} | {name: MAX_MODULES for name in MODULES}
# The dense model of a family has no experts, and a decoder no encoder.
NONE_ALLOWED = {"num_experts", "num_local_experts", "n_routed_experts", "encoder_layers", "decoder_layers"}
LANGUAGE_PARTS = ("", "text_config.", "encoder.", "decoder.")  # the weights of others may be left out of the files
SHARED_LAYERS = "num_hidden_groups"  # ALBERT: several layers use the same weights


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What is impossible in a config.json and in the parts that it holds."""
    for prefix, part in _parts(config):
        for key, limit in LIMITS.items():
            first = 0 if key in NONE_ALLOWED else 1
            if not _is_size(value := part.get(key), first, limit):
                shown = json.dumps(value)[:40]
                told = f"config.json has {prefix}{key}={shown}, which should be a whole number"
                yield f"{told} from {first} to {limit}"
        yield from (f"config.json has {prefix}{problem}" for problem in _contradictions(part))


def _contradictions(part: Mapping[str, Any]) -> Iterator[str]:
    heads, groups = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and groups > 0 and heads % groups:
        yield f"num_attention_heads={heads}, which is no multiple of num_key_value_heads={groups}"
    start, rows = part.get("decoder_start_token_id"), part.get("vocab_size")
    if isinstance(start, int) and isinstance(rows, int) and start >= rows:
        yield f"decoder_start_token_id={start}, which is not in its vocabulary of {rows}"


def layer_problems(config: Mapping[str, Any], tensors: Iterable[str]) -> Iterator[str]:
    """Numbers of layers above what the names of the `tensors` show, such as `model.layers.11.mlp.up.weight`."""
    found = [int(number[1]) for name in tensors if (number := re.search(r"\.(\d+)\.", f".{name}"))]
    if not found or SHARED_LAYERS in config:
        return
    held = max(found) + 1
    for prefix, part in _parts(config):
        for key in LAYERS if prefix in LANGUAGE_PARTS else ():
            if isinstance(value := part.get(key), int) and value > held:
                yield f"config.json has {prefix}{key}={value}, and the files hold the weights of {held}"


def unknown_ends(config: Mapping[str, Any]) -> list[int]:
    """The ids of `eos_token_id` that are not in the vocabulary. Models with a tokenizer of their own have such."""
    ends, rows = config.get("eos_token_id"), config.get("vocab_size")
    listed = ends if isinstance(ends, list) else [ends]
    return [end for end in listed if isinstance(end, int) and isinstance(rows, int) and end >= rows]


def _parts(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    parts = [(f"{name}.", part) for name, part in config.items() if isinstance(part, Mapping)]
    return [("", config), *parts]


def _is_size(value: Any, first: int, limit: int) -> bool:
    if isinstance(value, list):
        return all(_is_size(each, first, limit) for each in value)
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and first <= value <= limit)
