"""Check the files of a model folder by their headers: possible sizes, all shards, complete weights. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import MAX_LISTED, ModelError
from ..utils.weights import find_weight_corruption, read_header
from .config_values import config_problems, layer_problems

INDEX = "model.safetensors.index.json"
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
DAMAGED = "it is damaged: copy or download it again"


def check_folder(folder: Path, weights: bool = True) -> None:
    """Check config.json, and with `weights` the safetensors files that transformers would load.

    Raises: ModelError with every problem.
    """
    if special := _unreadable(folder):
        raise ModelError(*(f"{folder}: {problem}" for problem in special[:MAX_LISTED]), hint=DAMAGED)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json", hint="model_name must be a transformers model folder")
    read = [_read_object(folder / name) for name in JSON_FILES if (folder / name).exists()]
    problems = [*_config_problems(folder), *(found for found in read if isinstance(found, str))]
    if weights:
        _check_has_weights(folder)
        problems += _weight_problems(folder)
        problems += [] if problems else _content_problems(folder)
    if problems:
        listed = [f"{folder}: {problem}" for problem in problems[:MAX_LISTED]]
        raise ModelError(*listed, hint=DAMAGED)


def has_weights(folder: Path) -> bool:
    """Whether a model folder has safetensors files."""
    return bool(list(folder.glob("*.safetensors"))) or (folder / INDEX).exists()


def _check_has_weights(folder: Path) -> None:
    if not has_weights(folder):
        held = ", ".join(sorted(p.name for p in folder.glob("*.bin")))
        pickled = "pickled weights can run code and are not loaded; convert them to safetensors"
        raise ModelError(
            f"{folder} has no safetensors weights" + (f" (it has: {held})" if held else ""),
            hint=pickled if held else "download its model.safetensors, or the files of its index",
        )


def _unreadable(folder: Path) -> list[str]:
    """The entries that opening could wait for without end, such as a FIFO."""
    entries = sorted(path for path in folder.iterdir() if path.exists() and not path.is_dir())
    return [f"{path.name} is not a regular file" for path in entries if not path.is_file()]


def _config_problems(folder: Path) -> Iterator[str]:
    config = _read_object(folder / "config.json")
    yield from [config] if isinstance(config, str) else config_problems(config)


def _content_problems(folder: Path) -> Iterator[str]:
    """Problems of what the files hold; the files and config.json can be read."""
    names, config = weight_shapes(folder).keys(), _read_object(folder / "config.json")
    if not names:
        yield f"{', '.join(sorted(path.name for path in folder.glob('*.safetensors')))} holds no weights"
    elif not isinstance(config, str):
        yield from layer_problems(config, names)


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
    files = files or sorted(folder.glob("*.safetensors"))
    return {name: tuple(about["shape"]) for file in files for name, about in read_header(file)[1].items()}


def _read_object(path: Path) -> dict[str, Any] | str:
    """The JSON object in a file, or why there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{path.name} is not JSON: {error}"
    return found if isinstance(found, dict) else f"{path.name} is not a JSON object"
