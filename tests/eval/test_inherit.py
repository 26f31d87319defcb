"""Settings that a stage takes from its run: above the defaults, below the stage's file and the command line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import cli_args, compose, config
from src.eval import evaluations
from src.eval.evaluations import Evaluation
from src.runs import Run
from tests.eval.evaluations import evaluated, right
from tests.fixtures import call

TRAINED = {"eval_path": "my/eval", "splits": ["test", "hard"], "metrics": ["rougeL"], "gate": {"min_delta": 0.1}}
BASE = {"name": "my/base", "revision": "sha256:1"}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_of(
    name: str, trained: dict[str, Any] = TRAINED, evaluation: dict[str, Any] | None = None, **facts: Any
) -> Run:
    """A finished run of this version with a model; `evaluation`: the settings of its newest evaluation."""
    run = Run(Path("outputs/runs") / name)
    (run.model).mkdir(parents=True)
    known = {"run": name, "stage": "train", "status": "finished", "started": name, "process": {}, "method": "lora"}
    known |= {"base_model": BASE, "task": "causal_lm", "evaluation_data": {"path": None, "files": {}}}
    (run.path / "manifest.json").write_text(json.dumps(known | facts))
    (run.path / "config_used.yaml").write_text(yaml.safe_dump(trained))
    if evaluation is not None:
        folder = run.path / "evals" / "0123456789ab"
        folder.mkdir(parents=True)
        (folder / "config_used.yaml").write_text(yaml.safe_dump(evaluation))
        evaluated(folder, {"test": right(0.5)})
        result = json.loads((folder / "metrics.json").read_text()) | {"evaluation": folder.name}
        (run.path / "metrics.json").write_text(json.dumps(result))
    return run


def composed(stage: str, *words: str) -> dict[str, Any]:
    """What the stage's function would be called with."""
    found = cli_args.parse(stage, list(words))
    overrides, problems = compose.prepare_overrides(found)
    compose.register_root(found)
    values, more = compose.compose_values(found, overrides)
    assert problems + more == []
    return asdict(config.load(stage, values))


@pytest.mark.parametrize("stage", ["eval", "eval-baseline", "validate"])
def test_without_a_run_the_defaults_count(stage: str) -> None:
    assert composed(stage) == asdict(
        config.load(stage, {"cuda_visible_devices": composed(stage)["cuda_visible_devices"]})
    )


def test_a_run_is_judged_as_it_was_trained() -> None:
    run_of("1")
    for stage in ("eval", "eval-baseline"):
        values = composed(stage)
        assert (values["eval_path"], values["splits"], values["metrics"]) == (
            "my/eval",
            ["test", "hard"],
            ["rougeL"],
        )
    for stage in ("eval", "eval-baseline", "compare", "publish", "publish-hf"):
        gate = composed(stage, *(["repo_id=me/it"] if stage == "publish-hf" else []))["gate"]
        assert (gate["min_delta"], gate["confidence"], gate["guards"]) == (0.1, 0.95, None)


def test_the_newest_evaluation_counts_more_than_training_and_the_command_line_most() -> None:
    used = {"eval_path": "my/eval", "splits": ["hard"], "max_new_tokens": 7, "seed": 3, "gate": {"split": "hard"}}
    run_of("1", evaluation=used)
    values = composed("eval")
    assert (values["splits"], values["max_new_tokens"]) == (["hard"], 7)
    assert (values["gate"]["split"], values["gate"]["min_delta"]) == ("hard", 0.1)
    assert values["seed"] == 42, "the seed is no setting of the judgement"
    assert composed("eval-baseline")["seed"] == 3, "but one of its conditions, which the base needs too"
    typed = composed("eval", "splits=[test]", "max_new_tokens=9", "gate.min_delta=0")
    assert (typed["splits"], typed["max_new_tokens"], typed["gate"]["min_delta"]) == (["test"], 9, 0)
    assert typed["gate"]["split"] == "hard"
    assert composed("eval", "splits=null")["splits"] is None
    run_of("2", evaluation=used | {"generation": {"do_sample": True}})
    assert composed("eval")["generation"] == {"do_sample": True}
    assert composed("eval", "generation={}")["generation"] == {}
    assert composed("eval", "generation={top_k: 3}")["generation"] == {"top_k": 3}
    assert composed("eval", "generation.top_k=3")["generation"] == {"do_sample": True, "top_k": 3}


