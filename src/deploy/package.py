"""The folder that is published, wherever to: the model, its card, its papers, and the hash of every file.

The same run under the same settings gives the same bytes: a repeated command sees what is there already.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.deploy import export, model_card
from src.deploy.gate import Verdict
from src.deploy.secret_scan import scan
from src.errors import RunError
from src.model.profile import base_id, is_local
from src.runs import Run
from src.schema import PublishConfig
from src.utils.files import read_json, sha256, write_json, write_text

MANIFEST = "manifest.json"
PAPERS = (
    "config_used.yaml",
    "comparison.json",
    "metrics.json",
    "data_report.json",
    "aim_profile.json",
    "training_info.json",
)
# What the run's manifest says of this machine's processes, or of where the run was published before.
OUR_OWN = {"process", "attempts", "evaluation", "published"}


def assemble(
    run: Run, cfg: PublishConfig, verdict: Verdict, folder: Path, elsewhere: bool = False
) -> dict[str, str]:
    """Fill the empty `folder` with what is published of `run`.

    Args: elsewhere: it goes where paths of this machine lead nowhere, or to what is somebody else's.
    Returns: `{path below folder: sha256}` of every file, the manifest included.
    Raises: RunError if a file holds a credential; ModelError for a form that cannot be written.
    """
    name = name_of(run, cfg)
    exported = export.write(run, cfg, folder)
    if elsewhere and exported["form"] == "adapter" and is_local(run.manifest["base_model"]):
        _take_out_path(folder / "adapter_config.json", base_id(run.manifest["base_model"]))
    for paper in PAPERS:
        if (run.path / paper).exists():
            shutil.copy2(run.path / paper, folder / paper)
    write_text(folder / "README.md", model_card.model_card(run, name, verdict, exported, cfg))
    hashes = {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    facts: Mapping[str, Any] = {k: v for k, v in run.manifest.items() if k not in OUR_OWN}
    about = {
        "name": name,
        "promoted": verdict.promoted,
        "verdict": verdict.sentence,
        "forced": not verdict.promoted,
    }
    write_json(folder / MANIFEST, {**facts, "publication": about, "export": exported, "sha256": hashes})
    if found := scan(folder):
        raise RunError(
            *(f"not published: {problem}" for problem in found),
            hint="take it out of the run, or out of the data and train again; nothing was published",
        )
    return hashes | {MANIFEST: sha256(folder / MANIFEST)}


def _take_out_path(settings: Path, base: str) -> None:
    """Name a local base model by its folder alone: `./base`, which no library looks up on the Hub.

    There `models/base`, or a bare `base`, would be whatever the owner of that name puts there.
    """
    found = read_json(settings) | {"base_model_name_or_path": f"./{base}"}
    write_text(settings, json.dumps(found, indent=2, sort_keys=True))


def name_of(run: Run, cfg: PublishConfig) -> str:
    """`publish_name`, or `<base>-<method>` of the run's manifest."""
    manifest = run.manifest
    base = str(manifest["base_model"]["name"]).rstrip("/").rsplit("/", 1)[-1]
    return cfg.publish_name or f"{base}-{manifest['method']}"
