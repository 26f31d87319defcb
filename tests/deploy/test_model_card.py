"""The model card: the Hub reads its front matter, its program runs, and it lists what got worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from scripts.tiny_model import build
from src import NAME
from src.deploy import export, model_card
from src.eval.fingerprint import baseline_folder
from src.runs import Run
from src.schema import PublishConfig
from tests.deploy.cards import PROMOTED, answer_of, program
from tests.fixtures import ANSWER, EPOCHS, ROOT, World, evals, jsonl, read_jsonl

pytest_plugins = ["tests.fixtures"]


def card_of(run: Run, artifacts: Path | None = None, **settings: Any) -> str:
    cfg = PublishConfig(**settings)
    regressions = model_card.worst_regressions(run, cfg.artifacts_dir, cfg.gate.metric)
    return model_card.render_card(run, "it", PROMOTED, None, cfg.license, regressions)


def front_of(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n", 2)[1]))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Front matter


def test_the_front_matter_is_what_the_hub_reads(finished: World) -> None:
    run = finished.newest
    card = card_of(run)
    found = front_of(card)
    assert found["base_model"] == "tiny" and found["base_model_relation"] == "adapter"
    assert found["base_model_revision"] == run.manifest["base_model"]["revision"]
    assert (found["library_name"], found["pipeline_tag"]) == ("peft", "text-generation")
    assert (found["license"], found["license_name"]) == ("other", "unknown")
    assert "datasets" not in found and found["tags"] == ["assay", "lora"]
    read = ModelCard(card).data
    assert read.to_dict()["model-index"] == found["model-index"]  # round trip
    assert read.eval_results is not None
    name, results = model_index_to_eval_results(found["model-index"])
    assert name == "it"
    rows = json.loads((run.path / "comparison.json").read_text())["rows"]
    assert [(r.dataset_split, r.metric_type, r.metric_value) for r in results] == [
        (row["split"], row["metric"], row["tuned"]) for row in rows
    ]
    assert {r.dataset_revision for r in results} == set(
        json.loads((run.path / "metrics.json").read_text())["conditions"]["data"].values()
    )


def test_the_licence_is_the_one_named_or_that_of_the_base_model(copied: World, tmp_path: Path) -> None:
    run = copied.newest
    assert front_of(card_of(run, license="apache-2.0"))["license"] == "apache-2.0"
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n# a base\n")
    run.update(base_model=run.manifest["base_model"] | {"name": str(base)})
    found = front_of(card_of(run))
    assert found["license"] == "mit" and "license_name" not in found


def test_datasets_and_base_models_of_the_hub_have_their_hub_names(copied: World) -> None:
    run = copied.newest
    hub = {"type": "hub", "repo": "someone/rows", "commit": "c0ffee", "endpoint": "https://hub.corp.example"}
    run.update(
        base_model={"name": "org/base", "revision": "abc123"},
        data=run.manifest["data"] | {"sources": [hub, {"type": "local"}]},
    )
    card = card_of(run)
    assert front_of(card)["datasets"] == ["someone/rows"]
    assert front_of(card)["base_model"] == "org/base"
    assert "Source: type hub, repo someone/rows, commit c0ffee." in card and "corp.example" not in card
    assert 'base = "org/base"\n' in program(card) and 'from_pretrained(base, revision="abc123")' in program(card)


# Sections


def test_the_body_describes_base_data_and_settings(finished: World) -> None:
    run = finished.newest
    body = card_of(run).split("---\n", 2)[2]
    assert body.startswith("\n# it\n") and f"Fine-tuned with {NAME} " in body and run.id in body
    assert "from `tiny` (a local folder, not the Hub repository of this name)" in body
    assert "Verdict: promoted: rougeL on test is better." in body and "against the gate" not in body
    assert "| test | exact_match | 0-1 | 0 | 1 | +1 |" in body
    assert f"`{run.manifest['data']['files'][0]['sha256']}`" in body
    assert str(run.manifest["code"]["commit"]) in body
    used = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert used["lr"] == 0.01 and used["epochs"] == EPOCHS


def test_the_card_contains_no_local_path(finished: World) -> None:
    card = card_of(finished.newest)
    for path in (finished.model.parent, finished.data, finished.splits, finished.output, finished.artifacts):
        assert str(path) not in card


def test_intervals_are_shown_if_the_comparison_has_them(copied: World) -> None:
    path = copied.newest.path / "comparison.json"
    rows = json.loads(path.read_text())["rows"]
    rows[0] |= {"low": 0.9, "high": 1.0, "examples": 24}
    edit(path, rows=rows, confidence=0.95)
    card = card_of(copied.newest)
    assert "| test | exact_match | 0-1 | 0 | 1 | +1 | +0.9 to +1 | 24 |" in card
    assert "at 95% confidence" in card


def test_regressions_are_listed_with_the_worst_examples(copied: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copied.newest
    settings = {"artifacts_dir": str(copied.artifacts)}
    assert "- No metric is worse than the base's on adversarial, test, dev." in card_of(run, **settings)
    assert "- No example scores lower than with the base." in card_of(run, **settings)
    comparison = json.loads((run.path / "comparison.json").read_text())
    for row in comparison["rows"]:
        if (row["split"], row["metric"]) in {("adversarial", "rougeL"), ("dev", "bleu")}:
            row |= {"base": 0.75, "tuned": 0.5, "difference": -0.25}
        if (row["split"], row["metric"]) == ("dev", "exact_match"):  # no direction is better
            row |= {"base": 0.75, "tuned": 0.5, "difference": -0.25, "better": "neither"}
        if (row["split"], row["metric"]) == ("test", "exact_match"):  # lower is better
            row |= {"base": 0.75, "tuned": 0.5, "difference": -0.25, "better": "lower"}
    edit(run.path / "comparison.json", rows=comparison["rows"])
    kept = baseline_folder(str(copied.artifacts), comparison["base_model"], comparison["conditions"])
    for path, scores in ((kept, (0.4, 0.9, 0.7, 1.0)), (evals(run), (0.4, 0.5, 0.6, 0.0))):
        rows = read_jsonl(path / "adversarial.predictions.jsonl")
        for row, score in zip(rows, scores, strict=False):
            row["scores"]["rougeL"] = score
        jsonl(path / "adversarial.predictions.jsonl", rows)
    rows = read_jsonl(evals(run) / "adversarial.predictions.jsonl")
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-value")
    rows[3] |= {"prediction": "a | s3cr3t-value " + "so long " * 50}
    jsonl(evals(run) / "adversarial.predictions.jsonl", rows)
    limits = card_of(run, **settings).split("## Limitations\n\n")[1].split("\n\n##")[0].splitlines()
    assert limits[:2] == [
        "- rougeL on adversarial is worse than the base's: 0.5, base 0.75.",
        "- bleu on dev is worse than the base's: 0.5, base 0.75.",
    ]
    assert [line.split(" on ")[0] for line in limits[2:]] == [
        "- rougeL went from 1 to 0", "- rougeL went from 0.9 to 0.5", "- rougeL went from 0.7 to 0.6",
    ]  # fmt: skip
    assert "expected “TOP(a)”, got “a \\| ${oc.env:MY_TOKEN} so long" in limits[2]
    assert limits[2].endswith("…”.") and len(limits[2]) < 300


# The program


def test_the_program_for_an_adapter_runs(copied: World) -> None:
    assert copied.call("publish") == 0
    folder = copied.artifacts / "models" / "tiny-lora" / "latest"
    card = (folder / "README.md").read_text()
    assert "pip install transformers torch peft" in card
    assert answer_of(card, folder, copied.model) == ANSWER


def test_the_program_for_merged_weights_runs(copied: World) -> None:
    assert copied.call("publish", "export=merged") == 0
    folder = copied.artifacts / "models" / "tiny-lora" / "latest"
    card = (folder / "README.md").read_text()
    assert front_of(card)["library_name"] == "transformers" and front_of(card)["base_model_relation"] == "finetune"
    assert "The adapter is merged into the base model's float32 weights." in card and "peft" not in program(card)
    assert answer_of(card, folder, copied.model) == ANSWER
    facts = json.loads((folder / "manifest.json").read_text())["export"]
    assert facts["form"] == "merged" and facts["mean_kl"] < 1e-6


WHAT = {"rate": "speed", "temp": "heat"}


def of_a_task(folder: Path, architecture: str, task: str, method: str) -> Run:
    """A run of a tiny model of another task, briefly trained and evaluated."""
    texts = (ROOT / "data" / "ingot.jsonl").read_text(encoding="utf-8").splitlines()
    model = build(folder / architecture, texts, architecture=architecture)
    keys = ("text", "label") if task == "classification" else ("prompt", "completion")

    def rows(*things: str) -> list[dict[str, str]]:
        return [dict(zip(keys, (f"Top of {t} {w}?", WHAT[w]), strict=True)) for t in things for w in WHAT]

    jsonl(folder / "data" / "rows.jsonl", rows("kiln", "mill", "tank", "feed"))
    jsonl(folder / "eval" / "test.jsonl", rows("ore"))
    jsonl(folder / "eval" / "dev.jsonl", rows("ash"))
    world = World(model, folder / "data", folder / "eval", folder / "outputs", folder / "artifacts")
    shape = "classification" if task == "classification" else "prompt_completion"
    words = (f"task={task}", f"data_format={shape}", f"method={method}", "lora_target_modules=null", "epochs=2")
    run = world.train(*words, "max_length=64", "on_contamination=keep")
    assert world.call("eval", "splits=[test]", "max_new_tokens=64") == 0
    result = json.loads((run.path / "metrics.json").read_text())
    rows_of = [{"split": "test", "metric": m, "scale": "0-1", "base": 0.0, "tuned": v, "difference": v}
               for m, v in result["eval"]["test"].items()]  # fmt: skip
    comparison = {"base_model": result["base_model"], "conditions": result["conditions"], "rows": rows_of}
    (run.path / "comparison.json").write_text(json.dumps(comparison))
    return run


@pytest.mark.parametrize(
    ("architecture", "task", "method"), [("t5", "seq2seq", "full"), ("bert", "classification", "lora")]
)
def test_the_programs_of_the_other_tasks_give_the_evaluated_answers(
    tmp_path: Path, architecture: str, task: str, method: str
) -> None:
    run = of_a_task(tmp_path, architecture, task, method)
    (tmp_path / "published").mkdir()
    export.write_model(run, PublishConfig(), tmp_path / "published")
    first = read_jsonl(evals(run) / "test.predictions.jsonl")[0]
    answer = answer_of(card_of(run), tmp_path / "published", tmp_path / architecture)
    assert answer.strip() == first["prediction"].strip()
    if method != "full":
        (tmp_path / "merged").mkdir()
        cfg = PublishConfig(export="merged", cuda_visible_devices="")
        facts = export.write_model(run, cfg, tmp_path / "merged")
        card = model_card.render_card(run, "it", PROMOTED, facts)
        assert facts["mean_kl"] < 1e-6 and answer_of(card, tmp_path / "merged", tmp_path / architecture) == answer
