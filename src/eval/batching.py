"""Batches of an evaluation: their size, their order, and smaller ones where memory runs out.

The size depends on the model's config and the total memory of the device. Free memory is not considered: base and
tuned model must get the same size on one machine, as a prediction may depend on the shape of its batch in the last
digits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from ..errors import OutOfMemory
from ..utils.environment import Capacity, Reasoned
from ..utils.logs import log
from ..utils.progress import progress
from .partial_results import Part

# On a CPU a step costs little more for 64 prompts than for 8, as it is bound by reading the weights; beyond that
# only the padding grows. See docs/evaluation.md.
MAX_BATCH_SIZE = {"cpu": 64, "cuda": 256}
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MEMORY_SHARE = 0.5  # of the total, weights included: the rest is for libraries, other processes and fragmentation
MIN_SHARE = 0.02  # of the total for a batch, where the weights alone exceed MEMORY_SHARE
LOGITS_BYTES = 1 << 29  # for a batch of reference answers
LOGITS_COPIES = 3  # the model's, in fp32, and one more for the loss

Predict = Callable[[list[int], int], Sequence[Mapping[str, Any]]]  # indices, number of the batch -> rows


def batch_size(
    setting: int | str,
    config: Mapping[str, Any],
    longest: int,
    new: int,
    dtype: str,
    device: str,
    memory: Capacity,
) -> Reasoned:
    """The setting eval_batch_size; for `auto` the largest power of two that fits into memory.

    Args:
        config: the model's config.json.
        longest: tokens of the longest prompt; `new`: of the longest answer.
    """
    if setting != "auto":
        return Reasoned(str(setting), f"eval_batch_size={setting}")
    each = sequence_bytes(config, longest, new, VALUE_BYTES[dtype])
    weights = parameter_count(config) * VALUE_BYTES[dtype]
    available = max(MEMORY_SHARE * memory.bytes - weights, MIN_SHARE * memory.bytes)
    size = 1
    while size < MAX_BATCH_SIZE[device] and 2 * size * each <= available:
        size *= 2
    return Reasoned(
        str(size),
        f"eval_batch_size=auto: {each / 1e6:,.1f} MB a prompt, {memory.bytes / 2**30:.1f} GiB of memory in total, "
        f"at most {MAX_BATCH_SIZE[device]} on {device}",
    )


def sequence_bytes(config: Mapping[str, Any], longest: int, new: int, width: int) -> int:
    """Bytes of one prompt and its answer, at `width` bytes a value.

    They are the keys and values of every layer, one layer's activations over the prompt, and one token's logits.
    """
    sizes = model_sizes(config)
    cache = 2 * sizes["layers"] * sizes["kv_heads"] * sizes["head"] * (longest + new)
    activations = longest * (6 * sizes["hidden"] + 3 * sizes["inner"])
    return width * (cache + activations) + LOGITS_COPIES * 4 * sizes["vocabulary"]


def parameter_count(config: Mapping[str, Any]) -> int:
    """The approximate number of weights, experts included."""
    s = model_sizes(config)
    attention = 2 * s["hidden"] * s["head"] * (s["heads"] + s["kv_heads"])
    layer = attention + 3 * s["hidden"] * s["inner"] * s["experts"]
    return s["layers"] * layer + 2 * s["vocabulary"] * s["hidden"]


def model_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in a config.json, each of which has one of several names."""
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
    """The largest power of two for which logits of answers with `lengths` tokens fit LOGITS_BYTES."""
    size = 1
    while 2 * size * (max(lengths) + 1) * vocabulary * 4 * LOGITS_COPIES <= LOGITS_BYTES:
        size *= 2
    return size


def batch_indices(lengths: Sequence[int], size: int, *, unpadded: bool) -> Iterator[list[int]]:
    """Indices of `lengths` in batches, the longest first, so that running out of memory shows at once.

    unpadded: no batch holds two different lengths.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups = [list(g) for _, g in groupby(order, key=lambda i: lengths[i])] if unpadded else [order]
    for group in groups:
        yield from (group[start : start + size] for start in range(0, len(group), size))


def run_batched(
    predict: Predict, lengths: Sequence[int], size: int, part: Part, *, unpadded: bool = False
) -> tuple[list[dict[str, Any]], int]:
    """A row for each of `lengths`, in order; rows that `part` already holds are not predicted again.

    A batch that does not fit into memory restarts the part with half the size, so that one size made all its rows.
    Returns: the rows, and the batch size that made them.
    Raises: OutOfMemory if a single example does not fit.
    """
    size = part.size or size
    while True:
        try:
            _run(predict, lengths, size, part, unpadded)
            return [part.rows[i] for i in range(len(lengths))], size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise OutOfMemory(
                    f"out of memory with one prompt at a time, in {part.name}",
                    hint="lower max_new_tokens, or use a smaller model or a larger machine",
                ) from error
        gc.collect()  # after the except block: the exception's traceback references the batch
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
        log.warning("out of memory: %s restarts with batches of %d", part.name, size)
        part.restart(size)


def _run(predict: Predict, lengths: Sequence[int], size: int, part: Part, unpadded: bool) -> None:
    with progress(part.name, len(lengths), "row", done=len(part.rows)) as bar:
        for number, indices in enumerate(batch_indices(lengths, size, unpadded=unpadded)):
            if part.rows.keys() >= set(indices):
                continue
            part.add({i: dict(row) for i, row in zip(indices, predict(indices, number), strict=True)})
            bar.add(len(indices))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the allocator of a GPU or of the CPU raised `error`."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
