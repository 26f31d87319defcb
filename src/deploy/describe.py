"""The model card: what was made, of what, how, and how much better than its base it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from src import NAME, VERSION
from src.deploy.gate import Verdict
from src.model.methods import mergeable
from src.model.tasks import TASKS
from src.runs import Run
from src.utils.files import read_json
from src.utils.secrets import redact


def model_card(run: Run, name: str, verdict: Verdict) -> str:
    """README.md of the published model: YAML front matter, then sections for people."""
    manifest = run.manifest
    comparison = read_json(run.path / "comparison.json")
    settings = yaml.safe_load((run.path / "config_used.yaml").read_text(encoding="utf-8"))
    base = manifest["base_model"]
    front = {
        "base_model": base["name"],
        "library_name": "transformers" if manifest["method"] == "full" else "peft",
        "tags": ["assay", manifest["method"]],
        "pipeline_tag": TASKS[manifest.get("task", "causal_lm")].hub,
    }
    verdict_line = verdict.sentence if verdict.promoted else f"**published against the gate**: {verdict.sentence}"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"Made with {NAME} {VERSION} from `{base['name']}` (revision `{base['revision']}`) by "
        f"{manifest['method']}; run `{run.id}`. {mergeable(manifest['method'])}",
        f"Verdict: {verdict_line}.",
        "## Against the base model\n\n" + _results(comparison),
        "## Data\n\n" + _data(manifest["data"]),
        "## Settings\n\n```yaml\n" + yaml.safe_dump(settings, sort_keys=False).rstrip() + "\n```",
    ]
    return str(redact("\n\n".join(parts) + "\n"))


def _results(comparison: Mapping[str, Any]) -> str:
    lines = ["| split | metric | scale | base | tuned | difference |", "|---|---|---|---:|---:|---:|"]
    lines += [
        f"| {r['split']} | {r['metric']} | {r['scale']} | {r['base']:.4g} | {r['tuned']:.4g} "
        f"| {r['difference']:+.4g} |"
        for r in comparison["rows"]
    ]
    implementations = [f"- {name}: {how}" for name, how in comparison["conditions"]["metrics"].items()]
    return "\n".join([*lines, "", *implementations])


def _data(data: Mapping[str, Any]) -> str:
    lines = ["| file | rows in | rows trained | sha256 |", "|---|---:|---:|---|"]
    lines += [
        f"| {f['file']} | {f['rows_in']} | {f['rows_trained']} | `{f['sha256'][:16]}` |" for f in data["files"]
    ]
    return "\n".join(lines)
