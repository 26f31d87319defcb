"""Data sources: each gives local files, and says exactly which version of them was read.

To add a source, enter a function in SOURCES; config.DataSource.type names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.config import DataArgs
from src.errors import DataError, NotYetError


@dataclass(frozen=True)
class Pinned:
    """Local files, and the version they were read at: what the manifest records."""

    files: list[Path]
    version: dict[str, Any] = field(default_factory=dict)


def local(args: DataArgs) -> Pinned:
    """Files under `dataset_path` that match `dataset_pattern`, in the order of their names.

    Raises: DataError if there are none.
    """
    folder = Path(args.dataset_path)
    if not folder.is_dir():
        raise DataError(f"dataset_path {folder} is not a folder", hint="set dataset_path to your data")
    try:
        files = sorted(p for p in folder.glob(args.dataset_pattern) if p.is_file())
    except (ValueError, NotImplementedError) as error:
        said = f"dataset_pattern {args.dataset_pattern} is not a pattern inside {folder}: {error}"
        raise DataError(said, hint="set dataset_pattern to one such as *.jsonl") from None
    if not files:
        there = sorted(p.name for p in folder.iterdir() if p.is_file())
        held = f"it holds {', '.join(there[:8])}{' ...' if len(there) > 8 else ''}" if there else "it is empty"
        raise DataError(f"no file in {folder} matches {args.dataset_pattern}: {held}", hint="set dataset_pattern")
    return Pinned(files, {"type": "local"})


def lakefs(args: DataArgs) -> Pinned:
    raise NotYetError(
        "data_source.type=lakefs is not available in this version",
        hint="export the files and use data_source.type=local",
    )


SOURCES: dict[str, Callable[[DataArgs], Pinned]] = {"local": local, "lakefs": lakefs}


def fetch(args: DataArgs) -> Pinned:
    return SOURCES[args.data_source.type](args)
