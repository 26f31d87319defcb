"""The form in which a model is published: the table FORMS. Each writes the model's files into a folder.

Nothing heavy is imported before what can be refused has been.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from src.errors import ModelError
from src.model.methods import METHODS, mergeable
from src.runs import Run
from src.schema import PublishConfig

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def refuse(run: Run, cfg: PublishConfig) -> None:
    """Raises: ModelError if the run's model cannot be had in the form asked for. Imports nothing heavy."""
    method = run.manifest["method"]
    if cfg.export == "gguf":
        raise ModelError(
            "export=gguf is not written here: the conversion of an architecture to GGUF is a part of llama.cpp",
            hint="publish with export=merged, and run llama.cpp's convert_hf_to_gguf.py on the published folder",
        )
    if cfg.export == "adapter" and METHODS[method].config is None:
        raise ModelError(f"run {run.id} trained every weight: there is no adapter", hint="leave export out")
    if cfg.export in {"merged", "onnx"} and METHODS[method].unmergeable:
        raise ModelError(f"export={cfg.export}: {mergeable(method)[:-1]}", hint="set export=adapter")
    missing = [name for name in ONNX_PACKAGES if not find_spec(name)] if cfg.export == "onnx" else []
    if missing:
        raise ModelError(
            f"export=onnx needs {', '.join(missing)}, which is not installed",
            hint="pip install -r requirements-onnx.txt",
        )


def write(run: Run, cfg: PublishConfig, folder: Path) -> dict[str, Any]:
    """Write the model of the run, in the form that `cfg.export` names, into `folder`.

    Returns: facts about it, the key `form` among them: adapter, full, merged or onnx.
    Raises: ModelError if it cannot be had so, or answers otherwise than the run's model.
    """
    refuse(run, cfg)
    return FORMS[cfg.export or "adapter"](run, cfg, folder)


def _as_trained(run: Run, cfg: PublishConfig, folder: Path) -> dict[str, Any]:
    shutil.copytree(run.model, folder, dirs_exist_ok=True)
    (folder / "README.md").unlink(missing_ok=True)  # a stub that peft writes; the model card takes its place
    return {"form": "adapter" if (folder / "adapter_config.json").exists() else "full"}


def _merged(run: Run, cfg: PublishConfig, folder: Path) -> dict[str, Any]:
    if METHODS[run.manifest["method"]].config is None:  # full weights: nothing to merge
        return _as_trained(run, cfg, folder)
    from src.deploy import merge_adapter

    return merge_adapter.write(run, cfg, folder)


def _onnx(run: Run, cfg: PublishConfig, folder: Path) -> dict[str, Any]:
    """The merged weights as a graph, beside the tokenizer and the settings."""
    from src.deploy import onnx

    with TemporaryDirectory(dir=folder.parent, prefix=".onnx.") as name:
        source = Path(name)
        facts = _merged(run, cfg, source)
        for file in source.iterdir():
            if not any(file.match(pattern) for pattern in WEIGHTS):
                shutil.copy2(file, folder / file.name)
        exported = onnx.write(run, cfg.gate, source, folder)
    return exported | ({"merged": facts} if facts["form"] == "merged" else {})


FORMS: dict[str, Callable[[Run, PublishConfig, Path], dict[str, Any]]] = {
    "adapter": _as_trained,
    "merged": _merged,
    "onnx": _onnx,
}
