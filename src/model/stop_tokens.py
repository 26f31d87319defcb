"""Stop tokens: those that end an answer, as the chat template and the model's generation_config.json name them.

A base model may name its end of text only, while the chat template ends turns with another token. A model that is
trained with such a template writes that token and would go on, wherever only the first one stops it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..utils.files import write_text

GENERATION_CONFIG = "generation_config.json"


def configured(config: Any) -> list[int]:
    """The ids that a generation config names as `eos_token_id`: one id, a list of them, or null."""
    ids = config.get("eos_token_id") if isinstance(config, dict) else config.eos_token_id
    return [] if ids is None else [int(token) for token in (ids if isinstance(ids, list | tuple) else [ids])]


def save(model: Any, stop_token_ids: Iterable[int], folder: Path) -> None:
    """List `stop_token_ids` in the generation_config.json of the saved `model`, unless it names all of them.

    An adapter, whose folder has no such file, gets that of its base model with these ids.
    """
    path, config = folder / GENERATION_CONFIG, getattr(model, "generation_config", None)
    known = configured(config) if config is not None else []
    missing = [token for token in dict.fromkeys(stop_token_ids) if token not in known]
    if config is None or not missing:
        return
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else config.to_diff_dict()
    found.pop("_from_model_config", None)  # it would have transformers replace the ids by those of config.json
    write_text(path, json.dumps(found | {"eos_token_id": [*known, *missing]}, indent=2, sort_keys=True) + "\n")


def read(folder: Path) -> list[int]:
    """The ids that the generation_config.json in `folder` names; empty without that file."""
    path = folder / GENERATION_CONFIG
    return configured(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
