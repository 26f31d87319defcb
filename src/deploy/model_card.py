"""The model card: what was made, of what, how, how much better than its base it is, and where it is worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from src import NAME, VERSION
from src.deploy import findings
from src.deploy.regressions import Worse, predictions, worst
from src.deploy.usage_snippets import snippet
from src.model.methods import mergeable
from src.model.profile import base_id, is_local
from src.model.tasks import TASKS
from src.runs import Run
from src.schema import PublishConfig
from src.utils.files import read_json
from src.utils.secrets import redact

LIBRARIES = {"adapter": "peft", "onnx": "onnx"}
# Places of this machine, which are nobody else's business and mean nothing elsewhere.
PLACES = ("output_dir", "artifacts_dir", "cache_dir", "dataset_path", "eval_path", "trainDataConfig", "resume",
          "checkpoint_mirror", "checkpoint_mirror_endpoint", "master_addr", "model_name", "data_source",
          "datasets")  # fmt: skip
VERSION_KEYS = ("type", "repo", "bucket", "ref", "revision", "commit", "sha256")  # and no address
LONGEST = 160  # characters of an example that the card shows


class Verdict(Protocol):
    """What the gate said, as far as the card tells it."""

    @property
    def promoted(self) -> bool: ...
    @property
    def sentence(self) -> str: ...


def model_card(
    run: Run,
    name: str,
    verdict: Verdict,
    export: Mapping[str, Any] | None = None,
    cfg: PublishConfig | None = None,
) -> str:
    """README.md of the published model: YAML front matter, then sections for people.

    Args:
        export: what export.write said of the files that the card stands beside; None: as they were trained.
    """
    cfg = cfg or PublishConfig()
    manifest = run.manifest
    comparison = read_json(run.path / "comparison.json")
    facts = export or {"form": "full" if manifest["method"] == "full" else "adapter"}
    question = _example(run, list(comparison["conditions"]["data"]))
    parts = [
        f"---\n{_front_matter(manifest, name, comparison, facts, cfg)}\n---",
        f"# {name}",
        _what(run, manifest, facts),
        _verdict(run, verdict),
        "## How to load it\n\n" + snippet(manifest, facts, question),
        "## Against the base model\n\n" + _results(comparison),
        "## Limits\n\n" + _limits(comparison, worst(run, comparison, cfg)),
        "## Data\n\n" + _data(manifest["data"]) + f"\n\nMade by commit `{manifest['code']['commit']}`.",
        "## Settings\n\n```yaml\n" + _settings(run) + "\n```",
    ]
    return str(redact("\n\n".join(parts) + "\n"))


def _verdict(run: Run, verdict: Verdict) -> str:
    """The gate's sentence, and those of the checks that force=true overrode."""
    told = verdict.sentence if verdict.promoted else f"**published against the gate**: {verdict.sentence}"
    overridden = [f"- {sentence}" for sentence in findings.failed(run)]
    before = ["", "Checks that did not pass, and were overridden:", ""] if overridden else []
    return "\n".join([f"Verdict: {told}.", *before, *overridden])


