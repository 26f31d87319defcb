"""AdaLoRA: ranks are reallocated while gradients exist, and end at the target."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from src.errors import ModelError
from src.model import adapters, load, methods
from src.model.source import locate, locate_tuned
from src.schema import MethodArgs
from src.train.callbacks import AdaLoraCallback, is_adalora
from tests.fixtures import World

pytest_plugins = ["tests.fixtures"]

IDS = torch.arange(3, 35).view(2, 16)


def model_of(tiny: Path, steps: int = 20, method: str = "adalora", seed: int = 0, **others: Any) -> Any:
    base, source = load.load_base(locate(str(tiny)), "float32", "cpu")
    load.seed_everything(seed)
    args = MethodArgs(**{"method": method, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **others})
    return adapters.apply_method(base, args, source, steps=steps)


def ranks(model: Any) -> list[int]:
    """Of each layer, how many ranks are used."""
    return [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]


def phases(model: Any) -> tuple[int, int, int]:
    settings = model.peft_config["default"]
    return settings.total_step, settings.tinit, settings.tfinal


def test_the_phases_are_shares_of_the_planned_steps(tiny: Path) -> None:
    model = model_of(tiny, 1000)
    assert phases(model) == (1000, 100, 500)
    settings = model.peft_config["default"]
    assert (settings.init_r, settings.target_r, settings.lora_alpha) == (6, 4, 8)


@pytest.mark.parametrize(
    ("steps", "expected"), [(2, (2, 0, 0)), (3, (3, 0, 1)), (4, (4, 0, 2)), (25, (25, 2, 12))]
)
def test_a_short_training_has_a_step_in_which_ranks_shrink(
    tiny: Path, steps: int, expected: tuple[int, int, int]
) -> None:
    model = model_of(tiny, steps)
    assert phases(model) == expected
    after_each_step(model, steps)
    assert sum(ranks(model)) == 4 * len(ranks(model))


def test_peft_arguments_come_over_the_phases(tiny: Path) -> None:
    model = model_of(tiny, 100, peft={"tinit": 7, "tfinal": 20, "init_r": 9, "total_step": 60})
    assert phases(model) == (60, 7, 20)
    assert model.peft_config["default"].init_r == 9


@pytest.mark.parametrize(
    ("steps", "peft", "told"),
    [
        (1, {}, "method=adalora has no step to shrink the ranks in: of 1 steps"),
        (100, {"tfinal": 99}, "has no step to shrink the ranks in"),
        (100, {"tinit": 60}, "they are constant in the first 60 and the last 50"),
        (100, {"init_r": 4}, "peft.init_r=4 is not above lora_r=4"),
        (100, {"tfinal": "late"}, "peft={'tfinal': 'late'}: invalid literal"),
    ],
)
def test_a_schedule_without_a_step_to_shrink_in_is_refused(
    tiny: Path, steps: int, peft: dict[str, Any], told: str
) -> None:
    with pytest.raises(ModelError) as caught:
        model_of(tiny, steps, peft=peft)
    assert told in str(caught.value)


def after_each_step(model: Any, steps: int, skipped: tuple[int, ...] = ()) -> list[int]:
    """Train; the sum of the used ranks after each step. In the steps `skipped` gradients overflow."""
    assert is_adalora(model)
    mover = AdaLoraCallback(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    used = []
    for done in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        overflows = done + 1 in skipped
        if overflows:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.fill_(torch.inf)
        else:
            optimizer.step()
        state = SimpleNamespace(global_step=done)
        mover.on_optimizer_step(None, state, None, optimizer=SimpleNamespace(step_was_skipped=overflows))
        optimizer.zero_grad()
        used.append(sum(ranks(model)))
    return used


def test_ranks_shrink_to_the_target_and_stay(tiny: Path) -> None:
    used = after_each_step(model_of(tiny, 20), 20)
    layers = 14
    assert used[1] == 6 * layers  # the first tenth of the steps leaves them
    assert used == sorted(used, reverse=True) and len(set(used)) > 3
    assert set(used[9:]) == {4 * layers}


@pytest.mark.parametrize("step", [1, 5, 10])
def test_an_overflow_leaves_no_trace_in_the_ranks(tiny: Path, step: int) -> None:
    model = model_of(tiny, 20)
    used = after_each_step(model, 20, skipped=(step,))
    assert used[-1] == 4 * 14
    assert all(p.isfinite().all() for p in model.parameters())


def test_only_adalora_has_ranks_to_move(tiny: Path) -> None:
    assert not any(is_adalora(model_of(tiny, method=method)) for method in ("lora", "full", "prompt"))


def test_the_trainer_moves_ranks_at_each_step_before_gradients_are_cleared(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    moves = AdaLoraCallback.on_optimizer_step

    def watched(self: AdaLoraCallback, args: Any, state: Any, control: Any, **others: Any) -> None:
        free = [p for n, p in self.tuner.named_parameters() if "lora_B" in n]
        seen.append((state.global_step, state.max_steps, all(p.grad is not None and p.grad.any() for p in free)))
        moves(self, args, state, control, **others)
        if state.global_step == state.max_steps - 1:
            assert sum(ranks(self.tuner)) == 4 * 14
            assert self.tuner.peft_config["default"].total_step == state.max_steps

    monkeypatch.setattr(AdaLoraCallback, "on_optimizer_step", watched)
    run = world.train("method=adalora", "lora_r=4", "epochs=3", "gradient_accumulation_steps=2")
    assert [step for step, _, _ in seen] == list(range(6))
    assert all(there for step, _, there in seen if step > 0)  # E starts at zero: B has no gradient before

    settings = json.loads((run.model / "adapter_config.json").read_text())
    assert sum(map(sum, settings["rank_pattern"].values())) == 4 * 14
    again, _, _ = load.load_tuned(locate_tuned(run.model), "float32", "cpu")
    assert sum(p.numel() for n, p in again.named_parameters() if "lora_E" in n) == 4 * 14


def test_the_extra_loss_is_what_the_model_adds_to_its_own(tiny: Path) -> None:
    model = model_of(tiny)
    own = model(input_ids=IDS, labels=IDS).loss
    bare = model.get_base_model()(input_ids=IDS, labels=IDS).loss
    extra = methods.extra_loss(model)
    assert extra is not None and extra > 0.1
    torch.testing.assert_close(bare + extra, own)
    gradients = [torch.autograd.grad(x, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
                 for x in (own, bare + extra)]  # fmt: skip
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("method", [m for m in methods.METHODS if m != "adalora"])
def test_other_methods_have_no_extra_loss(tiny: Path, method: str) -> None:
    assert methods.extra_loss(model_of(tiny, method=method)) is None
    assert methods.extra_loss(model_of(tiny, peft={"orth_reg_weight": 0.0})) is None


# Through the training


LONG = (
    "method=adalora",
    "lora_r=4",
    "epochs=5",
    "save_steps=2",
    "save_total_limit=9",
    "lora_dropout=0",
)  # 20 steps


def test_a_resumed_training_ends_as_one_that_was_not_stopped(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = world.elsewhere(tmp_path / "whole").train(*LONG)
    steps = transformers.Trainer.training_step

    def power_cut(self: Any, *args: Any, **others: Any) -> Any:
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return steps(self, *args, **others)

    monkeypatch.setattr("transformers.Trainer.training_step", power_cut)
    assert world.call("train", *LONG) == 130
    monkeypatch.undo()
    resumed = world.train(*LONG)
    assert len(world.runs) == 1
    expected, found = (load_file(run.model / "adapter_model.safetensors") for run in (whole, resumed))
    assert expected.keys() == found.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=0, atol=0, msg=name)


def test_a_checkpoint_keeps_every_rank(world: World) -> None:
    run = world.train(*LONG)
    last = load_file(run.checkpoints / "checkpoint-20" / "adapter_model.safetensors")
    kept = load_file(run.model / "adapter_model.safetensors")
    assert sum(len(w) for n, w in last.items() if "lora_E" in n) == 6 * 14
    assert sum(len(w) for n, w in kept.items() if "lora_E" in n) == 4 * 14


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_training_loss_holds_the_regulariser_once(world: World, accumulated: int) -> None:
    words = ("method=adalora", "lora_r=4", "max_steps=2", f"gradient_accumulation_steps={accumulated}", "lr=1e-9",
             f"batch_size={8 // accumulated}", "lora_dropout=0")  # fmt: skip
    with_it, without = (
        json.loads((world.train(*words, f"peft.orth_reg_weight={weight}").path / "metrics.json").read_text())[
            "train"
        ]
        for weight in (0.5, 0)
    )
    extra = methods.extra_loss(model_of(world.model, 2, seed=42))
    assert extra is not None
    assert with_it["train_loss"] - without["train_loss"] == pytest.approx(float(extra), abs=1e-3)
    assert with_it["eval_loss"] == pytest.approx(without["eval_loss"], abs=1e-4)
