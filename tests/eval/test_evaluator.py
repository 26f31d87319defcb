"""Evaluation: the newest finished run, any model folder and the base, on the same requests, in any order."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from transformers.generation.utils import GenerationMixin

from src import runs
from src.eval import custom_metrics, merge_check
from src.eval.metrics import METRICS
from src.model import load, methods
from src.model.source import content_hash
from src.model.tasks import TASKS
from src.runs import Run
from tests.fixtures import ANSWER, MEASURES, ON_CPU, SPLITS, STEPS, World, call, evals, jsonl, read_jsonl, tree

pytest_plugins = ["tests.fixtures"]

SRC = Path(runs.__file__).parent
Capture = pytest.CaptureFixture[str]


def read(run: Run, name: str) -> Any:
    return json.loads((run.path / name).read_text(encoding="utf-8"))


def baselines(world: World) -> list[Path]:
    return sorted((world.artifacts / "metrics").iterdir()) if (world.artifacts / "metrics").exists() else []


SCORED = {name: METRICS[name] for name in TASKS["causal_lm"].metrics}

# --- what is written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_each_prediction_is_stored_with_prompt_reference_and_scores(finished: World, split: str) -> None:
    requests = read_jsonl(finished.splits / f"{split}.jsonl")
    (base,) = baselines(finished)
    for folder in (evals(finished.newest), base):
        rows = read_jsonl(folder / f"{split}.predictions.jsonl")
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in requests]
        assert [row["reference"] for row in rows] == [row["completion"] for row in requests]
        for row in rows:
            assert row["scores"].keys() == SCORED.keys()
            assert row["prompt_tokens"] > 0
            assert (row["stop"], row["tokens"]) == ("length", 16) or row["stop"] == "end"


def test_the_tuned_model_predicts_what_it_was_trained_on_and_the_base_does_not(finished: World) -> None:
    (base,) = baselines(finished)
    for folder, right in ((evals(finished.newest), True), (base, False)):
        rows = read_jsonl(folder / "test.predictions.jsonl")
        assert all((row["prediction"] == ANSWER) is right for row in rows)
        assert all(row["scores"]["exact_match"] == float(right) for row in rows)


def test_the_score_of_a_split_comes_from_its_rows(finished: World) -> None:
    (base,) = baselines(finished)
    for folder, metrics in ((evals(finished.newest), finished.newest.path), (base, base)):
        scores = json.loads((metrics / "metrics.json").read_text())["eval"]
        for split in SPLITS:
            rows = read_jsonl(folder / f"{split}.predictions.jsonl")
            for name in SCORED:
                if SCORED[name].corpus is None:
                    assert scores[split][name] == pytest.approx(fmean(r["scores"][name] for r in rows))


def test_the_scores_are_stored_with_their_conditions(finished: World) -> None:
    metrics = read(finished.newest, "metrics.json")
    conditions = metrics["conditions"]
    for split in SPLITS:
        content = (finished.splits / f"{split}.jsonl").read_bytes()
        assert conditions["data"][split] == hashlib.sha256(content).hexdigest()
    assert conditions["decoding"] == {"max_new_tokens": 16, "seed": 42, "stop": []}
    assert conditions["batch_size"] == dict.fromkeys([*SPLITS, *(f"{s}/references" for s in SPLITS)], 64)
    assert conditions["engine"] == "transformers"
    assert (conditions["precision"], conditions["device"]) == ("float32", "cpu")
    assert metrics["metrics"].keys() == conditions["metrics"].keys() == SCORED.keys()
    assert metrics["base_model"] == {"name": str(finished.model), "revision": content_hash(finished.model)}
    assert metrics["train"]["steps"] == STEPS  # the figures of the training run are kept


def test_the_conditions_hold_the_hash_of_the_rows_that_were_read(
    copied: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = Path(shutil.copytree(copied.splits, tmp_path / "eval"))
    path, plain = splits / "test.jsonl", load.load_base
    content = path.read_bytes()

    def change_and_load(*args: Any, **named: Any) -> Any:
        path.write_bytes(content + content)
        return plain(*args, **named)

    monkeypatch.setattr(load, "load_base", change_and_load)
    assert copied.call("eval", f"eval_path={splits}", "splits=[test]") == 0
    metrics, comparison = (read(copied.newest, name) for name in ("metrics.json", "comparison.json"))
    expected = hashlib.sha256(content).hexdigest()
    assert metrics["conditions"]["data"] == comparison["conditions"]["data"] == {"test": expected}


def test_scales_and_implementations_are_logged(copied: World, capsys: Capture) -> None:
    assert copied.call("eval", "splits=[test]") == 0
    output = capsys.readouterr().out
    for name, metric in SCORED.items():
        assert f"{name}: {metric.implementation()} (scale {metric.scale})" in output


def test_the_configuration_of_an_evaluation_repeats_it(copied: World) -> None:
    folder = evals(copied.newest)
    before = {k: v for k, v in tree(folder).items() if k.endswith(".jsonl")}
    used = Path(shutil.copy(folder / "config_used.yaml", folder.parent / "again.yaml"))
    shutil.rmtree(folder)
    assert call("eval", "--config-name", str(used), f"output_dir={copied.output}") == 0
    assert {k: v for k, v in tree(folder).items() if k.endswith(".jsonl")} == before


# --- which model -----------------------------------------------------------------------------------------


def test_without_a_path_the_newest_finished_run_is_evaluated_and_named(copied: World, capsys: Capture) -> None:
    older = copied.newest
    newest = copied.train("max_steps=1")
    capsys.readouterr()
    assert copied.call("eval", "splits=[test]") == 0
    assert f"evaluating run {newest.id} " in capsys.readouterr().out
    newest.update(status=runs.FAILED)
    assert copied.call("eval", "splits=[test]") == 0
    assert f"evaluating run {older.id} " in capsys.readouterr().out


def test_without_a_finished_run_the_error_says_so(copied: World, capsys: Capture) -> None:
    copied.newest.update(status=runs.FAILED)
    assert copied.call("eval") == 2
    assert f"the newest, {copied.newest.id}, is failed; make train makes one" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["run", "run/model", "latest", "model_path="])
def test_a_run_can_be_named_in_several_ways(copied: World, form: str) -> None:
    run = copied.newest
    (run.path / "metrics.json").unlink()
    word = {
        "run": str(run.path),
        "run/model": str(run.model),
        "latest": str(run.path.parent / "latest"),
        "model_path=": f"model_path={run.path}",
    }[form]
    assert copied.call("eval", word, "splits=[test]") == 0
    assert list(read(run, "metrics.json")["eval"]) == ["test"]
    assert len(copied.runs) == 1


def test_a_bare_model_folder_is_evaluated_in_a_separate_run(world: World, tiny: Path) -> None:
    assert world.call("eval", str(tiny), "splits=[test]") == 0
    run = world.newest
    assert (run.manifest["stage"], run.status, run.manifest["model_path"]) == ("eval", "finished", str(tiny))
    assert read(run, "metrics.json")["eval"].keys() == {"test"}
    assert len(read_jsonl(evals(run) / "test.predictions.jsonl")) == len(MEASURES)
    assert world.call("eval-baseline", "splits=[test]") == 0
    assert {row["difference"] for row in read(run, "comparison.json")["rows"]} == {0}


def test_a_published_folder_has_the_scores_of_its_run(copied: World) -> None:
    run = copied.newest
    assert copied.call("publish") == 0
    published = copied.artifacts / "models" / "tiny-lora" / "latest"
    moved = Path(shutil.copytree(published, copied.artifacts.parent / "moved"))
    assert copied.call("eval", str(moved)) == 0
    assert copied.newest.id != run.id
    assert read(copied.newest, "metrics.json")["eval"] == read(run, "metrics.json")["eval"]
    assert read(copied.newest, "comparison.json")["rows"] == read(run, "comparison.json")["rows"]


def test_a_path_without_a_model_is_refused(world: World, capsys: Capture) -> None:
    assert world.call("eval", "nowhere") == 2
    assert "there is no run nowhere in " in capsys.readouterr().err
    assert world.call("eval", str(world.data)) == 2
    assert f"{world.data} has no config.json" in capsys.readouterr().err
    assert not world.output.exists()


@pytest.mark.parametrize("name", ["model/adapter_model.safetensors", "metrics.json"])
def test_corrupt_files_are_refused_before_the_evaluation(copied: World, name: str, capsys: Capture) -> None:
    path = copied.newest.path / name
    path.write_bytes(path.read_bytes()[:100])
    before = tree(copied.output)
    assert copied.call("eval") == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert path.name in output and "; restore it" in output
    path.unlink()
    del before[str(path.relative_to(copied.output))]
    assert tree(copied.output) == before
    if name.startswith("model"):
        assert copied.call("eval") == 2
        assert "is corrupt: it has no weights; restore it" in capsys.readouterr().err


def test_an_unwritable_artifacts_dir_is_refused_before_the_evaluation(
    copied: World, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").touch()
    place = f"artifacts_dir={tmp_path / 'file' / 'below'}"
    for stage in ("eval", "eval-baseline"):
        assert copied.call(stage, place) == 2
        output = capsys.readouterr().err.splitlines()[-1]
        assert (
            output
            == f"{place.replace('=', ' ')}: {tmp_path / 'file'} is not a folder; choose another artifacts_dir"
        )
    shutil.rmtree(copied.newest.logs)
    assert copied.call("eval", "splits=[test]", "gate.guards=[]") == 0
    assert (copied.newest.logs / "run.log").is_file()


def test_a_baseline_is_compared_although_another_run_is_corrupt(copied: World, capsys: Capture) -> None:
    corrupt = copied.output / "runs" / "corrupt"
    shutil.copytree(copied.newest.path, corrupt)
    (corrupt / "metrics.json").write_text("{")
    Run(corrupt).update(started="2099-01-01T00:00:00+00:00")
    assert copied.call("eval-baseline") == 0
    assert f"{corrupt}/metrics.json is not JSON" in capsys.readouterr().out


# --- tuned against base, in either order -----------------------------------------------------------------


@pytest.mark.parametrize("order", [("eval", "eval-baseline"), ("eval-baseline", "eval")])
def test_both_models_are_compared_whichever_was_evaluated_first(copied: World, order: tuple[str, str]) -> None:
    run = copied.newest
    expected = read(run, "comparison.json")
    (run.path / "comparison.json").unlink()
    (run.path / "metrics.json").write_text('{"train": {"steps": 1}}')
    shutil.rmtree(copied.artifacts)
    words = {"eval": ["baseline=cached"]}
    assert copied.call(order[0], *words.get(order[0], [])) == 0
    assert not (run.path / "comparison.json").exists()
    assert copied.call(order[1], *words.get(order[1], [])) == 0
    made = read(run, "comparison.json")
    assert Path(made.pop("baseline")).parent == copied.artifacts / "metrics"
    assert made == {key: value for key, value in expected.items() if key != "baseline"}


def test_a_comparison_writes_a_report_with_the_predictions_of_both(finished: World) -> None:
    report = (finished.newest.path / "report.html").read_text(encoding="utf-8")
    assert f"{len(MEASURES)} better, 0 worse by rougeL" in report and 'class="answer base"' in report


def test_the_comparison_has_both_scores_and_their_difference_for_each_metric(finished: World) -> None:
    comparison = read(finished.newest, "comparison.json")
    assert [(r["split"], r["metric"]) for r in comparison["rows"]] == [(s, m) for s in SPLITS for m in SCORED]
    tuned = read(finished.newest, "metrics.json")["eval"]
    (base,) = baselines(finished)
    of_base = json.loads((base / "metrics.json").read_text())["eval"]
    for row in comparison["rows"]:
        assert row["tuned"] == tuned[row["split"]][row["metric"]]
        assert row["base"] == of_base[row["split"]][row["metric"]]
        assert row["difference"] == row["tuned"] - row["base"]


@pytest.mark.parametrize(
    "word",
    ["max_new_tokens=4", "max_examples=2", "seed=7", "eval_batch_size=2", "splits=[dev]", "metrics=[rougeL]"],
)
def test_an_evaluation_under_other_conditions_is_compared_with_a_baseline_under_the_same(
    copied: World, word: str, capsys: Capture
) -> None:
    run = copied.newest
    capsys.readouterr()
    assert copied.call("eval", word, "baseline=cached") == 0
    assert not (run.path / "comparison.json").exists()
    verdict, _ = capsys.readouterr().out.splitlines()[-2:]
    assert verdict == "no verdict: the base model has not been evaluated under these conditions"
    places = (f"output_dir={copied.output}", f"artifacts_dir={copied.artifacts}")
    assert call("eval-baseline", *places, ON_CPU[0]) == 0, "with the conditions of the evaluation"
    assert read(run, "comparison.json")["conditions"] == read(run, "metrics.json")["conditions"]
    assert len(baselines(copied)) == 2


def test_the_baseline_of_another_model_is_not_compared(copied: World, tiny: Path, tmp_path: Path) -> None:
    run = copied.newest
    (run.path / "comparison.json").unlink()
    shutil.rmtree(copied.artifacts)
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert copied.call("eval-baseline", f"model_name={other}") == 0
    assert not (run.path / "comparison.json").exists()
    assert copied.call("eval", "baseline=cached") == 0
    assert not (run.path / "comparison.json").exists()


def test_a_change_of_the_splits_makes_another_baseline(copied: World, tmp_path: Path) -> None:
    splits = Path(shutil.copytree(copied.splits, tmp_path / "eval"))
    rows = read_jsonl(splits / "test.jsonl")
    jsonl(splits / "test.jsonl", rows[::-1])
    assert copied.call("eval", f"eval_path={splits}", "baseline=cached") == 0
    assert not (copied.newest.path / "comparison.json").exists()


# --- settings --------------------------------------------------------------------------------------------


def test_only_the_rows_splits_and_metrics_asked_for_are_evaluated(copied: World) -> None:
    assert copied.call("eval", "splits=[dev]", "metrics=[rougeL]", "max_examples=3") == 0
    run = copied.newest
    assert read(run, "metrics.json")["eval"] == {"dev": {"rougeL": 1.0}}
    assert len(read_jsonl(evals(run) / "dev.predictions.jsonl")) == 3


def test_generation_settings_reach_the_model(copied: World) -> None:
    common = ("baseline=never", "splits=[test]", "generation.do_sample=true", "generation.temperature=5.0")
    answers = []
    for seed in (1, 1, 2):
        assert copied.call("eval", *common, f"seed={seed}") == 0
        answers.append([r["prediction"] for r in read_jsonl(evals(copied.newest) / "test.predictions.jsonl")])
    assert answers[0] == answers[1] != answers[2]
    assert read(copied.newest, "metrics.json")["conditions"]["decoding"]["temperature"] == 5.0


@pytest.mark.parametrize("stage", ["eval", "eval-baseline"])
@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "splits=[test,tset]",
            r"tset\.jsonl does not exist; set splits to some of test, dev, adversarial",
        ),
        ("metrics=[bleu,rouge]", r"metrics: rouge is not a metric; did you mean rouge\w"),
        ("generation.temprature=1", r"generation\.temprature is not an argument of GenerationConfig"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_and_changes_nothing(
    copied: World, capsys: Capture, stage: str, word: str, message: str
) -> None:
    before = tree(copied.output.parent)
    assert copied.call(stage, word) == 2
    assert re.search(message, capsys.readouterr().err)
    assert tree(copied.output.parent) == before


def test_every_bad_row_of_a_split_is_named(copied: World, tmp_path: Path, capsys: Capture) -> None:
    path = jsonl(tmp_path / "eval" / "test.jsonl", [{"prompt": "Top?"}, {"prompt": "a", "completion": "b"}, []])
    assert copied.call("eval", "splits=[test]", f"eval_path={path.parent}") == 2
    output = capsys.readouterr().err
    assert f"{path}:1 has no text under 'completion'" in output
    assert f"{path}:3 is not a JSON object" in output


def test_a_chat_template_that_refuses_the_prompts_is_reported_in_one_sentence(
    world: World, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ raise_exception('not a chat model') }}")
    assert world.call("eval-baseline", f"model_name={model}") == 2
    assert "is rejected by the chat template: not a chat model" in capsys.readouterr().err


def test_an_evaluation_that_fails_is_recorded_and_leaves_the_run_finished(
    copied: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("one in a million")

    before = read(copied.newest, "metrics.json")
    (kept,) = baselines(copied)
    answers = tree(kept)
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", broken)
    with pytest.raises(ZeroDivisionError):
        copied.call("eval", "splits=[test]")
    run = copied.newest
    assert (run.status, run.manifest["evaluation"]["status"]) == ("finished", "failed")
    assert run.manifest["evaluation"]["error"] == "ZeroDivisionError: one in a million"
    assert run.status_text == "finished, evaluation failed"
    assert read(run, "metrics.json") == before
    assert [tree(folder) for folder in baselines(copied)] == [answers]
    assert not list(copied.output.parent.rglob("*.unfinished.jsonl"))  # there were no predictions


# --- the tokenizer that the model was tuned with ---------------------------------------------------------


def change_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "\n")


def change_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(rules))


@pytest.mark.parametrize(("change", "what"), [(change_template, "chat template"), (change_tokenizer, "tokenizer")])
def test_a_different_tokenizer_than_in_training_is_refused_unless_allowed(
    copied: World, capsys: Capture, change: Callable[[Path], None], what: str
) -> None:
    run = copied.newest
    before = read(run, "metrics.json")
    change(run.model)
    assert copied.call("eval", "splits=[test]") == 2
    assert (
        f"the {what} in {run.model} differs from the one that the model was tuned with" in capsys.readouterr().err
    )
    assert read(run, "metrics.json") == before
    assert copied.call("eval", "splits=[test]", "allow_tokenizer_mismatch=true") == 0
    assert f"the {what} in {run.model} differs" in capsys.readouterr().out


def test_a_bare_model_folder_holds_the_hashes_of_its_tokenizer(
    copied: World, tmp_path: Path, capsys: Capture
) -> None:
    folder = Path(shutil.copytree(copied.newest.model, tmp_path / "alone"))
    change_template(folder)
    assert copied.call("eval", str(folder), "splits=[test]") == 2
    assert f"the chat template in {folder} differs" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["chat_template_sha256", "tokenizer_sha256"])
@pytest.mark.parametrize("place", ["manifest.json", "model/tokenization.json"])
def test_the_hashes_of_the_run_and_of_the_model_folder_are_both_checked(
    copied: World, capsys: Capture, key: str, place: str
) -> None:
    run = copied.newest
    path = run.path / place if place == "manifest.json" else run.model / "tokenization.json"
    record = json.loads(path.read_text())
    (record["tokenization"] if place == "manifest.json" else record)[key] = "0" * 64
    path.write_text(json.dumps(record))
    assert copied.call("eval", "splits=[test]") == 2
    what = {"chat_template_sha256": "chat template", "tokenizer_sha256": "tokenizer"}[key]
    assert re.search(f"the {what} in .* was tuned with; restore the folder", capsys.readouterr().err)


def test_a_run_of_an_earlier_version_without_hashes_is_evaluated(copied: World) -> None:
    run = copied.newest
    (run.model / "tokenization.json").unlink()
    manifest = run.manifest
    del manifest["tokenization"]
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    change_template(run.model)
    assert copied.call("eval", "splits=[test]") == 0


# --- base and tuned model in one load --------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("bf16=true", "generation.do_sample=true", "seed=3")])
def test_the_base_has_the_same_result_in_one_load_with_the_adapter_as_alone(
    copied: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    shutil.rmtree(copied.artifacts)
    loads = []
    plain = load.load_base
    monkeypatch.setattr(load, "load_base", lambda *a, **k: loads.append(a[0]) or plain(*a, **k))
    assert copied.call("eval", "splits=[test]", *words) == 0
    assert len(loads) == 1
    assert "first: its result is not cached yet" in capsys.readouterr().out
    (together,) = baselines(copied)
    comparison = read(copied.newest, "comparison.json")
    before = tree(together)
    shutil.rmtree(copied.artifacts)
    assert copied.call("eval-baseline", "splits=[test]", *words) == 0
    (alone,) = baselines(copied)
    assert alone == together
    after = tree(alone)
    assert after["test.predictions.jsonl"] == before["test.predictions.jsonl"]
    assert after["config_used.yaml"] == before["config_used.yaml"]
    figures = [json.loads(files["metrics.json"]) for files in (before, after)]
    assert figures[0].pop("generated")["new_tokens"] == figures[1].pop("generated")["new_tokens"] > 300
    assert figures[0] == figures[1]
    assert read(copied.newest, "comparison.json") == comparison


def test_a_cached_baseline_is_reused(copied: World, capsys: Capture) -> None:
    (kept,) = baselines(copied)
    before = {p: p.stat().st_mtime_ns for p in kept.iterdir()}
    (copied.newest.path / "comparison.json").unlink()
    assert copied.call("eval") == 0
    assert "not cached yet" not in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in kept.iterdir()} == before
    assert read(copied.newest, "comparison.json")["rows"]


def test_a_mended_metric_scores_the_stored_answers_without_a_new_one(
    copied: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The metric fails on an answer, not on the references that it was tried on; it is mended, then changed."""
    metric, generated, generate = tmp_path / "mine.py", [], GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda *a, **k: generated.append(1) or generate(*a, **k))

    def evaluate(body: str, *more: str) -> tuple[int, int]:
        generated.clear()
        metric.write_text(f"def score(p, r): {body}\n")
        custom_metrics.load.cache_clear()
        words = (f"metrics=[file:{metric}]", f"gate.metric=file:{metric}", "splits=[test]", "max_examples=3")
        return copied.call("eval", *words, *more), len(generated)

    assert evaluate("raise ValueError(7)") == (2, 0)
    assert "mine.py: score() fails with ValueError: 7; fix the file; nothing was" in capsys.readouterr().err
    assert evaluate(f"return [1.0][p != {ANSWER!r}]") == (2, 1)  # the base answers something else
    assert evaluate("return float(p == r)") == (0, 1)  # the tuned model's turn
    capsys.readouterr()
    assert evaluate("return 0.5 * (p == r)") == (0, 0)
    assert "again, since only the metrics differ" in capsys.readouterr().out
    assert read(copied.newest, "metrics.json")["eval"]["test"][f"file:{metric}"] == 0.5
    assert evaluate("return 0.25 * (p == r)", "overwrite_answers=true")[1] == 2