def test_a_file_of_the_user_counts_more_than_the_run_where_it_says_something(tmp_path: Path) -> None:
    run_of("1")
    mine = tmp_path / "mine.yaml"
    mine.write_text("splits: null\nmetrics: [bleu]\ngate: {min_delta: 0.5, split: null}\n")
    values = composed("eval", "--config-name", str(mine))
    assert (values["splits"], values["metrics"], values["gate"]["min_delta"]) == (["test", "hard"], ["bleu"], 0.5)


def test_names_of_splits_are_not_taken_over_for_other_data() -> None:
    guards = [{"metric": None, "split": "hard", "max_drop": 0.1}]
    run_of("1", TRAINED | {"gate": {"min_delta": 0.1, "split": "hard", "guards": guards}})
    values = composed("eval", "eval_path=other")
    assert (values["eval_path"], values["splits"]) == ("other", None)
    assert values["gate"] | {"min_delta": 0.1, "split": None, "guards": None} == values["gate"]
    assert composed("eval", "eval_path=my/eval")["splits"] == ["test", "hard"]


def test_the_base_is_that_of_the_newest_run_or_of_the_one_that_is_named() -> None:
    run_of("1", task="seq2seq")
    run_of("2", TRAINED | {"eval_path": "others"}, base_model={"name": "org/hub", "revision": "abc123"})
    values = composed("eval-baseline")
    assert (values["model_name"], values["model_revision"], values["eval_path"]) == ("org/hub", "abc123", "others")
    values = composed("eval-baseline", "model_name=my/base")
    assert (values["model_name"], values["model_revision"], values["task"]) == ("my/base", None, "seq2seq")
    assert values["eval_path"] == "my/eval"
    assert composed("eval-baseline", "model_name=no/run")["eval_path"] is None


def test_the_run_that_is_named_counts() -> None:
    run_of("1")
    run_of("2", TRAINED | {"gate": {"min_delta": 0.7}})
    assert composed("publish", "1")["gate"]["min_delta"] == 0.1
    assert composed("compare", "2", "1")["gate"]["min_delta"] == 0.7
    assert composed("eval", "outputs/runs/1")["gate"]["min_delta"] == 0.1


def test_the_jobs_of_a_sweep_are_each_about_their_own_run(capsys: pytest.CaptureFixture[str]) -> None:
    run_of("1")
    run_of("2", TRAINED | {"eval_path": "others"})
    assert call("eval", "--multirun", "model_path=1,2", "launch=slurm") == 2
    assert "the jobs of one command must be about one run" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["manifest.json", "metrics.json"])
def test_a_run_that_cannot_be_read_is_left_to_the_stage(damage: str) -> None:
    run = run_of("1", evaluation={"splits": ["hard"]})
    (run.path / damage).write_text("{")
    composed("eval", "1")
    composed("eval-baseline")


def test_code_that_came_with_a_run_runs_only_if_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    inside = f"file:{Path('outputs/runs/other/m.py').absolute()}"
    run = run_of("1", {**TRAINED, "metrics": ["rougeL", inside]})
    assert call("eval", "1") == 2
    assert f"run 1 names the metric {inside}, whose code came with the run" in capsys.readouterr().err
    assert composed("eval", "1", f"metrics=[{inside}]")["metrics"] == [inside]
    for metric in ("evaluate:somebody/metric", "file:mine.py"):
        (run.path / "config_used.yaml").write_text(yaml.safe_dump({**TRAINED, "metrics": [metric]}))
        assert composed("eval", "1")["metrics"] == [metric]
    (run.path / "fetched.json").write_text("{}")
    assert composed("eval", "1")["metrics"] == ["file:mine.py"]
    (run.path / "config_used.yaml").write_text(yaml.safe_dump({**TRAINED, "metrics": ["evaluate:x/y"]}))
    assert call("publish", "1") == 2
    assert "run 1 names the metric evaluate:x/y, whose code came with the run" in capsys.readouterr().err
    (run.path / "config_used.yaml").write_text(yaml.safe_dump({**TRAINED, "trust_remote_code": True}))
    assert call("train", "resume=1") == 2
    assert "run 1 came from a server, and its settings have trust_remote_code=true" in capsys.readouterr().err
    (run.path / "config_used.yaml").write_text("a: &a [1]\nb: *a\n")
    assert call("train", "resume=1") == 2
    assert "config_used.yaml cannot be read as settings" in capsys.readouterr().err


