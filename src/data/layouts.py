"""Folders whose layout says which files are for training: saved by `datasets`, or laid out as on the Hub.

To add a layout, write a function `folder -> its data files by split, or None` and enter it in LAYOUTS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError
from ..utils.logs import log
from ..utils.units import count
from .readers import is_data_file

Splits = dict[str, list[Path]]
TRAIN = "train"
NO_SPLIT = "without a split"
SPLIT_OF = {  # a word of a file's name, or of its folder's -> the split
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "heldout"), "test"),
    **dict.fromkeys(("dev", "val", "valid", "validation"), "validation"),
}
FRONT_MATTER = re.compile(r"---\r?\n(.*?)\n---", re.DOTALL)


def training_files(folder: Path) -> list[Path] | None:
    """The training files of a folder, in order, by its layout; None if it has no known one.

    Raises: DataError if it has no training split, or several configurations.
    """
    splits = next((found for find in LAYOUTS if (found := find(folder)) is not None), None)
    if splits is None:
        return None
    if TRAIN not in splits:
        held = ", ".join(splits) or "no data file"
        raise DataError(f"{folder} has no split {TRAIN}: it has {held}", hint="set dataset_path to a file of it")
    others = [f"{split} ({count(len(files), 'file')})" for split, files in splits.items() if split != TRAIN]
    if others:
        log.info("%s: the split %s is trained on; not trained on: %s", folder, TRAIN, ", ".join(others))
    return splits[TRAIN]


def is_split(folder: Path) -> bool:
    """Whether the data files of a folder all belong to splits."""
    found = _listed(folder) or _named(folder)
    return found is not None and NO_SPLIT not in found


def split_of(file: Path, folder: Path) -> str:
    """The split that the name of a file in `folder`, or of a folder between them, says; empty if none does."""
    parts = [*file.relative_to(folder).parts[:-1], file.name.partition(".")[0]]
    words = [word for part in parts for word in re.split(r"[^a-z]+", part.lower())]
    return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), "")


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether a file in `folder`, or a folder between them, is hidden, as the copies `._name` of macOS are."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved a dataset, or its splits, in a folder."""
    return any(find(folder) is not None for find in (_saved_splits, _saved))


def _saved(folder: Path) -> Splits | None:
    files = _read_json(folder / "state.json").get("_data_files")
    return {TRAIN: [folder / str(file["filename"]) for file in files]} if isinstance(files, list) else None


def _saved_splits(folder: Path) -> Splits | None:
    names = _read_json(folder / "dataset_dict.json").get("splits")
    if not isinstance(names, list):
        return None
    return {name: (_saved(folder / name) or {TRAIN: []})[TRAIN] for name in map(str, names)}


def _listed(folder: Path) -> Splits | None:
    """The files that the README of a dataset on the Hub lists, of its only or default configuration."""
    configs = [
        c for c in _front_matter(folder).get("configs") or [] if isinstance(c, dict) and c.get("data_files")
    ]
    default = [c for c in configs if c.get("default") or c.get("config_name") == "default"]
    chosen = (default or configs)[:1]
    if not chosen:
        return None
    if not default and len(configs) > 1:
        names = ", ".join(str(config.get("config_name")) for config in configs)
        entries = [entry for config in configs for entry in _entries(config["data_files"])]
        patterns = " or ".join(f"dataset_pattern={pattern}" for split, pattern in entries if split == TRAIN)
        raise DataError(f"{folder / 'README.md'} lists the configurations {names}", hint=f"set {patterns}")
    found: Splits = {}
    for split, pattern in _entries(chosen[0]["data_files"]):
        matching = (file for file in folder.glob(pattern.lstrip("/")) if file.is_file() and is_data_file(file))
        files = sorted(file for file in matching if not is_hidden(file, folder))
        if files:
            found.setdefault(split, []).extend(files)
    return found or None


def _entries(data_files: Any) -> list[tuple[str, str]]:
    """`(split, pattern)` of `data_files`: patterns, `{split: patterns}`, or `[{split, path: patterns}]`."""
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    listed = data_files if isinstance(data_files, list) else [data_files]
    entries = [entry if isinstance(entry, Mapping) else {"path": entry} for entry in listed]
    found = []
    for entry in entries:
        paths = entry.get("path")
        patterns = paths if isinstance(paths, list) else [paths]
        found += [(str(entry.get("split", TRAIN)), str(pattern)) for pattern in patterns]
    return found


def _named(folder: Path) -> Splits | None:
    """The data files by the split that their names say, if there are any for training."""
    found: Splits = {}
    for file in sorted(folder.rglob("*")):
        if not is_hidden(file, folder) and is_data_file(file) and file.is_file():
            found.setdefault(split_of(file, folder) or NO_SPLIT, []).append(file)
    return found if TRAIN in found else None


LAYOUTS: list[Callable[[Path], Splits | None]] = [_saved_splits, _saved, _listed, _named]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _front_matter(folder: Path) -> dict[str, Any]:
    try:
        match = FRONT_MATTER.match((folder / "README.md").read_text(encoding="utf-8"))
        found = yaml.safe_load(match[1]) if match else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