def _what(run: Run, manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    base, method = manifest["base_model"], manifest["method"]
    where = " (a local folder, which is not on the Hub under this name)" if is_local(base) else ""
    told = (
        f"Made with {NAME} {VERSION} from `{base_id(base)}`{where}, revision `{base['revision']}`, by {method}; "
        f"run `{run.id}`."
    )
    about = facts.get("merged", facts)
    told += f" {_merge(about)}" if about["form"] == "merged" else f" {mergeable(method)}"
    if facts["form"] == "onnx":
        told += (
            f" It is an ONNX graph in {facts['precision']} without a cache of keys and values; the logits of "
            f"onnxruntime differ from those of torch by at most {facts['largest_logit_difference']:.2g}."
        )
    return told


def _merge(about: Mapping[str, Any]) -> str:
    """What became of the adapter, against it and against the other merge that was tried."""
    others = [t for t in about["tried"] if t["merged_into"] != about["merged_into"]]
    return (
        f"The adapter is merged into the {about['merged_into']}. Against the adapter, on {about['examples']} "
        f"examples of {about['split']}: {about['metric']} {about['adapter_score']:.4g} before and "
        f"{about['merged_score']:.4g} after, mean KL divergence {about['mean_kl']:.2g} nats a token."
        + "".join(f" Merged into the {t['merged_into']}: {t['mean_kl']:.2g} nats a token." for t in others)
    )


# The front matter


def _front_matter(
    manifest: Mapping[str, Any], name: str, comparison: Mapping[str, Any], facts: Mapping[str, Any],
    cfg: PublishConfig,
) -> str:  # fmt: skip
    task = TASKS[manifest.get("task", "causal_lm")].hub
    datasets = _datasets(manifest["data"])
    front = {
        "base_model": base_id(manifest["base_model"]),
        "base_model_relation": "adapter" if facts["form"] == "adapter" else "finetune",
        "base_model_revision": manifest["base_model"]["revision"],
        "library_name": LIBRARIES.get(facts["form"], "transformers"),
        "pipeline_tag": task,
        **_license(manifest["base_model"], cfg.license),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["assay", manifest["method"]],
        "metrics": list(dict.fromkeys(row["metric"] for row in comparison["rows"])),
        "model-index": [{"name": name, "results": _index(comparison, task)}],
    }
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()


def _index(comparison: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """Scores in the form of the Hub's model-index (Papers with Code), a result a split."""
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


def _license(base: Mapping[str, Any], asked: str | None) -> dict[str, str]:
    """What the settings say, else the card of the base model; what nobody says is unknown."""
    found = asked or _license_of(base)
    return {"license": found} if found else {"license": "other", "license_name": "unknown"}


def _license_of(base: Mapping[str, Any]) -> str | None:
    """The licence in the base model's card, in its folder or in the Hub's cache."""
    if is_local(base):
        card: Any = Path(base["name"]).expanduser() / "README.md"
    else:
        card = try_to_load_from_cache(base["name"], "README.md", revision=base["revision"])
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    text = Path(card).read_text(encoding="utf-8")
    if not text.startswith("---"):  # no front matter, of which the library would speak aloud
        return None
    found = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return str(found["license"]) if found.get("license") else None


def _datasets(data: Mapping[str, Any]) -> list[str]:
    """The Hub's data sets among the sources: a name is of use to others only there."""
    return [s["repo"] for s in data.get("sources", []) if s.get("type") == "hub" and s.get("repo")]


# The body


def _example(run: Run, splits: Sequence[str]) -> str:
    """A question that the model was asked."""
    rows = [row for split in splits for row in predictions(run.path / "evals", split)[:1]]
    asked = str(rows[0]["prompt"]) if rows else ""
    return asked if asked and "```" not in asked else "Hello!"


def _results(comparison: Mapping[str, Any]) -> str:
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
        lines += ["", f"Intervals are those of the difference, at {confidence:.0%} confidence."]
    implementations = [f"- {name}: {how}" for name, how in comparison["conditions"]["metrics"].items()]
    return "\n".join([*lines, "", *implementations])


def _limits(comparison: Mapping[str, Any], worse: Sequence[Worse]) -> str:
    """Where the model is worse than its base: metrics that fell, on adversarial rows first, and examples."""
    rows = sorted(comparison["rows"], key=lambda r: r["split"] != "adversarial")
    signs = {"lower": -1, "neither": 0}
    fell = [r for r in rows if signs.get(r.get("better"), 1) * r["difference"] < 0]
    lines = [
        f"- {r['metric']} on {r['split']} is worse than the base's: {r['base']:.4g} became {r['tuned']:.4g}."
        for r in fell
    ]
    if not fell:
        splits = ", ".join(dict.fromkeys(r["split"] for r in rows))
        lines.append(f"- No metric fell on {splits}.")
    lines += [
        f"- {w.metric} fell from {w.base:.3g} to {w.tuned:.3g} on “{_short(w.prompt)}” ({w.split}): expected "
        f"“{_short(w.reference)}”, answered “{_short(w.prediction)}”."
        for w in worse
    ]
    if not worse:
        lines.append("- No example got a lower score than from the base.")
    return "\n".join(lines)


def _short(text: str) -> str:
    """One line that Markdown takes as text."""
    flat = " ".join(text.split())
    flat = flat if len(flat) <= LONGEST else flat[: LONGEST - 1] + "…"
    return "".join(f"\\{c}" if c in "`*_[]<>|\\" else c for c in flat)


def _data(data: Mapping[str, Any]) -> str:
    lines = ["| file | rows in | rows trained | sha256 |", "|---|---:|---:|---|"]
    lines += [
        f"| {Path(f['file']).name} | {f['rows_in']} | {f['rows_trained']} | `{f['sha256']}` |"
        for f in data["files"]
    ]
    versions = [
        ", ".join(f"{key} {source[key]}" for key in VERSION_KEYS if source.get(key))
        for source in data.get("sources", [])
    ]
    return "\n".join([*lines, "", *(f"Source: {v}." for v in versions)])


def _settings(run: Run) -> str:
    kept = {key: value for key, value in run.settings.items() if key not in PLACES and value not in (None, [], {})}
    return yaml.safe_dump(kept, sort_keys=False).rstrip()
