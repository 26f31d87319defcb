"""The model card: what the model is, how it was made, how it compares with its base, and where it is worse."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from .. import NAME, VERSION
from ..chat_templates import TEMPLATE_KWARGS
from ..eval import evaluations
from ..eval.fingerprint import baseline_folder
from ..eval.report.lineage import describe_parent
from ..eval.verdict import Verdict
from ..model.methods import mergeability
from ..model.profile import base_id, is_local
from ..model.tasks import TASKS
from ..runs import Run
from ..utils.files import read_json
from ..utils.secrets import redact
from ..utils.units import count
from .gate import overridden_failures
from .usage_snippets import usage

LIBRARIES = {"adapter": "peft", "onnx": "onnx"}
# Settings that name paths and hosts of this machine: private, and useless elsewhere.
LOCAL_SETTINGS = (
    "output_dir", "artifacts_dir", "cache_dir", "dataset_path", "eval_path", "trainDataConfig", "resume",
    "checkpoint_mirror", "checkpoint_mirror_endpoint", "mirror", "mirror_endpoint", "master_addr", "model_name",
    "data_source", "datasets",
)  # fmt: skip
SOURCE_KEYS = ("type", "repo", "bucket", "ref", "revision", "commit", "sha256")  # shown of a source: no address
MAX_TEXT = 160  # characters of an example
MAX_EXAMPLES = 3


class Regression(NamedTuple):
    """An example on which the tuned model scores lower than its base."""

    split: str
    metric: str
    prompt: str
    reference: str
    prediction: str
    base: float
    tuned: float


def render_card(
    run: Run,
    name: str,
    verdict: Verdict,
    export: Mapping[str, Any] | None = None,
    license: str | None = None,
    regressions: Sequence[Regression] = (),
) -> str:
    """README.md of the published model: YAML front matter for the Hub, then sections for people.

    Args:
        export: the facts that export.write_model returned; None: the model as it was trained.
        license: as the Hub writes it; None: that of the base model.
    """
    manifest = run.manifest
    comparison = read_json(run.path / "comparison.json")
    facts = export or {"form": "full" if manifest["method"] == "full" else "adapter"}
    prompt = _example_prompt(run, list(comparison["conditions"]["data"]))
    parts = [
        f"---\n{_front_matter(manifest, name, comparison, facts, license)}\n---",
        f"# {name}",
        _description(run, manifest, facts),
        _verdict(run, verdict),
        "## How to use\n\n" + usage(manifest, facts, prompt),
        "## Evaluation\n\n" + _scores(comparison),
        "## Limitations\n\n" + _limitations(comparison, regressions),
        "## Training data\n\n" + _data(manifest["data"]) + f"\n\nCode: commit `{manifest['code']['commit']}`.",
        "## Training settings\n\n```yaml\n" + _settings(run) + "\n```",
    ]
    return str(redact("\n\n".join(parts) + "\n"))


def worst_regressions(run: Run, artifacts_dir: str, metric: str | None) -> list[Regression]:
    """The examples of all splits that lost most against the base by `metric` (None: the metric of the task).

    Empty if no example got worse, or the predictions of the base are not stored.
    """
    comparison = read_json(run.path / "comparison.json")
    metric = metric or TASKS[run.manifest.get("task", "causal_lm")].gate_metric
    base_folder = baseline_folder(artifacts_dir, comparison["base_model"], comparison["conditions"])
    tuned_folder = evaluations.require(run).folder
    found = []
    for row in (row for row in comparison["rows"] if row["metric"] == metric):
        split, sign = row["split"], -1 if row.get("better") == "lower" else 1
        pairs = zip(_predictions(base_folder, split), _predictions(tuned_folder, split), strict=False)
        for base, tuned in pairs:
            before, after = (each.get("scores", {}).get(metric) for each in (base, tuned))
            if base["prompt"] == tuned["prompt"] and None not in (before, after) and sign * (before - after) > 0:
                texts = (tuned["prompt"], tuned["reference"], tuned["prediction"])
                found.append(Regression(split, metric, *texts, before, after))
    return sorted(found, key=lambda r: -abs(r.base - r.tuned))[:MAX_EXAMPLES]


def _predictions(folder: Path, split: str) -> list[dict[str, Any]]:
    """The predictions of an evaluation; empty if they are not stored."""
    path = folder / f"{split}.predictions.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


def _verdict(run: Run, verdict: Verdict) -> str:
    """The gate's sentence, and those of the checks that force=true overrode."""
    sentence = verdict.sentence if verdict.promoted else f"**published against the gate**: {verdict.sentence}"
    overridden = [f"- {sentence}" for sentence in overridden_failures(run)]
    heading = ["", "Checks that failed and were overridden:", ""] if overridden else []
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in verdict.facts.get("notes", []))
    return "\n".join([f"Verdict: {sentence}.{notes}", *heading, *overridden])


