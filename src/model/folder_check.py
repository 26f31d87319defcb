"""Check the files of a model folder by their headers: possible sizes, all shards, complete weights. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import MAX_LISTED, ModelError
from ..utils.weights import find_weight_corruption, read_header

INDEX = "model.safetensors.index.json"
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
DAMAGED = "it is damaged: copy or download it again"
# Values of a config.json that are a number of something, or a list of such numbers, one for each layer.
SIZES = (
    "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "d_model", "d_ff", "d_kv", "num_layers", "num_heads", "num_decoder_layers",
    "n_embd", "n_layer", "n_head", "n_positions",
)  # fmt: skip

# Sizes of which a model is built module by module: a huge one would not end.
LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer")
MODULES = (*LAYERS, "num_experts", "num_local_experts", "n_routed_experts")
MOST_MODULES = 10_000


def check_folder(folder: Path, weights: bool = True) -> None:
    """Check config.json, and with `weights` the safetensors files that transformers would load.

    Raises: ModelError with every problem.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json", hint="model_name must be a transformers model folder")
    read = [_read_object(folder / name) for name in JSON_FILES if (folder / name).exists()]
    problems = [*_config_problems(folder), *(found for found in read if isinstance(found, str))]
    if weights:
        _check_has_weights(folder)
        problems += _weight_problems(folder)
        problems += [] if problems else _missing_layers(folder)
    if problems:
        listed = [f"{folder}: {problem}" for problem in problems[:MAX_LISTED]]
        raise ModelError(*listed, hint=DAMAGED)


def _check_has_weights(folder: Path) -> None:
    if not list(folder.glob("*.safetensors")) and not (folder / INDEX).exists():
        held = ", ".join(sorted(p.name for p in folder.glob("*.bin")))
        pickled = "pickled weights can run code and are not loaded; convert them to safetensors"
        raise ModelError(
            f"{folder} has no safetensors weights (it has: {held or 'none'})",
            hint=pickled if held else "download its model.safetensors, or the files of its index",
        )


def _config_problems(folder: Path) -> Iterator[str]:
    config = _read_object(folder / "config.json")
    if isinstance(config, str):
        yield config
        return
    parts = {"": config} | {f"{k}.": v for k, v in config.items() if isinstance(v, Mapping)}
    for prefix, part in parts.items():
        for key in SIZES:
            if not _is_size(value := part.get(key)):
                shown = json.dumps(value)[:40]
                yield f"config.json has {prefix}{key}={shown}, which should be a whole number from 1"
        for key in MODULES:
            if isinstance(value := part.get(key), int) and value > MOST_MODULES:
                yield f"config.json has {prefix}{key}={value}, which should be at most {MOST_MODULES:,}"
        heads, groups = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(groups, int) and groups > 0 and heads % groups:
            names = f"{prefix}num_attention_heads={heads}, which is no multiple of num_key_value_heads={groups}"
            yield f"config.json has {names}"


def _is_size(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_size, value))
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _weight_problems(folder: Path) -> Iterator[str]:
    """Problems of the files that hold the weights: one file, or an index of several."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists() or not index.exists():
        files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
        yield from filter(None, map(find_weight_corruption, files))
        if any("-of-" in file.name for file in files):
            yield f"{INDEX} is missing, which says what each file holds"
        return
    found = _read_object(index)
    places = found.get("weight_map") if isinstance(found, Mapping) else None
    if not isinstance(places, Mapping) or not all(isinstance(name, str) for name in places.values()):
        yield found if isinstance(found, str) else f"{INDEX} has no weight_map"
        return
    for name in sorted(set(places.values())):
        yield from _shard_problems(folder / Path(name).name, {key for key, file in places.items() if file == name})


def _missing_layers(folder: Path) -> list[str]:
    """A problem if the files hold fewer tensors than config.json has layers, or none at all."""
    config, tensors = _read_object(folder / "config.json"), len(weight_shapes(folder))
    found = config if isinstance(config, dict) else {}
    most = max((value for key in LAYERS if isinstance(value := found.get(key), int)), default=1)
    return [] if tensors >= most else [f"the weights have {tensors} tensors, and config.json has {most} layers"]


def _shard_problems(file: Path, wanted: set[str]) -> Iterator[str]:
    if not file.exists():
        yield f"{file.name} is missing, which {INDEX} names"
    elif corruption := find_weight_corruption(file):
        yield corruption
    elif lost := sorted(wanted - read_header(file)[1].keys()):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        yield f"{file.name} lacks {lost[0]}{more}, which {INDEX} says it holds"


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the files that transformers would load."""
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("model*.safetensors"))
    return {name: tuple(about["shape"]) for file in files for name, about in read_header(file)[1].items()}


def _read_object(path: Path) -> dict[str, Any] | str:
    """The JSON object in a file, or why there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{path.name} is not JSON: {error}"
    return found if isinstance(found, dict) else f"{path.name} is not a JSON object"
