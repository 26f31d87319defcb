"""What a run says of itself to others: aim_profile.json, training_info.json, and the losses behind them."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from src.model import profile
from src.model.methods import METHODS
from src.utils.event_files import Curves
from src.utils.files import hash_files
from tests.fixtures import STEPS, TRAINED_ON, World, curves

pytest_plugins = ["tests.fixtures"]

HUB = {"name": "Qwen/Qwen2.5-7B-Instruct", "revision": "a09a35458c702b33eeacc393d103063234e8bc28"}
SEVEN = 7_615_616_512


def manifest(method: str = "lora", dtype: str = "float16", base: int = 2 * SEVEN, **more: Any) -> dict[str, Any]:
    """Of a model of seven billion parameters, whose adapter has ten million in fp32."""
    adapters = 0 if METHODS[method].config is None else 10_000_000
    plan = {
        "parameters": SEVEN + adapters,
        "trainable": adapters or SEVEN,
        "weights": {"base": base, "adapters": 4 * adapters},
    }
    return {"method": method, "precision": {"value": dtype}, "base_model": HUB, "plan": plan} | more


def test_the_profile_has_the_keys_that_serving_platforms_read() -> None:
    assert profile.profile(manifest()) == {
        "model_id": "Qwen/Qwen2.5-7B-Instruct-finetuned",
        "base_model_id": "Qwen/Qwen2.5-7B-Instruct",
        "fine_tuning_method": "lora",
        "precision": "fp16",
        "memory_gb": 15.27,  # 2 bytes a parameter, and 4 for each of the adapter
        "recommended_partition_gb": 19.09,
        "parameters": "7.6B",
    }


@pytest.mark.parametrize(
    ("method", "dtype", "base", "precision", "memory"),
    [
        ("qlora", "bfloat16", 4_000_000_000, "nf4", 4.04),
        ("full", "bfloat16", 4 * SEVEN, "bf16", 15.23),  # trained in fp32, served in 16 bits
        ("full", "float32", 4 * SEVEN, "fp32", 30.46),
    ],
)
def test_memory_is_that_of_the_weights_as_they_are_served(
    method: str, dtype: str, base: int, precision: str, memory: float
) -> None:
    found = profile.profile(manifest(method, dtype, base))
    assert found is not None
    assert (found["precision"], found["memory_gb"]) == (precision, memory)
    assert found["recommended_partition_gb"] == pytest.approx(1.25 * memory, rel=1e-3)


def test_memory_does_not_come_from_the_name() -> None:
    named = manifest(base_model=HUB | {"name": "someone/tiny-70B"})
    found = profile.profile(named)
    assert found is not None and found["memory_gb"] == 15.27 and found["parameters"] == "7.6B"


@pytest.mark.parametrize("plan", [None, {"parameters": 7, "trainable": 1}])
def test_a_profile_needs_counted_weights(plan: Any) -> None:
    assert profile.profile(manifest() | {"plan": plan}) is None


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (7_000_000_000, "7B"),
        (70_553_706_496, "71B"),
        (134_515_008, "135M"),
        (1_500_000, "1.5M"),
        (94_464, "94K"),
        (7, "7"),
    ],
)
def test_parameter_counts_are_formatted(count: int, words: str) -> None:
    assert profile.format_count(count) == words


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"memory_gb": None}, "memory_gb=None should be a number above 0"),
        ({"memory_gb": float("nan")}, "memory_gb=nan should be a number above 0"),
        ({"memory_gb": True}, "memory_gb=True should be a number above 0"),
        ({"recommended_partition_gb": 15.27}, "recommended_partition_gb=15.27 should be 1.25 x memory_gb=15.27"),
        ({"precision": "int3"}, "precision='int3' should be one of nf4, bf16, fp16, fp32"),
        ({"fine_tuning_method": "magic"}, "fine_tuning_method='magic' should be one of lora"),
        ({"parameters": 7}, "parameters=7 should be a text"),
        ({"surprise": 1}, "surprise is not a key of the format"),
    ],
)
def test_an_invalid_profile_is_reported(change: dict[str, Any], told: str) -> None:
    good = profile.profile(manifest())
    assert good is not None and profile.problems(good) == []
    assert any(problem.startswith(told) for problem in profile.problems(good | change))


def test_every_missing_key_of_a_profile_is_named() -> None:
    assert profile.problems({}) == [f"{key} is missing" for key in profile.PROFILE_KEYS]
    assert profile.problems([]) == ["it is not a JSON object"]


# Of a real run


def test_a_training_leaves_both_files_and_the_hashes_of_its_model(finished: World) -> None:
    run = finished.newest
    served = json.loads((run.path / "aim_profile.json").read_text())
    assert profile.problems(served) == []
    assert served["model_id"] == "tiny-finetuned" and served["precision"] == "fp32"
    weights = sum(
        p.stat().st_size for p in (*finished.model.glob("*.safetensors"), *run.model.glob("*.safetensors"))
    )
    assert served["memory_gb"] * 1e9 == pytest.approx(weights, rel=0.05)
    assert run.manifest["model_files"] == hash_files(run.model)
    info = json.loads((run.path / "training_info.json").read_text())
    assert info["hyperparameters"]["learning_rate"] == 0.01 and info["hyperparameters"]["r"] == 8
    assert info["global_step"] == STEPS and info["dataset"]["num_rows"] == len(TRAINED_ON)
    assert info["train_loss"] == json.loads((run.path / "metrics.json").read_text())["train"]["train_loss"]
    assert info["first_loss"] > info["final_loss"] >= info["best_loss"] > 0
    assert len(info["log_history"]) == STEPS // 2  # logging_steps=2
    assert str(finished.data) not in json.dumps(info) and str(finished.model) not in json.dumps(info)


def test_losses_are_read_from_the_curves_where_no_checkpoint_can_be(copied: World) -> None:
    run = copied.newest
    logged = profile.loss_history(run)
    assert curves(run)["train/loss"] == [(step, pytest.approx(loss)) for step, loss in logged]
    for checkpoint in run.checkpoints.iterdir():
        (checkpoint / "trainer_state.json").write_text("{")
    assert profile.loss_history(run) == [(step, pytest.approx(loss)) for step, loss in logged]
    shutil.rmtree(run.checkpoints)
    assert profile.loss_history(run) == Curves.read(run.logs)["train/loss"] != []