def _description(run: Run, manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    base, method = manifest["base_model"], manifest["method"]
    local = " (a local folder, not the Hub repository of this name)" if is_local(base) else ""
    text = (
        f"Fine-tuned with {NAME} {VERSION} from `{base_id(base)}`{local}, revision `{base['revision']}`, "
        f"by {method}; run `{run.id}`."
    )
    if parent := describe_parent(manifest):
        text += f" Training went on from {parent}."
    if variables := manifest.get("tokenization", {}).get(TEMPLATE_KWARGS):
        text += f" Its chat template is rendered with `{json.dumps(variables, ensure_ascii=False)}`."
    merge = facts.get("merged", facts)
    text += f" {_merge(merge)}" if merge["form"] == "merged" else f" {mergeability(method)}"
    if facts["form"] == "onnx":
        text += (
            f" It is an ONNX graph in {facts['precision']} without a KV cache; the logits of "
            f"onnxruntime differ from those of torch by at most {facts['largest_logit_difference']:.2g}."
        )
    return text


def _merge(merge: Mapping[str, Any]) -> str:
    """How the merged model compares with the adapter, and with the other merge that was tried."""
    others = [t for t in merge["tried"] if t["merged_into"] != merge["merged_into"]]
    return (
        f"The adapter is merged into the {merge['merged_into']}. On {count(merge['examples'], 'example')} of "
        f"{merge['split']}, {merge['metric']} is {merge['adapter_score']:.4g} with the adapter and "
        f"{merge['merged_score']:.4g} merged; the mean KL divergence between both is "
        f"{merge['mean_kl']:.2g} nats per token."
        + "".join(f" Merged into the {t['merged_into']}: {t['mean_kl']:.2g} nats per token." for t in others)
    )


# The front matter


def _front_matter(
    manifest: Mapping[str, Any], name: str, comparison: Mapping[str, Any], facts: Mapping[str, Any],
    license: str | None,
) -> str:  # fmt: skip
    task = TASKS[manifest.get("task", "causal_lm")].pipeline_tag
    datasets = _datasets(manifest["data"])
    front = {
        "base_model": base_id(manifest["base_model"]),
        "base_model_relation": "adapter" if facts["form"] == "adapter" else "finetune",
        "base_model_revision": manifest["base_model"]["revision"],
        "library_name": LIBRARIES.get(facts["form"], "transformers"),
        "pipeline_tag": task,
        **_license(manifest["base_model"], license),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["assay", manifest["method"]],
        "metrics": list(dict.fromkeys(row["metric"] for row in comparison["rows"])),
        "model-index": [{"name": name, "results": _index(comparison, task)}],
    }
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()


def _index(comparison: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """Scores as the Hub's model-index (the format of Papers with Code), one result per split."""
    hashes = comparison["conditions"]["data"]
    return [
        {
            "task": {"type": task},
            "dataset": {"type": "private", "name": split, "split": split, "revision": digest},
            "metrics": [
                {"type": row["metric"], "value": row["tuned"], "name": f"{row['metric']} ({row['scale']})"}
                for row in comparison["rows"]
                if row["split"] == split
            ],
        }
        for split, digest in hashes.items()
    ]


def _license(base: Mapping[str, Any], wanted: str | None) -> dict[str, str]:
    """The `wanted` licence, else that of the base model's card, else `other` with the name `unknown`."""
    found = wanted or _license_of(base)
    return {"license": found} if found else {"license": "other", "license_name": "unknown"}


def _license_of(base: Mapping[str, Any]) -> str | None:
    """The licence in the base model's card, in its folder or in the Hub's cache; None if there is none."""
    if is_local(base):
        card: Any = Path(base["name"]).expanduser() / "README.md"
    else:
        card = try_to_load_from_cache(base["name"], "README.md", revision=base["revision"])
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    text = Path(card).read_text(encoding="utf-8")
    if not text.startswith("---"):  # no front matter: the library would log a warning
        return None
    found = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return str(found["license"]) if found.get("license") else None


def _datasets(data: Mapping[str, Any]) -> list[str]:
    """The sources that are datasets on the Hub: other names mean nothing to other people."""
    return [s["repo"] for s in data.get("sources", []) if s.get("type") == "hub" and s.get("repo")]


# The sections


def _example_prompt(run: Run, splits: Sequence[str]) -> str:
    """A prompt of the evaluation."""
    folder = evaluations.require(run).folder
    rows = [row for split in splits for row in _predictions(folder, split)[:1]]
    prompt = str(rows[0]["prompt"]) if rows else ""
    return prompt if prompt and "```" not in prompt else "Hello!"


def _scores(comparison: Mapping[str, Any]) -> str:
    lines = [
        "| split | metric | scale | base | tuned | difference | interval | examples |",
        "|---|---|---|---:|---:|---:|---|---:|",
    ]
    for row in comparison["rows"]:
        low, high = row.get("low"), row.get("high")
        interval = "" if low is None or high is None else f"{low:+.4g} to {high:+.4g}"
        lines.append(
            f"| {row['split']} | {row['metric']} | {row['scale']} | {row['base']:.4g} | {row['tuned']:.4g} "
            f"| {row['difference']:+.4g} | {interval} | {row.get('examples', '')} |"
        )
    if confidence := comparison.get("confidence"):
        lines += ["", f"The interval is that of the difference, at {confidence:.0%} confidence."]
    implementations = [f"- {name}: {how}" for name, how in comparison["conditions"]["metrics"].items()]
    return "\n".join([*lines, "", *implementations])


def _limitations(comparison: Mapping[str, Any], regressions: Sequence[Regression]) -> str:
    """Metrics by which the model is worse than its base, adversarial splits first, and examples."""
    rows = sorted(comparison["rows"], key=lambda r: r["split"] != "adversarial")
    signs = {"lower": -1, "neither": 0}
    worse = [r for r in rows if signs.get(r.get("better"), 1) * r["difference"] < 0]
    lines = [
        f"- {r['metric']} on {r['split']} is worse than the base's: {r['tuned']:.4g}, base {r['base']:.4g}."
        for r in worse
    ]
    if not worse:
        splits = ", ".join(dict.fromkeys(r["split"] for r in rows))
        lines.append(f"- No metric is worse than the base's on {splits}.")
    lines += [
        f"- {r.metric} went from {r.base:.3g} to {r.tuned:.3g} on “{_short(r.prompt)}” ({r.split}): expected "
        f"“{_short(r.reference)}”, got “{_short(r.prediction)}”."
        for r in regressions
    ]
    if not regressions:
        lines.append("- No example scores lower than with the base.")
    return "\n".join(lines)


def _short(text: str) -> str:
    """One line, its Markdown escaped, of at most MAX_TEXT characters."""
    flat = " ".join(text.split())
    flat = flat if len(flat) <= MAX_TEXT else flat[: MAX_TEXT - 1] + "…"
    return "".join(f"\\{c}" if c in "`*_[]<>|\\" else c for c in flat)


def _data(data: Mapping[str, Any]) -> str:
    lines = ["| file | rows read | rows trained on | sha256 |", "|---|---:|---:|---|"]
    lines += [
        f"| {Path(f['file']).name} | {f['rows_in']} | {f['rows_trained']} | `{f['sha256']}` |"
        for f in data["files"]
    ]
    versions = [
        ", ".join(f"{key} {source[key]}" for key in SOURCE_KEYS if source.get(key))
        for source in data.get("sources", [])
    ]
    held_out = sum(f.get("rows_held_out", 0) for f in data["files"])
    held = [f"{held_out:,} of the rows were held out for evaluation."] if held_out else []
    return "\n".join([*lines, "", *held, *(f"Source: {v}." for v in versions)])


def _settings(run: Run) -> str:
    shown = {k: v for k, v in run.settings.items() if k not in LOCAL_SETTINGS and v not in (None, [], {})}
    if "/" in str(shown.get("chat_template")):  # a file of this machine; its text is in the folder
        shown["chat_template"] = Path(shown["chat_template"]).name
    return yaml.safe_dump(shown, sort_keys=False).rstrip()
