"""The health checks of gate and validate: each finds its kind of damage, and only force overrides it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from src.deploy import gate
from src.deploy.checks.model import is_degenerate
from src.deploy.gate import CheckResult, CheckTarget, run_checks
from src.runs import Run
from src.utils.files import hash_files
from tests.fixtures import World, evals, jsonl, read_jsonl, tree

pytest_plugins = ["tests.fixtures"]

Capture = pytest.CaptureFixture[str]


def found(run: Run) -> dict[str, CheckResult]:
    return {result.name: result for result in run_checks(CheckTarget(run.model, run), gate.GATE)}


def reloaded(run: Run) -> CheckResult:
    (result,) = run_checks(CheckTarget(run.model, run), gate.GATE_WITH_MODEL)
    return result


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_healthy_run_passes_every_check(finished: World) -> None:
    run = finished.newest
    assert set(gate.CHECKS) == {*gate.GATE, *gate.GATE_WITH_MODEL, *gate.VALIDATE}
    assert {name: r.passed for name, r in found(run).items()} == dict.fromkeys(gate.GATE, True)
    assert reloaded(run) == ("reload", True, "the saved model reproduces 8 of 8 predictions on test")


# The loss


def losses(folder: Path, *values: Any) -> tuple[bool, str]:
    """The result for these losses, logged at steps 10, 20, ..."""
    history = [{"step": 10 * (n + 1), "loss": value} for n, value in enumerate(values)]
    (folder / "training_info.json").write_text(json.dumps({"log_history": history}))
    return gate.CHECKS["training loss"](CheckTarget(folder, training_info=folder / "training_info.json"))


@pytest.mark.parametrize(
    ("values", "passes", "expected"),
    [
        ((5.0, 4.0, 3.0), True, "the training loss went from 5 to 3 in 30 steps"),
        ((5.0, 0.1, 5.0), False, "went from 5 to 5 in 30 steps: it did not decrease"),
        ((3.0, 4.0, 5.0), False, "it did not decrease"),
        ((5.0, math.nan, 3.0), False, "the training loss is not finite at step 20"),
        ((5.0, 3.0, math.inf), False, "the training loss is not finite at step 30"),
        ((90.0, 50.0), False, "it should end between 0 and 10"),
        ((1.0, -1.0), False, "it should end between 0 and 10"),
        ((3.0,), True, "was logged only once"),
        ((), False, "no training loss was logged"),
        # one outlier at either end does not count
        ((5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 2, 99), True, "from 5 to 3"),
        ((1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 1), False, "from 3 to 4"),
    ],
)
def test_a_loss_is_finite_and_decreases(
    tmp_path: Path, values: tuple[float, ...], passes: bool, expected: str
) -> None:
    passed, sentence = losses(tmp_path, *values)
    assert passed is passes and expected in sentence


# The files


def test_a_changed_and_a_missing_file_are_found(copied: World) -> None:
    run = copied.newest
    (run.model / "chat_template.jinja").unlink()
    edit(run.model / "adapter_config.json", lambda c: c.update(lora_alpha=17))
    assert found(run)["model files"].sentence == (
        "the model is damaged: adapter_config.json differs from its recorded hash; chat_template.jinja is missing"
    )


def test_weights_that_are_not_finite_are_found_without_recorded_hashes(copied: World) -> None:
    run = copied.newest
    path = run.model / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, path)
    run.update(model_files={})
    assert not found(run)["model files"].passed
    assert "numbers that are not finite" in found(run)["model files"].sentence
    path.unlink()
    assert "it has no *.safetensors file" in found(run)["model files"].sentence


@pytest.mark.parametrize("damage", ["optimizer.pt", "COMPLETE"])
def test_a_damaged_checkpoint_is_named(copied: World, damage: str) -> None:
    run = copied.newest
    newest = sorted(run.checkpoints.iterdir())[-1]
    if damage == "COMPLETE":
        (newest / damage).unlink()
    else:
        (newest / damage).write_bytes(b"truncated")
    result = found(run)["checkpoints"]
    assert not result.passed and f"{newest.name}: {damage} " in result.sentence


def test_evaluation_rows_that_were_trained_on_fail_the_check(copied: World) -> None:
    run = copied.newest
    edit(run.path / "data_report.json", lambda r: r["contamination"].update(exact=2, near=1))
    assert (
        found(run)["data"].passed
        and "(2 exact, 1 near) and were excluded from training" in found(run)["data"].sentence
    )
    settings = (run.path / "config_used.yaml").read_text()
    (run.path / "config_used.yaml").write_text(
        settings.replace("on_contamination: reject", "on_contamination: keep")
    )
    assert not found(run)["data"].passed
    assert "3 training rows occur in the evaluation files (2 exact, 1 near)" in found(run)["data"].sentence


# Generations


def test_a_saved_model_with_other_predictions_is_found(copied: World) -> None:
    run = copied.newest
    path = run.model / "adapter_model.safetensors"
    save_file({name: 0 * weights for name, weights in load_file(path).items()}, path)  # the untouched base
    assert reloaded(run) == ("reload", False, "the saved model reproduces 0 of 8 predictions on test")


def test_one_differing_prediction_fails_in_float32_but_not_in_16_bits(copied: World) -> None:
    run = copied.newest
    path = evals(run) / "test.predictions.jsonl"
    rows = read_jsonl(path)
    longest = max(range(len(rows)), key=lambda i: rows[i]["prompt_tokens"])
    rows[longest]["prediction"] = "something else"
    jsonl(path, rows)
    assert reloaded(run) == ("reload", False, "the saved model reproduces 7 of 8 predictions on test")
    edit(run.path / "metrics.json", lambda m: m["conditions"].update(precision="bfloat16"))
    result = reloaded(run)  # full batches are evaluated: here one batch of all rows
    assert result.passed and f"of {len(rows)} predictions" in result.sentence


def test_a_split_that_has_changed_is_not_evaluated(copied: World, tmp_path: Path) -> None:
    run = copied.newest
    edit(run.path / "metrics.json", lambda m: m["conditions"]["data"].update(test="0" * 64))
    result = reloaded(run)
    assert not result.passed and "is not the file that run" in result.sentence


# The gate


def test_a_damaged_run_is_not_published_and_every_problem_is_reported(copied: World, capsys: Capture) -> None:
    run = copied.newest
    (run.model / "chat_template.jinja").unlink()
    (next(run.checkpoints.iterdir()) / "COMPLETE").unlink()
    before = tree(copied.output.parent)
    assert copied.call("publish") == 3
    error = capsys.readouterr().err
    assert "not published: the model is damaged: chat_template.jinja is missing" in error
    assert "not published: checkpoints are damaged" in error and "force=true" in error
    assert "Traceback" not in error
    assert tree(copied.output.parent) == before
    assert copied.call("publish", "--force") == 0
    card = (copied.artifacts / "models" / "tiny-lora" / "latest" / "README.md").read_text()
    assert "overridden:\n\n- the model is damaged: chat_template.jinja is missing\n" in card


def test_a_published_model_was_loaded_and_evaluated_again(copied: World, capsys: Capture) -> None:
    rows = read_jsonl(path := evals(copied.newest) / "test.predictions.jsonl")
    jsonl(path, [row | {"prediction": "another"} for row in rows])
    assert copied.call("publish") == 3
    assert "not published: the saved model reproduces 0 of 8 predictions on test" in capsys.readouterr().err
    assert copied.call("publish", "gate.verify_examples=0") == 0


# validate


def validated(world: World, *words: str) -> tuple[int, dict[str, bool]]:
    code = world.call("validate", *words)
    report = json.loads((world.newest.path / "validation_report.json").read_text())
    assert report["passed"] is (code == 0)
    return code, {check["name"]: check["passed"] for check in report["checks"]}


def test_validate_writes_a_report_and_its_exit_code_says_whether_all_passed(
    copied: World, capsys: Capture
) -> None:
    assert validated(copied) == (0, dict.fromkeys(gate.VALIDATE, True))
    assert "5 of 5 checks passed" in capsys.readouterr().out
    edit(copied.newest.path / "aim_profile.json", lambda p: p.pop("parameters"))
    path = copied.newest.model / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, passed = validated(copied, str(copied.newest.path))
    assert code == 3
    assert passed == dict.fromkeys(gate.VALIDATE, True) | dict.fromkeys(
        ("model files", "profile", "model output"), False
    )


def test_validate_takes_the_files_one_by_one(copied: World, tmp_path: Path, capsys: Capture) -> None:
    run = copied.newest
    folder = tmp_path / "moved"
    model = run.model.rename(folder)  # away from its run
    info = (run.path / "training_info.json").rename(folder / "training_info.json")
    served = (run.path / "aim_profile.json").rename(tmp_path / "served.json")
    flags = ["--training-info", str(info), f"--model-path={model}", "--profile-path", str(served)]
    assert copied.call("validate", *flags) == 0
    report = json.loads((folder / "validation_report.json").read_text())
    assert report["run"] is None and [c["name"] for c in report["checks"]] == list(gate.VALIDATE)
    assert "no file hashes were recorded" in report["checks"][1]["message"]
    capsys.readouterr()
    assert copied.call("validate", "--training-info", "away.json", "--profile-path=gone.json") == 2
    error = capsys.readouterr().err
    assert "away.json does not exist" in error and "gone.json does not exist" in error
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
    ("text", "degenerate"),
    [
        ("", True),
        (" \n", True),
        ("7", False),
        ("ha ha ha", False),  # short: it may be intended
        ("the mill the mill " * 20, True),
        ("a" * 200, True),
        ("RATE(SHARE(coke_mass, melt_yield, NIL), 16, 141, DROP) over KILN(temp_a, temp_b) until 12:30", False),
    ],
)
def test_empty_and_repetitive_texts_are_degenerate(text: str, degenerate: bool) -> None:
    assert is_degenerate(text) is degenerate
