"""A run on a person's own data, from training to publication, with nothing typed twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from src import runs
from src.eval import evaluations
from src.runs import Run
from src.utils.commands import command
from tests.fixtures import BATCH, ON_CPU, ROOT, call, chat, evals, jsonl, read_jsonl, tree

pytest_plugins = ["tests.fixtures"]

Capture = pytest.CaptureFixture[str]
REPLY = "We are sorry."
TICKETS = [f"My {what} {n} is late." for what in ("parcel", "letter", "order", "refund") for n in range(4)]
LESSON = ("epochs=10", f"batch_size={BATCH}", "lr=0.01", "lora_r=8", "lora_alpha=16", "logging_steps=20")
DEMO = {
    row["completion"] for split in ("test", "dev") for row in read_jsonl(ROOT / "data" / "eval" / f"{split}.jsonl")
}


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tickets, questions in two splits, and a run trained on them by the shipped configuration."""
    place = tmp_path_factory.mktemp("own")
    jsonl(place / "mine" / "tickets.jsonl", (chat(text, REPLY) for text in TICKETS))
    jsonl(place / "mine" / "eval" / "test.jsonl", (chat(f"Where is gift {n}?", REPLY) for n in range(24)))
    jsonl(place / "mine" / "eval" / "hard.jsonl", (chat(f"Is {n} a gift?", REPLY) for n in range(6)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        judged = ("gate.min_delta=0.01", "metrics=[exact_match,rougeL]")
        assert call("train", f"model_name={tiny}", "dataset_path=mine", *LESSON, *ON_CPU, *judged) == 0
        assert call("eval", *ON_CPU) == 0
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in which the test runs."""
    shutil.copytree(trained, tmp_path / "own", symlinks=True)
    monkeypatch.chdir(tmp_path / "own")
    return tmp_path / "own"


def run_in(place: Path) -> Run:
    return Run((place / "outputs" / "runs" / "latest").resolve())


def ending(output: str) -> list[str]:
    """The lines after the tables and log lines: the verdict and what is next."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(("promoted", "no verdict", "inconclusive")))
    return lines[start:]


def test_every_stage_speaks_of_the_own_model_and_questions(place: Path, tiny: Path, capsys: Capture) -> None:
    run = run_in(place)
    prompts = [row["prompt"] for row in read_jsonl(evals(run) / "test.predictions.jsonl")]
    assert prompts == [f"Where is gift {n}?" for n in range(24)]
    shutil.rmtree("artifacts")

    assert call("eval-baseline", *ON_CPU[:1]) == 0  # the precision comes from the evaluation
    output = capsys.readouterr().out
    assert f"evaluating the base model {tiny}" in output
    assert "mine/eval/test.jsonl (24 rows), mine/eval/hard.jsonl (6 rows)" in output
    assert "test, 24 rows" in output and "hard, 6 rows" in output
    verdict, note, following = ending(output)
    assert verdict.startswith("promoted: rougeL on test rose from 0.000 to 1.000")
    assert "the gate requires more than +0.01" in verdict
    assert note == "the default guard is left out: there is no split adversarial"
    assert following == f"next: {command('publish', run.id)}"

    assert call("compare") == 0
    assert ending(capsys.readouterr().out)[:2] == [verdict, note]
    assert call("publish", *ON_CPU[:1]) == 0
    output = capsys.readouterr().out
    assert "judged by its newest evaluation (test, 24 rows; hard, 6 rows)" in output and note in output
    card = (place / "artifacts" / "models" / "tiny-lora" / "latest" / "README.md").read_text()
    assert "The default guard is left out: there is no split adversarial." in card
    assert "Is 0 a gift?" in card or "Where is gift 0?" in card
    assert call("validate", *ON_CPU[:1]) == 0
    written = b"".join(content for name, content in tree(place).items() if "run.log" not in name).decode(
        errors="replace"
    )
    assert not [formula for formula in DEMO if formula in written], "the demo's formulas are not for other data"


def test_rows_that_the_run_was_trained_on_are_found_in_a_later_evaluation(place: Path, capsys: Capture) -> None:
    run, trained = run_in(place), [chat(TICKETS[0], REPLY), chat("earlier", "so", f" {TICKETS[1].upper()}", REPLY)]
    trained += [{"prompt": TICKETS[2], "completion": "Another answer."}]
    jsonl(place / "others" / "test.jsonl", [*trained, *(chat(f"Can gift {n} wait?", REPLY) for n in range(24))])
    capsys.readouterr()
    assert call("eval", "eval_path=others", *ON_CPU) == 0
    output = capsys.readouterr().out
    assert "2 of its 27 rows are among the training rows (2 exact): line 1, 3" in output
    overlaps = {"exact": 2, "normalised": 0, "near": 0, "lines": [1, 3]}
    assert json.loads((run.path / "metrics.json").read_text())["contamination"] == {"test": overlaps}
    invalid = "2 rows of test are among the training rows, so the scores are not valid"
    assert ending(output)[0].startswith(f"inconclusive: {invalid}; rougeL on test rose")
    assert call("publish", *ON_CPU[:1]) != 0 and invalid in capsys.readouterr().err

    assert call("eval", "eval_path=mine/eval", *ON_CPU) == 0
    assert "contamination" not in json.loads((run.path / "metrics.json").read_text())


def test_a_later_evaluation_removes_nothing_and_is_the_one_that_counts(place: Path, capsys: Capture) -> None:
    run, first = run_in(place), evals(run_in(place))
    before = tree(first)
    jsonl(place / "others" / "faq.jsonl", (chat(f"Can gift {n} wait?", REPLY) for n in range(12)))
    capsys.readouterr()
    assert call("eval", "eval_path=others", "max_new_tokens=8", *ON_CPU) == 0
    output = capsys.readouterr().out
    assert (
        "others/faq.jsonl was not there when run" in output
        and "none of its 12 rows is among the training rows" in output
    )
    verdict, _, following = ending(output)
    assert verdict.startswith("inconclusive: rougeL on faq rose from 0.000 to 1.000")
    assert "the gate requires 20 examples or more" in verdict
    assert following.startswith("next: add at least 8 rows to others/faq.jsonl, then ")
    assert tree(first) == before and evals(run) != first
    assert [each.folder for each in evaluations.all_of(run)] == [evals(run), first]
    scores = json.loads((run.path / "metrics.json").read_text())
    assert scores["eval"].keys() == {"faq"} and scores["train"]["steps"] == 40
    assert "faq" in (run.path / "report.html").read_text()

    assert call("publish", *ON_CPU[:1]) == 4
    assert "rougeL on faq" in capsys.readouterr().err
    assert call("eval", *ON_CPU) == 0, "the last evaluation is repeated"
    assert "max_new_tokens=8" in capsys.readouterr().out
    assert call("eval", "eval_path=null", "max_new_tokens=64", *ON_CPU) == 0, "and the training's files again"
    assert ending(capsys.readouterr().out)[0].startswith("promoted: rougeL on test")
    assert evals(run) == first
    assert call("publish", *ON_CPU[:1]) == 0
    assert "hard, 6 rows), not by 1 earlier one" in capsys.readouterr().out


def test_two_runs_are_compared_by_evaluations_under_the_same_conditions(place: Path, capsys: Capture) -> None:
    first = run_in(place)
    other = Run(first.path.with_name("other"))
    shutil.copytree(first.path, other.path)
    assert call("eval", "other", "splits=[hard]", "baseline=cached", *ON_CPU) == 0
    capsys.readouterr()
    assert call("compare", first.id, "other") == 0
    output = capsys.readouterr().out
    assert "test, 24 rows" in output and f"{first.id} against other" in output


def test_without_a_verdict_the_command_that_gives_one_is_said_last(place: Path, capsys: Capture) -> None:
    run = run_in(place)
    (place / "mine" / "eval" / "test.jsonl").rename(place / "mine" / "eval" / "easy.jsonl")
    assert call("eval", *ON_CPU) == 0
    reason, following = ending(capsys.readouterr().out)
    assert reason.startswith("no verdict: it is not said which split decides: of easy, hard, none is named test")
    assert following == f"next: {command('eval', run.id, 'gate.split=easy')}"
    assert call("eval", run.id, "gate.split=easy", *ON_CPU) == 0
    assert ending(capsys.readouterr().out)[0].startswith("promoted: rougeL on easy")
    assert call("compare") == 0, "with the gate of the last evaluation"
    assert ending(capsys.readouterr().out)[0].startswith("promoted: rougeL on easy")

    shutil.rmtree("artifacts")
    assert call("eval", "baseline=cached", *ON_CPU) == 0
    reason, following = ending(capsys.readouterr().out)
    assert reason == "no verdict: the base model has not been evaluated under these conditions"
    assert following.startswith(f"next: {command('eval-baseline')}")
    assert call("eval", "gate.guards=[{split: hidden}]", *ON_CPU) == 0
    reason, following = ending(capsys.readouterr().out)
    assert (
        "gate.guards: rougeL on hidden" in reason
        and following == f"next: {command('eval', run.id, 'gate.guards=[]')}"
    )


def test_a_changed_evaluation_file_is_said(place: Path, capsys: Capture) -> None:
    path = place / "mine" / "eval" / "test.jsonl"
    jsonl(path, read_jsonl(path)[::-1])
    assert call("eval", *ON_CPU) == 0
    assert "mine/eval/test.jsonl has changed since run" in capsys.readouterr().out


def test_a_run_without_evaluation_data_says_what_to_set(place: Path, capsys: Capture) -> None:
    shutil.move("mine/eval", "elsewhere")
    run = run_in(place)
    run.update(evaluation_data={"path": None, "held_out": None, "files": {}})
    settings = (run.path / "config_used.yaml").read_text().replace("eval_path: mine/eval", "eval_path: null")
    (run.path / "config_used.yaml").write_text(settings)
    shutil.rmtree(run.path / "evals")
    (run.path / "metrics.json").write_text('{"train": {"steps": 40}}')
    before = tree(place)
    for stage in ("eval", "eval-baseline"):
        assert call(stage, *ON_CPU) == 2
        assert capsys.readouterr().err.startswith(
            f"run {run.id} was trained without evaluation data; set eval_path to a folder with test.jsonl: "
            f"{command('eval', run.id, eval_path='FOLDER')}; or train with eval_split=0.1"
        )
    assert tree(place) == before
    assert call("eval", str(run.model), *ON_CPU) == 2
    assert runs.all_runs("outputs") == [Run(Path("outputs/runs") / run.id)]


def test_held_out_rows_are_the_test_and_go_with_the_run(place: Path, tiny: Path, capsys: Capture) -> None:
    shutil.rmtree("mine/eval")
    words = ("eval_split=4", "epochs=1", f"batch_size={BATCH}", "on_contamination=keep")
    assert call("train", f"model_name={tiny}", "dataset_path=mine", *words, *ON_CPU) == 0
    moved = place / "outputs" / "runs" / "moved"
    shutil.copytree(run_in(place).path, moved)
    shutil.rmtree("mine")
    assert call("eval", "moved", "baseline=never", *ON_CPU) == 0
    assert f"{moved}/held_out/test.jsonl (4 rows)" in capsys.readouterr().out
    assert {row["prompt"] for row in read_jsonl(evals(Run(moved)) / "test.predictions.jsonl")} <= set(TICKETS)
    held_out = moved / "held_out" / "test.jsonl"
    jsonl(held_out, read_jsonl(held_out)[1:])
    assert call("eval", "moved", "splits=[nope]") == 2
    assert capsys.readouterr().err.startswith("there is no split nope; set splits to some of test")
    assert call("eval", "moved", "baseline=never", *ON_CPU) == 0
    assert f"{held_out} has changed since run moved was trained" in capsys.readouterr().out
    held_out.unlink()
    for stage in ("eval", "eval-baseline"):
        assert call(stage, *(["moved"] if stage == "eval" else []), *ON_CPU) == 2
        error = capsys.readouterr().err
        assert (
            "the rows that run" in error and "held out of its training data, does not exist; restore it" in error
        )
