"""Every argument of transformers.TrainingArguments takes effect, or is refused with a sentence."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from src import config
from src.errors import ConfigError
from src.schema import TrainConfig
from src.train import arguments, fit
from src.train.batch_sampler import Schedule
from src.train.fit import build_training_arguments
from src.train.losses import Objective
from tests.fixtures import World, curves

pytest_plugins = ["tests.fixtures"]


def problems(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        config.load("train", values, arguments.problems)
    return list(refused.value.problems)


# --- the table -------------------------------------------------------------------------------------------


def test_every_argument_of_the_trainer_is_owned_unused_or_passed_on() -> None:
    tables = (arguments.OWNED, arguments.UNUSED, arguments.PASSED_ON)
    listed = sorted(name for table in tables for name in table)
    assert listed == sorted(field.name for field in fields(TrainingArguments))


@pytest.mark.parametrize("name", [*arguments.OWNED, *arguments.UNUSED])
def test_what_would_be_ignored_or_decided_twice_is_refused_with_the_reason(name: str) -> None:
    reason = f"use {arguments.OWNED[name]}" if name in arguments.OWNED else arguments.UNUSED[name]
    assert problems(trainer={name: True}) == [f"trainer.{name} is not supported: {reason}"]


def test_a_setting_that_owns_an_argument_exists() -> None:
    for owner in set(arguments.OWNED.values()):
        words = owner.replace(";", " ").replace("=", " ").replace(",", " ").split()
        assert set(words) & {*config.flat_keys(TrainConfig), "publish-hf", "HF_TOKEN", "train", "eval"}, owner


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dataloader_num_workers": "abc"}, "dataloader_num_workers=abc: should be a whole number from 0 to 256"),
        ({"dataloader_num_workers": 10**30}, "should be a whole number from 0 to 256"),
        ({"per_device_eval_batch_size": 10**30}, "should be a whole number from 1 to 2147483647"),
        ({"eval_delay": float("inf")}, "eval_delay=inf: should be a number from 0"),
        ({"dataloader_num_workers": True}, "dataloader_num_workers=True: should be a whole number from 0"),
        ({"logging_first_step": 1}, "logging_first_step=1: should be one of true, false"),
        ({"eval_delay": -1}, "eval_delay=-1: should be a number from 0"),
        ({"log_level": "loud"}, "log_level=loud: should be one of detail, debug, "),
        ({"gradient_checkpointing_kwargs": {"x": 1}}, "should be {use_reentrant: true} or {use_reentrant: false}"),
        ({"dataloader_prefetch_factor": 2}, "needs trainer.dataloader_num_workers=1 or more"),
        ({"torch_compile_mode": "default"}, "trainer.torch_compile_mode needs torch_compile=true"),
        ({"optim_args": "momentum=0.9"}, "trainer.optim_args needs optim=sgd"),
    ],
)
def test_a_wrong_value_is_one_sentence_before_anything_is_loaded(given: dict[str, Any], told: str) -> None:
    (problem,) = problems(trainer=given)
    assert problem.startswith("trainer.") and told in problem


def test_a_metric_that_does_not_exist_is_refused_before_the_training() -> None:
    guards = [{"metric": "zzzz", "split": "test"}]
    assert problems(metrics=["rougel", "bleu", "file:m.py"], gate={"metric": "zzzz", "guards": guards}) == [
        "metrics: rougel is not a metric; did you mean rougeL?",
        "gate.metric: zzzz is not a metric",
        "gate.guards: zzzz is not a metric",
    ]


def test_an_unknown_argument_is_answered_with_a_guess() -> None:
    told = "trainer.eval_dely is not an argument of TrainingArguments; did you mean eval_delay?"
    assert problems(trainer={"eval_dely": 1}) == [told]


@pytest.mark.parametrize("text", ["x", "momentum=2", "momentum=0", "nesterov=true", "momentum=0.9,lr=1"])
def test_sgd_takes_its_momentum_only(text: str) -> None:
    told = f"trainer.optim_args={text}: should be momentum=0.9, or momentum=0.9,nesterov=true"
    assert problems(optim="sgd", trainer={"optim_args": text}) == [told]


@pytest.mark.parametrize(
    ("schedule", "given", "told"),
    [
        ("cosine", {"foo": 1}, "lr_scheduler_kwargs.foo: lr_scheduler_type=cosine takes num_cycles"),
        ("linear", {"num_cycles": 1}, "lr_scheduler_kwargs.num_cycles: lr_scheduler_type=linear takes none"),
        ("cosine", {"num_cycles": "x"}, "lr_scheduler_kwargs.num_cycles=x: should be a number above 0"),
        ("cosine_with_min_lr", {}, "lr_scheduler_type=cosine_with_min_lr needs min_lr or min_lr_rate, such as "),
        ("warmup_stable_decay", {}, "needs num_decay_steps, such as lr_scheduler_kwargs={num_decay_steps: 100}"),
        ("cosine_with_min_lr", {"min_lr_rate": 1.5}, "min_lr_rate=1.5: should be a number from 0 to 1"),
        ("polynomial", {"power": float("inf")}, "lr_scheduler_kwargs.power=inf: should be a number above 0"),
        ("polynomial", {"lr_end": 1}, "lr_scheduler_kwargs.lr_end=1: should be less than lr=0.001"),
    ],
)
def test_a_schedule_gets_what_it_takes(schedule: str, given: dict[str, Any], told: str) -> None:
    (problem,) = problems(lr_scheduler_type=schedule, lr_scheduler_kwargs=given, lr=1e-3)
    assert told in problem


def test_the_schedules_and_their_arguments_are_those_of_transformers() -> None:
    """Each is made with an example of each of its arguments, and gives a rate."""
    examples = {
        "num_cycles": 2, "min_lr": 0.0, "lr_end": 1e-8, "power": 2.0, "timescale": 5, "num_decay_steps": 2,
        "num_stable_steps": 2, "min_lr_ratio": 0.1, "warmup_type": "linear", "decay_type": "1-sqrt",
    }  # fmt: skip
    for name, takes in arguments.SCHEDULES.items():
        given = {key: examples[key] for key in takes if key != "min_lr_rate"}
        config.load("train", {"lr_scheduler_type": name, "lr_scheduler_kwargs": given}, arguments.problems)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        schedule = transformers.get_scheduler(name, optimizer, 1, 9, scheduler_specific_kwargs=given)
        optimizer.step()
        schedule.step()
        assert schedule.get_last_lr()[0] > 0


def test_a_decay_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    cfg = TrainConfig(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 7})
    with pytest.raises(ConfigError, match="num_decay_steps=7 is more than the 6 steps after the warm-up"):
        build_training_arguments(cfg, "float32", Schedule(2, 6), True, tmp_path)


def test_a_package_that_is_missing_is_named_before_the_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments.check_packages("qlora", "lion_32bit")
    monkeypatch.setattr(arguments, "find_spec", lambda _: None)
    arguments.check_packages("lora", "sgd")
    with pytest.raises(ConfigError) as refused:
        arguments.check_packages("qlora", "lion_32bit")
    assert refused.value.problems == (
        "method=qlora needs bitsandbytes, which is not installed",
        "optim=lion_32bit needs bitsandbytes, which is not installed",
    )


# --- what is passed on takes effect ----------------------------------------------------------------------

PASSED = {
    "per_device_eval_batch_size": 5,
    "optim_args": "momentum=0.9,nesterov=true",
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "torch_empty_cache_steps": 2,
    "logging_first_step": True,
    "log_level": "error",
    "log_level_replica": "critical",
    "log_on_each_node": False,
    "eval_delay": 3,
    "dataloader_num_workers": 2,
    "dataloader_prefetch_factor": 3,
    "dataloader_persistent_workers": True,
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 7,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
}
COMPILED = {"torch_compile_backend": "aot_eager", "torch_compile_mode": "max-autotune"}
SAME_TWICE = {"activation_checkpointing_kwargs": "gradient_checkpointing_kwargs"}  # the new name and the former


def test_what_is_passed_on_takes_effect(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run with all of them, except those of torch.compile and of processes, which are looked up."""
    assert {*PASSED, *COMPILED, *SAME_TWICE} == set(arguments.PASSED_ON)
    made: list[Any] = []
    evaluated: list[int] = []
    emptied: list[int] = []
    summed_loss = Objective.summed_loss

    class Seen(fit.AssayTrainer):
        def __init__(self, **values: Any) -> None:
            super().__init__(**values)
            made.append(self)

    def seen(self: Any, model: Any, batch: dict[str, Any]) -> Any:
        if not model.training:
            evaluated.append(len(batch["rows"]))
        return summed_loss(self, model, batch)

    monkeypatch.setattr(fit, "AssayTrainer", Seen)
    monkeypatch.setattr(Objective, "summed_loss", seen)
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda *_: emptied.append(1))
    level = transformers_logging.get_verbosity()
    words = ("max_steps=6", "eval_steps=2", "logging_steps=3", "optim=sgd", "gradient_checkpointing=true")
    plain = world.train(*words, "trainer={optim_args: 'momentum=0.9,nesterov=true'}")
    evaluated.clear()
    run = world.train(*words, f"trainer={_hydra(PASSED)}")
    (trainer,) = made[1:]
    try:
        assert max(evaluated) == 5
        assert {group["momentum"] for group in trainer.optimizer.param_groups} == {0.9}
        assert {group["nesterov"] for group in trainer.optimizer.param_groups} == {True}
        recomputed = [m for m in trainer.model.modules() if hasattr(m, "_gradient_checkpointing_func")]
        assert recomputed
        assert all(m._gradient_checkpointing_func.keywords == {"use_reentrant": True} for m in recomputed)
        assert len(emptied) == 3  # before steps 1, 3 and 5
        assert [step for step, _ in curves(run)["train/loss"]] == [1, 3, 6]
        assert [step for step, _ in curves(run)["eval/loss"]] == [4, 6]
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
        loader = trainer.get_train_dataloader()
        assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (2, 3, True)
        assert trainer.args.dataloader_pin_memory is False
        ddp = trainer.accelerator.ddp_handler
        assert (ddp.find_unused_parameters, ddp.bucket_cap_mb, ddp.broadcast_buffers) == (True, 7, False)
        assert ddp.static_graph is True
        monkeypatch.setattr(TrainingArguments, "should_log", False)
        assert trainer.args.get_process_log_level() == transformers_logging.CRITICAL
    finally:
        transformers_logging.set_verbosity(level)
    weights = [load_file(each.model / "adapter_model.safetensors") for each in (plain, run)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _hydra(values: Any) -> str:
    if isinstance(values, dict):
        return "{" + ", ".join(f"{key}: {_hydra(value)}" for key, value in values.items()) + "}"
    return f"'{values}'" if isinstance(values, str) else str(values).lower()


def test_torch_compile_gets_its_backend_and_mode(tmp_path: Path) -> None:
    cfg = config.load("train", {"torch_compile": True, "trainer": COMPILED}, arguments.problems)
    made = build_training_arguments(cfg, "float32", Schedule(2, 6), True, tmp_path)
    assert {name: getattr(made, name) for name in COMPILED} == COMPILED
