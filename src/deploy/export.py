"""The published folder: the model in one of FORMS, its card, the records of its run, and the hash of every file.

The same run under the same settings gives the same bytes, so that a repeated publication finds nothing to send.
Heavy libraries are imported only after every refusal that needs none of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import ModelError, RunError
from ..eval.verdict import Verdict
from ..model import stop_tokens
from ..model.methods import METHODS, mergeability
from ..model.profile import base_id, is_local
from ..model.source import LoadArgs, adapter_rows
from ..model.tasks import max_positions
from ..runs import Run
from ..schema import PublishConfig
from ..utils.files import read_json, sha256, write_json, write_text
from ..utils.secrets import redact
from . import model_card
from .checks.files import MANIFEST, find_secrets

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
RECORDS = (
    "config_used.yaml",
    "comparison.json",
    "metrics.json",
    "data_report.json",
    "aim_profile.json",
    "training_info.json",
)
# Keys of the run's manifest about processes of this machine, or about earlier publications.
PRIVATE_KEYS = {"process", "attempts", "evaluation", "published"}


def assemble(
    run: Run, cfg: PublishConfig, verdict: Verdict, folder: Path, *, external: bool = False
) -> dict[str, str]:
    """Write everything that is published of `run` into the empty `folder`.

    Args:
        external: the folder leaves this machine, so a local path of the base model must not be in it.
    Returns: `{path below folder: sha256}` of every file, the manifest included.
    Raises: RunError if a file contains a credential; ModelError if the form cannot be written.
    """
    name = published_name(run, cfg.publish_name)
    exported = write_model(run, cfg, folder)
    if exported["form"] == "adapter" and is_local(run.manifest["base_model"]):
        _name_base(folder / "adapter_config.json", run.manifest["base_model"], external)
    for record in RECORDS:
        if (run.path / record).exists():  # an earlier version recorded URLs with their signatures
            text = (run.path / record).read_text(encoding="utf-8", errors="surrogatepass")
            write_text(folder / record, str(redact(text)))
    regressions = model_card.worst_regressions(run, cfg.artifacts_dir, cfg.gate.metric)
    write_text(
        folder / "README.md",
        model_card.render_card(run, name, verdict, exported | {"external": external}, cfg.license, regressions),
    )
    hashes = {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    facts: Mapping[str, Any] = {k: v for k, v in run.manifest.items() if k not in PRIVATE_KEYS}
    publication = {
        "name": name,
        "promoted": verdict.promoted,
        "verdict": verdict.sentence,
        "forced": not verdict.promoted,
    }
    write_json(folder / MANIFEST, {**facts, "publication": publication, "export": exported, "sha256": hashes})
    if found := find_secrets(folder):
        raise RunError(
            *(f"not published: {problem}" for problem in found),
            hint="remove the secret from the run, or from the data and train again; nothing was published",
        )
    return hashes | {MANIFEST: sha256(folder / MANIFEST)}


def published_name(run: Run, wanted: str | None) -> str:
    """The `wanted` name, or `<base>-<method>` of the run."""
    base = str(run.manifest["base_model"]["name"]).rstrip("/").rsplit("/", 1)[-1]
    return wanted or f"{base}-{run.manifest['method']}"


def _name_base(settings: Path, base: Mapping[str, Any], external: bool) -> None:
    """Name a base model from a local folder so that the adapter loads from any directory of this machine.

    On other machines it is `./base`, which no library looks up on the Hub: `models/base` or `base` would resolve
    to whatever the owner of that Hub name publishes.
    """
    folder = Path(base["name"]).expanduser().absolute()
    name = f"./{base_id(base)}" if external else str(folder)
    found = read_json(settings)
    if found["base_model_name_or_path"] != name and (external or folder.is_dir()):
        found |= {"base_model_name_or_path": name}
        write_text(settings, json.dumps(found, indent=2, sort_keys=True))


# The form of the model


def check_form(run: Run, form: str | None) -> None:
    """Raises: ModelError if the run's model cannot be exported in `form` (None: as it was trained)."""
    method = run.manifest["method"]
    if form == "gguf":
        raise ModelError(
            "export=gguf is not supported: only llama.cpp's own script converts every architecture to GGUF",
            hint="publish with export=merged, and run llama.cpp's convert_hf_to_gguf.py on the published folder",
        )
    if form == "adapter" and METHODS[method].config is None:
        raise ModelError(f"run {run.id} trained all weights, so it has no adapter", hint="leave export unset")
    if form in {"merged", "onnx"} and METHODS[method].unmergeable:
        raise ModelError(f"export={form}: {mergeability(method)[:-1]}", hint="set export=adapter")
    missing = [name for name in ONNX_PACKAGES if not find_spec(name)] if form == "onnx" else []
    if missing:
        raise ModelError(
            f"export=onnx needs {', '.join(missing)}, which is not installed",
            hint="pip install -r requirements-onnx.txt",
        )


def write_model(run: Run, cfg: PublishConfig, folder: Path) -> dict[str, Any]:
    """Write the run's model into `folder`, in the form `cfg.export`.

    Returns: facts for the manifest and the card; `form` is adapter, full, merged or onnx.
    Raises: ModelError if the form is not possible, or does not reproduce the outputs of the run's model.
    """
    check_form(run, cfg.export)
    facts = FORMS[cfg.export or "adapter"](run, cfg, folder)
    ids = stop_tokens.read(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    most = max_positions(config)
    return facts | ({"stop_token_ids": ids} if len(ids) > 1 else {}) | ({"max_tokens": most} if most else {})


def _copy(run: Run, cfg: PublishConfig, folder: Path) -> dict[str, Any]:
    """The adapter, or the full weights, as they were trained."""
    shutil.copytree(run.model, folder, dirs_exist_ok=True)
    (folder / "README.md").unlink(missing_ok=True)  # a stub that peft writes; the model card replaces it
    rows = adapter_rows(folder)
    form = "adapter" if (folder / "adapter_config.json").exists() else "full"
    return {"form": form} | ({"embedding_rows": rows} if rows else {})


def _merge(run: Run, cfg: PublishConfig, folder: Path) -> dict[str, Any]:
    if METHODS[run.manifest["method"]].config is None:  # full weights: nothing to merge
        return _copy(run, cfg, folder)
    from . import merged_export

    limits = merged_export.Limits(cfg.export_max_kl, cfg.export_max_drop)
    load = LoadArgs(cfg.cuda_visible_devices, cfg.trust_remote_code)
    return merged_export.write_merged(run, cfg.gate, load, limits, folder)


def _onnx(run: Run, cfg: PublishConfig, folder: Path) -> dict[str, Any]:
    """The merged weights as a graph, with the tokenizer and the configuration files."""
    from . import onnx

    with TemporaryDirectory(dir=folder.parent, prefix=".onnx.") as name:
        merged = Path(name)
        facts = _merge(run, cfg, merged)
        for file in merged.iterdir():
            if not any(file.match(pattern) for pattern in WEIGHTS):
                shutil.copy2(file, folder / file.name)
        exported = onnx.write_onnx(run, cfg.gate, merged, folder)
    return exported | ({"merged": facts} if facts["form"] == "merged" else {})


FORMS: dict[str, Callable[[Run, PublishConfig, Path], dict[str, Any]]] = {
    "adapter": _copy,
    "merged": _merge,
    "onnx": _onnx,
}
