"""Which layer of the configuration wins: what is typed, presets of every group too, wins over every experiment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

EXPERIMENT = "experiment"
# Later groups win: method=dora over the method that hardware=gpu_24gb suggests.
GROUPS = ("model", "data", "hardware", "method", "parallel", "launch", "search", EXPERIMENT)
# Settings that decide in place of another, with their defaults. A layer that sets the other one alone, such as
# epochs=2, resets them: `max_steps: 10` of a layer below would silently overrule it.
DECIDED_BY: dict[str, dict[str, Any]] = {
    "epochs": {"max_steps": None},
    "eval_epochs": {"eval_steps": None},
    "dataset_path": {"datasets": [], "trainDataConfig": None},
    "datasets": {"trainDataConfig": None},
    "trainDataConfig": {"datasets": []},
}


def keys_of(overrides: Iterable[str]) -> set[str]:
    """The settings and groups that these words `key=value` set."""
    return {word.lstrip("+").partition("=")[0] for word in overrides if not word.startswith("~")}


def ordered_groups(overrides: Iterable[str]) -> list[str]:
    """The groups, the winning one last: those that are typed come after the experiment."""
    typed = keys_of(overrides) - {EXPERIMENT}
    return sorted(GROUPS, key=lambda group: group in typed)


def without_typed_groups(settings: Mapping[str, Any], typed: Iterable[str]) -> dict[str, Any]:
    """The content of a preset without `override /method: full` of its defaults list, if method=lora is typed."""
    refused = {f"override {slash}{group}" for group in typed for slash in ("", "/")}
    kept = [
        entry
        for entry in settings.get("defaults") or []
        if not (isinstance(entry, Mapping) and refused & {str(key) for key in entry})
    ]
    return {**settings, "defaults": kept} if "defaults" in settings else dict(settings)


def decided_by(keys: Iterable[str], known: Iterable[str]) -> dict[str, Any]:
    """The settings that a layer with these `keys` resets, among the `known` ones; with their defaults."""
    given, known = set(keys), set(known)
    found = {k: v for key in DECIDED_BY.keys() & given for k, v in DECIDED_BY[key].items()}
    return {key: value for key, value in found.items() if key not in given and key in known}