def test_records_of_another_form_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("1", evaluation={"splits": ["test"]})
    metrics, good = run.path / "metrics.json", (run.path / "metrics.json").read_text()
    for text in ("null", "[]", '{"eval": []}', "5", '{"eval": {}, "evaluation": "../1"}'):
        metrics.write_text(text)
        assert call("compare", "1") == 2
        problem = "names no evaluation" if ".." in text else "is not a record of a run"
        assert f"{metrics} {problem}" in capsys.readouterr().err
    assert call("publish", "1") == 2
    metrics.write_text('{"eval": []}')
    assert call("runs") == call("report", "1") == 0
    metrics.write_text(good)
    newest = evaluations.newest(run)
    assert newest
    newest.predictions("test").write_text('{"prompt": "a", "pre')
    assert call("compare", "1", "1") == 2
    assert "test.predictions.jsonl is truncated or corrupt" in capsys.readouterr().err
    (run.path / "manifest.json").write_text("[]")
    assert call("runs") == 0


@pytest.mark.parametrize("text", [None, "", "{", "gate: 5", "gate: [1, 2]", "a: \x00", "a: &x []\nb: *x"])
def test_a_run_whose_settings_are_lost_is_not_judged_by_the_defaults(
    text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("1", evaluation={"gate": {"min_delta": 0.2}})
    newest = evaluations.newest(run)
    assert newest
    for path in (newest.folder / "config_used.yaml", run.path / "config_used.yaml"):
        path.unlink()
        if text is not None:
            path.write_text(text)
        for words in (["eval", "1"], ["eval-baseline"], ["compare", "1"], ["publish", "1"]):
            if text is not None or path.parent == run.path:
                assert call(*words) == 2
                told = f"{path} {'does not exist' if text is None else 'cannot be read as settings'}"
                assert told in capsys.readouterr().err
        path.write_text("gate: null")
    assert composed("publish", "1")["gate"]["min_delta"] == 0


def test_what_the_last_version_recorded_without_being_asked_does_not_count() -> None:
    gate = {"metric": None, "split": "test", "min_delta": 0.0, "confidence": 0.9}
    gate |= {"guards": [{"metric": None, "split": "adversarial", "max_drop": 0.02}]}
    defaults = {"eval_path": "./data/eval", "splits": ["test", "dev", "adversarial"], "gate": gate}
    run = run_of("1", {"eval_path": "./data/eval"})
    manifest = run.manifest
    del manifest["evaluation_data"]
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    evaluated(run.path, {"test": right(0.5)}, rows="evals")
    (run.path / "evals" / "config_used.yaml").write_text(yaml.safe_dump(defaults | {"max_new_tokens": 5}))
    values = composed("eval")
    assert (values["eval_path"], values["splits"], values["max_new_tokens"]) == (None, None, 5)
    assert (values["gate"]["split"], values["gate"]["guards"], values["gate"]["confidence"]) == (None, None, 0.9)


# The evaluations of a run


def test_an_evaluation_of_the_last_version_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    run = run_of("1")
    evaluated(run.path, {"test": right(0.5)}, rows="evals")
    (run.path / "evals" / "config_used.yaml").write_text("splits: [test]\n")
    (run.path / "comparison.json").write_text("{}")
    before = evaluations.newest(run)
    assert before == Evaluation(run.path / "evals", run.path) and before.is_former
    kept = before.predictions("test").read_bytes()
    evaluations.keep_former(run)
    (after,) = evaluations.all_of(run)
    assert not after.is_former and after.folder.parent == run.path / "evals"
    assert after.predictions("test").read_bytes() == kept
    assert {path.name for path in after.folder.iterdir()} == {
        "test.predictions.jsonl", "config_used.yaml", "comparison.json", "metrics.json",
    }  # fmt: skip
    assert [path for path in (run.path / "evals").iterdir() if path.is_file()] == []
    evaluations.keep_former(run)
    assert evaluations.all_of(run) == [after]
