"""What a configuration file may say about Hydra: nothing that names a Python class, a log handler or a variable.

Files come from other people, too: a preset, or the record of a fetched run. Typed words are not restricted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .errors import ConfigError

ALLOWED = ("hydra.mode", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name")
GROUPS = ("hydra/launcher", "hydra/sweeper")  # that a defaults list may override: only installed ones exist
HINT = f"a configuration file may set {', '.join(ALLOWED)}; type others on the command line, if you trust them"


def check(file: str, values: Mapping[str, Any], package: str = "", path: str = "") -> None:
    """Raises: ConfigError that lists what the content of a file may not say.

    Args:
        package: the key below which Hydra puts the content, from the comment `# @package ...`.
        path: of the file, below the folder of configuration files. Below hydra/ are Hydra's own groups.
    """
    found = list(_refused(values, package))
    if path.startswith("hydra/") or path == "hydra":
        found = [f"the folder hydra of configuration files ({path})"]
    if found:
        raise ConfigError(
            *(f"{file} sets {what}, which a configuration file may not" for what in found), hint=HINT
        )


def _refused(values: Mapping[str, Any], package: str) -> Iterator[str]:
    inside = package if package.split(".")[0] == "hydra" else ""
    hydra = values if inside else values.get("hydra")
    yield from (key for key in _keys(hydra, inside or "hydra") if key not in ALLOWED)
    for entry in values.get("defaults") or []:
        for name in entry if isinstance(entry, Mapping) else [entry]:
            words = str(name).removeprefix("override ").strip().lstrip("/")
            group, _, place = words.partition("@")
            if place.split(".")[0] == "hydra" or (group.split("/")[0] == "hydra" and group not in GROUPS):
                yield f"{name} in its defaults"


def _keys(values: Any, key: str) -> Iterator[str]:
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            if name != "defaults" or "." in key:
                yield from _keys(value, f"{key}.{name}")
    elif values is not None:
        yield key
