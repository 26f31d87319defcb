"""Locate and identify base and tuned models without loading them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ModelError
from ..schema import DEMO_MODEL
from ..utils.logs import log
from ..utils.progress import BYTES, progress
from .folder_check import DAMAGED, check_folder

ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the demo's model is made of
LOCAL_PREFIXES = (".", "/", "~", "models/", "outputs/", "artifacts/")
IDENTITY_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "*.jinja")


class LoadArgs(NamedTuple):
    """Where a model is loaded, and whether code of its repository may run."""

    cuda_visible_devices: str = ""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Source:
    """A base model.

    name: as the user wrote it.
    folder: its local folder; None for a model on the Hub.
    revision: `sha256:...` of the content of a local folder; for the Hub the requested branch, tag or commit (None:
        the default branch), which loading resolves to a commit.
    """

    name: str
    folder: Path | None
    revision: str | None

    @property
    def location(self) -> str:
        """The argument of from_pretrained."""
        return str(self.folder or self.name)


def locate(name: str, revision: str | None = None, weights: bool = True) -> Source:
    """Find the model, and check a local folder, without importing torch.

    Args:
        weights: whether the folder must hold the weights.
    Raises: ModelError if a local folder is missing, incomplete or damaged, or has no safetensors.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder, weights)
        return Source(name, folder, content_hash(folder))
    if name.startswith(LOCAL_PREFIXES) or name.count("/") > 1:
        raise ModelError(f"model_name {name} does not exist", hint=_where_from(name))
    return Source(name, None, revision)


def _where_from(name: str) -> str:
    """How to get a model whose folder is missing. A checkout has the scripts that build some."""
    tiny = name.removeprefix("models/tiny-random-")
    if (name == DEMO_MODEL or tiny != name) and Path("scripts/build_demo_model.py").is_file():
        if name == DEMO_MODEL:
            return "make model builds it"
        return "make tiny-model builds it" if tiny == "llama" else f"make train model_name={name} builds it"
    return f"set model_name to a folder or a Hub id, such as model_name={ON_HUB}"


def is_quantised(source: Source) -> bool | None:
    """Whether the weights of a model folder are quantised; None for a model on the Hub."""
    if source.folder is None:
        return None
    settings = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    return bool(settings.get("quantization_config"))


def _check_folder(folder: Path, weights: bool = True) -> None:
    if any(_is_adapter(path) for path in (folder, folder / "model")):
        raise ModelError(
            f"{folder} is an adapter without its base model",
            hint=f"train init_from={folder} goes on from it; elsewhere, publish its run with export=merged, and "
            "name the published folder",
        )
    check_folder(folder, weights)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors"))


def content_hash(folder: Path) -> str:
    """`sha256:...` over the names and contents of the weights, the config and the tokenizer."""
    files = sorted({p for pattern in IDENTITY_FILES for p in folder.glob(pattern)})
    total = sum(p.stat().st_size for p in files)
    total_digest = hashlib.sha256()
    with progress("hashing the model", total, BYTES) as bar:
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                for block in iter(lambda: file.read(1 << 22), b""):
                    digest.update(block)
                    bar.add(len(block))
            total_digest.update(f"{path.name} {digest.hexdigest()}\n".encode())
    return f"sha256:{total_digest.hexdigest()}"


def adapter_base(folder: Path) -> tuple[str, str | None] | None:
    """`(base model name, revision)` of an adapter folder; None if it has full weights.

    Raises: ModelError if it is neither, or damaged.
    """
    if found := _adapter_config(folder):
        name, revision = found.get("base_model_name_or_path"), found.get("revision")
        if not isinstance(name, str) or not isinstance(revision, str | None):
            raise ModelError(f"{folder}: adapter_config.json names no base model", hint=DAMAGED)
        return name, revision
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder", hint="give a run directory or a model folder")
    _check_folder(folder)
    return None


def _adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder; empty if it has none. Raises: ModelError if it is damaged."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=DAMAGED) from error
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{path} is not a JSON object with settings", hint=DAMAGED)
    return found


def adapter_rows(adapter: Path) -> int:
    """The rows of the embedding that the adapter in a folder needs for the tokens it has trained; 0 if none."""
    indices = _adapter_config(adapter).get("trainable_token_indices") or []
    ids = [i for each in indices.values() for i in each] if isinstance(indices, dict) else indices
    return max(ids, default=-1) + 1


class TunedModel(NamedTuple):
    """A tuned model in a folder: an adapter for `base`, or full weights, whose `base` is the folder itself."""

    folder: Path
    base: Source
    is_adapter: bool


def locate_tuned(folder: Path, allow_base_mismatch: bool = False) -> TunedModel:
    """Find a tuned model and its base model, without importing torch.

    Raises: ModelError if either is missing or incomplete, or the base differs from the one of the adapter.
    """
    base = adapter_base(folder)
    if base is None:
        return TunedModel(folder, locate(str(folder)), False)
    name, revision = base
    try:
        source = locate(name, None if revision and revision.startswith("sha256:") else revision)
    except ModelError as error:
        raise ModelError(
            f"the base model of the adapter {folder} cannot be used: {error.problems[0]}",
            hint=f"restore {name}, which the adapter was trained on",
        ) from error
    if revision and source.folder and source.revision != revision:
        problem = f"the base model {name} is now {source.revision}; the adapter was trained on {revision}"
        if not allow_base_mismatch:
            raise ModelError(problem, hint="restore the base model, or set allow_base_mismatch=true")
        log.warning("%s", problem)
    return TunedModel(folder, source, True)