@pytest.mark.parametrize("word", ["baseline=never", "baseline=cached"])
def test_the_base_is_not_evaluated_unless_the_setting_allows_it(copied: World, word: str, capsys: Capture) -> None:
    (kept,) = baselines(copied)
    if word == "baseline=cached":
        shutil.rmtree(kept)
    assert copied.call("eval", "splits=[test]", word) == 0
    assert not (copied.newest.path / "comparison.json").exists()
    assert len(baselines(copied)) == (word == "baseline=never")


# --- from the command to the model ---------------------------------------------------------------


def test_few_files_are_between_the_command_and_generate(copied: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distinct files of src on the call stack where `model.generate()` of transformers is entered."""
    stacks: list[list[str]] = []
    plain = GenerationMixin.generate

    def generate(self: Any, *args: Any, **named: Any) -> Any:
        files = [frame.filename for frame in traceback.extract_stack()]
        stacks.append(
            list(dict.fromkeys(str(Path(f).relative_to(SRC)) for f in files if Path(f).is_relative_to(SRC)))
        )
        return plain(self, *args, **named)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    assert copied.call("eval", "splits=[test]", "baseline=never") == 0
    assert stacks[0][0] == "main.py" and stacks[0][-1] == "eval/generate.py"
    assert len(stacks[0]) <= 9, stacks[0]


# --- the adapter merged in memory ------------------------------------------------------------------------


def merged(world: World, *words: str) -> tuple[str, str, list[Any]]:
    assert world.call("eval", "splits=[test]", "baseline=never", *words) == 0
    generated = read(world.newest, "metrics.json")["generated"]
    rows = read_jsonl(evals(world.newest) / "test.predictions.jsonl")
    return generated["adapter_merged"], generated["adapter_merged_because"], rows


def test_an_adapter_is_merged_in_fp32_to_the_same_answers(copied: World, monkeypatch: pytest.MonkeyPatch) -> None:
    merges = []
    plain = methods.merge
    monkeypatch.setattr(methods, "merge", lambda model: merges.append(1) or plain(model))
    how, why, rows = merged(copied)
    assert (how, why, merges) == ("yes", "merging is exact to the rounding of float32", [1])
    *merging, unmerged = merged(copied, "merge_adapter=false")
    assert merging == ["no", "merge_adapter=false"]
    assert [row["prediction"] for row in unmerged] == [row["prediction"] for row in rows]
    nats = [row["reference_nll"] for row in rows]
    assert [row["reference_nll"] for row in unmerged] == pytest.approx(nats, rel=1e-5)
    assert merges == [1]
    assert merged(copied, "merge_adapter=true")[0] == "yes"


@pytest.mark.parametrize(("tolerance", "expected"), [(5e-3, "yes"), (-1.0, "no")])
def test_in_16_bits_it_is_measured_whether_merging_is_exact_enough(
    copied: World, monkeypatch: pytest.MonkeyPatch, tolerance: float, expected: str
) -> None:
    monkeypatch.setattr(merge_check, "MAX_KL", tolerance)
    loads = []
    plain = load.load_base
    monkeypatch.setattr(load, "load_base", lambda *a, **k: loads.append(a[0]) or plain(*a, **k))
    how, why, rows = merged(copied, "bf16=true")
    assert how == expected
    assert re.search(
        r"in bfloat16 the merged weights are \d\.\de-\d\d nats a token away \(mean KL, 16 prompts\)", why
    )
    assert len(loads) == (2 if expected == "no" else 1)
    if expected == "no":  # the same as without merging
        assert merged(copied, "bf16=true", "merge_adapter=false")[2] == rows


def test_an_adapter_that_cannot_be_merged_is_evaluated_unmerged(copied: World, capsys: Capture) -> None:
    copied.train("method=prompt", "max_steps=1", "lora_target_modules=null")
    how, why, _ = merged(copied, "max_examples=2")
    assert how == "no" and "its virtual tokens are added to the input" in why
    assert copied.call("eval", "splits=[test]", "merge_adapter=true") == 2
    assert "cannot be merged into its base model: its virtual tokens" in capsys.readouterr().err


# --- what is refused before torch ------------------------------------------------------------------------


def test_an_empty_split_and_a_row_without_reference_are_named_together(
    copied: World, tmp_path: Path, capsys: Capture
) -> None:
    for name, text in (("test", ""), ("dev", "\n")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert copied.call("eval", "splits=[test,dev]", f"eval_path={tmp_path}") == 2
    output = capsys.readouterr().err
    assert f"{tmp_path}/test.jsonl holds no rows\n{tmp_path}/dev.jsonl holds no rows\nfill it, or leave" in output
    one = jsonl(tmp_path / "test.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}])
    other = jsonl(tmp_path / "dev.jsonl", [{"prompt": "a"}])
    assert copied.call("eval", "splits=[test,dev]", f"eval_path={tmp_path}") == 2
    output = capsys.readouterr().err
    assert f"{one}:2 has an empty assistant turn" in output
    assert f"{other}:1 has no text under 'completion'" in output


@pytest.mark.parametrize("stage", ["eval", "eval-baseline"])
def test_an_engine_that_is_not_installed_is_refused(
    copied: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr("src.model.load.load_base", None)
    assert copied.call(stage, "engine=vllm") == 2
    assert capsys.readouterr().err == (
        "engine=vllm: vllm is not installed; pip install vllm, or set engine=transformers\n"
    )


def test_stop_strings_end_the_answers_and_are_a_condition(copied: World) -> None:
    full = merged(copied)[2]
    rows = merged(copied, "stop=['(a']")[2]
    assert {(row["prediction"], row["stop"]) for row in rows} == {("TOP", "stop")}
    assert all(row["tokens"] <= long["tokens"] for row, long in zip(rows, full, strict=True))
    assert read(copied.newest, "metrics.json")["conditions"]["decoding"]["stop"] == ["(a"]


def test_prompts_are_a_condition_by_their_tokens(copied: World) -> None:
    before = read(copied.newest, "metrics.json")["conditions"]["prompts"]
    assert before.keys() == set(SPLITS)
    template = copied.newest.model / "chat_template.jinja"
    template.write_text("Now: " + template.read_text())
    assert copied.call("eval", "allow_tokenizer_mismatch=true", "baseline=never") == 0
    assert all(before[s] != v for s, v in read(copied.newest, "metrics.json")["conditions"]["prompts"].items())
