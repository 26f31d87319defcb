"""The configuration files: those in configs/ of the current folder come before the ones that Assay ships."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
SHIPPED = _PACKAGE.parent / "configs"


def folders() -> list[Path]:
    """The folders that are searched, file by file, the first one first.

    A job on a server runs from a snapshot of the code, which has the configurations of its push: only these count.
    """
    own = Path("configs").resolve()
    is_snapshot = (_PACKAGE / "code.json").is_file()
    return [SHIPPED] if is_snapshot or own == SHIPPED or not own.is_dir() else [own, SHIPPED]


def find(name: str, suffix: str = ".yaml") -> Path | None:
    """The file of a configuration such as `train` or `method/lora`; None if there is none."""
    return next((path for folder in folders() if (path := folder / f"{name}{suffix}").is_file()), None)


def not_a_file(folder: Path, name: str) -> str:
    """Why a file that is there is not read: it is a folder, or a link to nothing. Empty if it is not there."""
    path = folder / f"{name}.yaml"
    return f"{path} is no file" if os.path.lexists(path) and not path.is_file() else ""


def names(suffix: str = ".yaml") -> list[str]:
    """Every configuration, then every preset as `group/name`; `find` gives the file of each."""
    found = {path.relative_to(folder) for folder in folders() for path in folder.glob(f"*{suffix}")}
    presets = {path.relative_to(folder) for folder in folders() for path in folder.glob(f"*/*{suffix}")}
    return [path.with_suffix("").as_posix() for path in (*sorted(found), *sorted(presets))]


def presets(group: str, suffix: str = ".yaml") -> list[str]:
    """The names of the presets of a group."""
    return [name.partition("/")[2] for name in names(suffix) if name.startswith(f"{group}/")]
