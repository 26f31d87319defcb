"""How many prompts are answered at once: by the model's settings and the memory that the device has in all.

What is free at the moment is not asked, so that base and tuned model, today and tomorrow, get the same number on
one machine: an answer may depend on the shape of its batch in the last digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from src.utils.environment import Capacity, Reasoned

# On a CPU a step costs little more for 64 prompts than for 8: reading the weights is what takes the time. Beyond
# that only the padding grows. See docs/evaluation.md.
MOST = {"cpu": 64, "cuda": 256}
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
SHARE = 0.5  # of the memory, the weights included: the rest is for the library, other processes, and fragments
ROOM = 1 << 29  # bytes for the logits of a batch of reference answers
COPIES = 3  # of logits: as they come, in fp32, and what is made of them
LEAST_ROOM = 0.02  # of the memory, where weights alone take more than that share


def batch_size(
    asked: int | str, config: Mapping[str, Any], longest: int, new: int, dtype: str, device: str, memory: Capacity
) -> Reasoned:
    """The number asked for; for `auto` the power of two for which the memory has room.

    Args:
        config: the model's config.json, in which sizes have one of several names.
        longest: tokens of the longest prompt; `new`: of the longest answer.
    """
    if asked != "auto":
        return Reasoned(str(asked), f"eval_batch_size={asked}")
    each = sequence_bytes(config, longest, new, WIDTH[dtype])
    room = max(SHARE * memory.bytes - parameter_count(config) * WIDTH[dtype], LEAST_ROOM * memory.bytes)
    size = 1
    while size < MOST[device] and 2 * size * each <= room:
        size *= 2
    return Reasoned(
        str(size),
        f"eval_batch_size=auto: {each / 1e6:,.1f} MB a prompt, {memory.bytes / 2**30:.1f} GiB of memory in all, "
        f"at most {MOST[device]} on {device}",
    )


def sequence_bytes(config: Mapping[str, Any], longest: int, new: int, width: int) -> int:
    """Bytes for one prompt and its answer: keys and values of every layer, a layer's activations over the prompt,
    and the logits of one token."""
    sizes = model_sizes(config)
    cache = 2 * sizes["layers"] * sizes["kv_heads"] * sizes["head"] * (longest + new)
    activations = longest * (6 * sizes["hidden"] + 3 * sizes["inner"])
    return width * (cache + activations) + COPIES * 4 * sizes["vocabulary"]


def parameter_count(config: Mapping[str, Any]) -> int:
    """About how many weights the model has, experts included."""
    s = model_sizes(config)
    attention = 2 * s["hidden"] * s["head"] * (s["heads"] + s["kv_heads"])
    layer = attention + 3 * s["hidden"] * s["inner"] * s["experts"]
    return s["layers"] * layer + 2 * s["vocabulary"] * s["hidden"]


def model_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that a config.json tells, by one of several names each."""
    text = config.get("text_config") or config

    def size(*names: str, default: int = 0) -> int:
        found = (text.get(name) for name in names)
        return next((value for value in found if isinstance(value, int) and value > 0), default)

    hidden = size("hidden_size", "d_model", "n_embd", default=1024)
    heads = size("num_attention_heads", "decoder_attention_heads", "num_heads", "n_head", default=16)
    layers = size("num_hidden_layers", "decoder_layers", "num_layers", "n_layer", default=24)
    return {
        "hidden": hidden,
        "heads": heads,
        "kv_heads": size("num_key_value_heads", default=heads),
        "head": size("head_dim", "d_kv", default=hidden // heads),
        "layers": layers * (2 if text.get("is_encoder_decoder") else 1),
        "inner": size("intermediate_size", "decoder_ffn_dim", "d_ff", "n_inner", default=4 * hidden),
        "experts": size("num_local_experts", "num_experts", "n_routed_experts", default=1),
        "vocabulary": size("vocab_size", default=32_000),
    }


def reference_batch_size(lengths: Sequence[int], vocabulary: int) -> int:
    """Reference answers whose logits have room at once, by their tokens; a power of two."""
    size = 1
    while 2 * size * (max(lengths) + 1) * vocabulary * 4 * COPIES <= ROOM:
        size *= 2
    return size


def batch_indices(lengths: Sequence[int], size: int, *, unpadded: bool) -> Iterator[list[int]]:
    """Places of `lengths` in batches, the longest first: what does not fit the memory shows at once.

    unpadded: no batch holds two lengths.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups = [list(g) for _, g in groupby(order, key=lambda i: lengths[i])] if unpadded else [order]
    for group in groups:
        yield from (group[start : start + size] for start in range(0, len(group), size))
