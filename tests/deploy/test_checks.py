"""The gate's health checks: each sees the damage that it is there for, and only force publishes over it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from src.deploy import checks
from src.deploy.checks import run_checks
from src.deploy.checks.files import loss
from src.deploy.checks.model import says_nothing
from src.deploy.findings import Finding, Subject
from src.runs import Run
from src.schema import PublishConfig
from src.utils.files import hash_files
from tests.fixtures import World, jsonl, read_jsonl, tree

pytest_plugins = ["tests.fixtures"]

Said = pytest.CaptureFixture[str]
ON_CPU = PublishConfig(cuda_visible_devices="")


def found(run: Run) -> dict[str, Finding]:
    return {finding.name: finding for finding in run_checks(run, ON_CPU.gate)}


def asked_again(run: Run) -> Finding:
    (finding,) = checks.ask_again(run, ON_CPU)
    return finding


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_sound_run_passes_every_check(finished: World) -> None:
    run = finished.newest
    assert set(checks.CHECKS) == {*checks.GATE, *checks.GATE_LOADED, *checks.VALIDATE}
    assert {name: f.ok for name, f in found(run).items()} == dict.fromkeys(checks.GATE, True)
    assert asked_again(run) == ("reload", True, "the saved model gives 8 of 8 answers of test again")


# The loss


def losses(folder: Path, *values: Any) -> tuple[bool, str]:
    """What is said of these losses, logged at steps 10, 20, ..."""
    history = [{"step": 10 * (n + 1), "loss": value} for n, value in enumerate(values)]
    (folder / "training_info.json").write_text(json.dumps({"log_history": history}))
    return loss(Subject(folder, info=folder / "training_info.json"))


@pytest.mark.parametrize(
    ("values", "ok", "told"),
    [
        ((5.0, 4.0, 3.0), True, "the training loss went from 5 to 3 in 30 steps"),
        ((5.0, 0.1, 5.0), False, "went from 5 to 5 in 30 steps: it did not fall"),
        ((3.0, 4.0, 5.0), False, "it did not fall"),
        ((5.0, math.nan, 3.0), False, "the training loss is not finite at step 20"),
        ((5.0, 3.0, math.inf), False, "the training loss is not finite at step 30"),
        ((90.0, 50.0), False, "should end between 0 and 10"),
        ((1.0, -1.0), False, "should end between 0 and 10"),
        ((3.0,), True, "was logged once, which shows no fall"),
        ((), False, "no training loss was logged"),
        # one wild step at either end tells nothing
        ((5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 2, 99), True, "from 5 to 3"),
        ((1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 1), False, "from 3 to 4"),
    ],
)
def test_a_loss_is_finite_and_falls(tmp_path: Path, values: tuple[float, ...], ok: bool, told: str) -> None:
    passed, sentence = losses(tmp_path, *values)
    assert passed is ok and told in sentence


# The files


def test_a_changed_a_missing_and_a_poisoned_file_are_seen(copied: World) -> None:
    run = copied.newest
    (run.model / "chat_template.jinja").unlink()
    edit(run.model / "adapter_config.json", lambda c: c.update(lora_alpha=17))
    assert found(run)["model files"].sentence == (
        "the model is damaged: adapter_config.json is not what was written; chat_template.jinja is missing"
    )


def test_weights_that_are_no_numbers_are_seen_even_where_no_hash_tells(copied: World) -> None:
    run = copied.newest
    path = run.model / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, path)
    run.update(model_files={})
    assert not found(run)["model files"].ok
    assert "numbers that are not finite" in found(run)["model files"].sentence
    path.unlink()
    assert "there are no weights" in found(run)["model files"].sentence


@pytest.mark.parametrize("damage", ["optimizer.pt", "COMPLETE"])
def test_a_damaged_checkpoint_is_named(copied: World, damage: str) -> None:
    run = copied.newest
    newest = sorted(run.checkpoints.iterdir())[-1]
    if damage == "COMPLETE":
        (newest / damage).unlink()
    else:
        (newest / damage).write_bytes(b"torn")
    finding = found(run)["checkpoints"]
    assert not finding.ok and f"{newest.name}: {damage} is " in finding.sentence


def test_rows_of_the_evaluation_that_were_trained_on_are_a_finding(copied: World) -> None:
    run = copied.newest
    edit(run.path / "data_report.json", lambda r: r["contamination"].update(exact=2, near=1))
    assert found(run)["data"].ok and "(2 exact, 1 near) and were left out" in found(run)["data"].sentence
    settings = (run.path / "config_used.yaml").read_text()
    (run.path / "config_used.yaml").write_text(
        settings.replace("on_contamination: reject", "on_contamination: keep")
    )
    assert not found(run)["data"].ok
    assert "3 training rows occur in the evaluation files (2 exact, 1 near)" in found(run)["data"].sentence


# The answers


def test_a_saved_model_that_answers_otherwise_is_seen(copied: World) -> None:
    run = copied.newest
    path = run.model / "adapter_model.safetensors"
    save_file({name: 0 * weights for name, weights in load_file(path).items()}, path)  # the untouched base
    assert asked_again(run) == ("reload", False, "the saved model gives 0 of 8 answers of test again")


def test_one_other_answer_is_one_too_many_in_float32_and_not_in_16_bits(copied: World) -> None:
    run = copied.newest
    path = run.path / "evals" / "test.predictions.jsonl"
    rows = read_jsonl(path)
    longest = max(range(len(rows)), key=lambda i: rows[i]["prompt_tokens"])
    rows[longest]["prediction"] = "something else"
    jsonl(path, rows)
    assert asked_again(run) == ("reload", False, "the saved model gives 7 of 8 answers of test again")
    edit(run.path / "metrics.json", lambda m: m["conditions"].update(precision="bfloat16"))
    finding = asked_again(run)  # whole batches are asked: all rows are one
    assert finding.ok and f"of {len(rows)} answers" in finding.sentence


def test_other_questions_than_those_that_were_asked_are_not_asked(copied: World, tmp_path: Path) -> None:
    run = copied.newest
    edit(run.path / "metrics.json", lambda m: m["conditions"]["data"].update(test="0" * 64))
    finding = asked_again(run)
    assert not finding.ok and "is not the file that run" in finding.sentence


# The gate


def test_what_is_unsound_is_not_published_and_all_of_it_is_said(copied: World, capsys: Said) -> None:
    run = copied.newest
    (run.model / "chat_template.jinja").unlink()
    (next(run.checkpoints.iterdir()) / "COMPLETE").unlink()
    before = tree(copied.output.parent)
    assert copied.call("publish") == 3
    said = capsys.readouterr().err
    assert "not published: the model is damaged: chat_template.jinja is missing" in said
    assert "not published: checkpoints are damaged" in said and "force=true" in said
    assert "Traceback" not in said
    assert tree(copied.output.parent) == before
    assert copied.call("publish", "--force") == 0
    card = (copied.artifacts / "models" / "tiny-lora" / "latest" / "README.md").read_text()
    assert "overridden:\n\n- the model is damaged: chat_template.jinja is missing\n" in card


def test_a_published_model_was_asked_again(copied: World, capsys: Said) -> None:
    rows = read_jsonl(path := copied.newest.path / "evals" / "test.predictions.jsonl")
    jsonl(path, [row | {"prediction": "another"} for row in rows])
    assert copied.call("publish") == 3
    assert "not published: the saved model gives 0 of 8 answers of test again" in capsys.readouterr().err
    assert copied.call("publish", "gate.verify_examples=0") == 0


# validate


def validated(world: World, *words: str) -> tuple[int, dict[str, bool]]:
    code = world.call("validate", *words)
    report = json.loads((world.newest.path / "validation_report.json").read_text())
    assert report["passed"] is (code == 0)
    return code, {check["name"]: check["passed"] for check in report["checks"]}


def test_validate_writes_a_report_and_says_by_its_exit_code_whether_all_passed(
    copied: World, capsys: Said
) -> None:
    assert validated(copied) == (0, dict.fromkeys(checks.VALIDATE, True))
    assert "5 of 5 checks passed" in capsys.readouterr().out
    edit(copied.newest.path / "aim_profile.json", lambda p: p.pop("parameters"))
    path = copied.newest.model / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, passed = validated(copied, str(copied.newest.path))
    assert code == 3
    assert passed == dict.fromkeys(checks.VALIDATE, True) | dict.fromkeys(
        ("model files", "profile", "model output"), False
    )


def test_validate_takes_the_files_one_by_one(copied: World, tmp_path: Path, capsys: Said) -> None:
    run = copied.newest
    folder = tmp_path / "taken"
    model = run.model.rename(folder)  # away from its run
    info = (run.path / "training_info.json").rename(folder / "training_info.json")
    served = (run.path / "aim_profile.json").rename(tmp_path / "served.json")
    flags = ["--training-info", str(info), f"--model-path={model}", "--profile-path", str(served)]
    assert copied.call("validate", *flags) == 0
    report = json.loads((folder / "validation_report.json").read_text())
    assert report["run"] is None and [c["name"] for c in report["checks"]] == list(checks.VALIDATE)
    assert "no hashes of its files were recorded" in report["checks"][1]["message"]
    capsys.readouterr()
    assert copied.call("validate", "--training-info", "away.json", "--profile-path=gone.json") == 2
    said = capsys.readouterr().err
    assert "away.json does not exist" in said and "gone.json does not exist" in said
    info.write_text("[]")
    assert copied.call("validate", *flags) == 3


def test_a_published_model_is_validated_by_the_hashes_beside_it(copied: World) -> None:
    assert copied.call("publish") == 0
    folder = (copied.artifacts / "models" / "tiny-lora" / "latest").resolve()
    kept = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert kept.items() <= hash_files(folder).items()
    assert copied.call("validate", str(folder)) == 0
    edit(folder / "adapter_config.json", lambda c: c.update(lora_alpha=17))
    assert copied.call("validate", str(folder)) == 3


@pytest.mark.parametrize(
    ("text", "nothing"),
    [
        ("", True),
        (" \n", True),
        ("7", False),
        ("ha ha ha", False),  # short: it may be meant
        ("the mill the mill " * 20, True),
        ("a" * 200, True),
        ("RATE(SHARE(coke_mass, melt_yield, NIL), 16, 141, DROP) over KILN(temp_a, temp_b) until 12:30", False),
    ],
)
def test_answers_that_say_nothing(text: str, nothing: bool) -> None:
    assert says_nothing(text) is nothing
