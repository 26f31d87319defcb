"""The training loop: loss, learning rate, number of steps, and checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from src.data.chat import ChatTokenizer
from src.data.encode import EncodedRow, EncodingOptions, encode_chats
from src.data.formats import Conversation, Row
from src.data.loader import read_rows
from src.data.store import IGNORE_INDEX, Example
from src.model import load
from src.model.source import locate
from src.model.tokenizer import load_tokenizer
from src.runs import Run
from src.schema import TrainConfig
from src.train.batch_sampler import Schedule
from src.train.checkpoint import COMPLETE
from src.train.collators import PackedCollator, PaddingCollator
from src.train.fit import build_training_arguments
from tests.fixtures import ANSWER, TRAINED_ON, World, chat, curves, jsonl

pytest_plugins = ["tests.fixtures"]


def report(run: Run, name: str) -> Any:
    return json.loads((run.path / f"{name}.json").read_text())


# --- batches ---------------------------------------------------------------------------------------------


def items(*examples: tuple[list[int], list[bool]]) -> list[tuple[int, Example]]:
    return [(number, Example(ids, loss_mask)) for number, (ids, loss_mask) in enumerate(examples)]


TWO = items(([1, 2, 3], [False, True, True]), ([4, 5], [True, True]))


def test_a_padded_batch_has_neither_attention_nor_loss_on_its_padding() -> None:
    batch = PaddingCollator(9)(TWO)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[2, 3, IGNORE_INDEX], [5, IGNORE_INDEX, IGNORE_INDEX]]
    assert (batch["rows"], batch["tokens"]) == ([0, 1], 5)


def test_packed_examples_keep_their_positions_and_do_not_predict_each_other() -> None:
    batch = PackedCollator()(TWO)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["target_positions"].tolist() == [0, 1, 3]
    assert batch["labels"].tolist() == [2, 3, 5]
    assert (batch["lengths"], batch["rows"], batch["tokens"]) == ([3, 2], [0, 1], 5)


def test_padding_of_a_packed_batch_is_a_separate_example_without_loss() -> None:
    batch = PackedCollator(multiple=8)(TWO)
    assert batch["input_ids"].shape == (1, 8)
    assert batch["lengths"] == [3, 2, 3]
    assert batch["labels"].tolist() == [2, 3, 5, *[IGNORE_INDEX] * 5]
    assert batch["tokens"] == 5


@pytest.mark.parametrize("collate", [PackedCollator(), PackedCollator(8), PaddingCollator(0)])
def test_a_batch_without_rows_is_one_without_loss(collate: Any) -> None:
    batch = collate([])
    assert batch["input_ids"].numel() >= 1
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert (batch["rows"], batch["tokens"]) == ([], 0)


def test_padding_with_the_end_of_turn_token_does_not_hide_the_real_one(tiny: Path) -> None:
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.pad_token = tokenizer.eos_token
    rows = [
        Row(Path("x"), 1, chat(*turns)["messages"]) for turns in (("2+2?", "4"), ("2+2 and then what?", "4444"))
    ]
    examples = [
        each.examples[0]
        for each in encode_chats(rows, ChatTokenizer(tokenizer), EncodingOptions(512))
        if isinstance(each, EncodedRow)
    ]
    assert len(examples) == 2
    for collate in (PaddingCollator(tokenizer.pad_token_id), PackedCollator(64)):
        labels = collate(list(enumerate(examples)))["labels"].flatten().tolist()
        assert labels.count(tokenizer.eos_token_id) == 2
        assert [i for i in labels if i != IGNORE_INDEX] == [
            i for e in examples for i in e.labels if i != IGNORE_INDEX
        ]


# --- learning --------------------------------------------------------------------------------------------


def test_the_first_loss_is_the_cross_entropy_of_the_answers_by_hand(world: World, tokenizer: Any) -> None:
    run = world.train("batch_size=16", "lora_dropout=0", "max_steps=1", "logging_steps=1")
    model, _ = load.load_base(locate(str(world.model)), "float32", "cpu")
    total, tokens = 0.0, 0
    for row in read_rows(world.data / "lessons.jsonl", "messages"):
        prompt = ChatTokenizer(tokenizer).prompt_ids(Conversation(row.messages[:-1]))
        answer = tokenizer(ANSWER + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            chances = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(float(chances[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        tokens += len(answer)
    assert curves(run)["train/loss"] == [(1, pytest.approx(total / tokens, rel=1e-4))]


def test_the_loss_falls_to_zero_on_memorized_rows(world: World) -> None:
    run = world.train("method=full", "epochs=12", "lr=0.01")
    losses = [value for _, value in curves(run)["train/loss"]]
    assert losses[0] > 5
    assert losses[-1] < 0.05
    assert report(run, "metrics")["train"]["eval_loss"] == pytest.approx(curves(run)["eval/loss"][-1][1])
    assert report(run, "metrics")["train"]["eval_loss"] < 1


def test_a_diverged_run_is_not_reported_as_a_success(world: World) -> None:
    code = world.call("train", "method=full", "lr=1e30", "max_steps=6", "logging_steps=1")
    losses = [value for _, value in curves(world.newest)["train/loss"]]
    assert code != 0 or not math.isfinite(report(world.newest, "metrics")["train"]["train_loss"])
    assert all(value > 1 for value in losses)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["epochs=2", "batch_size=3", "gradient_accumulation_steps=4"], 2 * math.ceil(math.ceil(16 / 3) / 4)),
        (["epochs=0.5", "batch_size=2"], 4),
        (["max_steps=3", "batch_size=2"], 3),
    ],
)
def test_steps_are_those_that_epochs_batches_and_accumulation_make(
    world: World, words: list[str], steps: int
) -> None:
    run = world.train(*words)
    assert report(run, "metrics")["train"]["steps"] == steps
    if "epochs=2" in words:
        assert report(run, "metrics")["train"]["tokens"] == 2 * report(run, "data_report")["tokens"]["total"]
        assert [step for step, _ in curves(run)["eval/loss"]] == [steps // 2, steps]  # after each epoch


def test_many_batches_of_one_are_one_batch_of_many(world: World) -> None:
    # of all 16 rows: a smaller step would take others, since the longest batch comes first
    common = ("max_steps=3", "lora_dropout=0", "lr=0.001", "logging_steps=1", "loss=weighted")
    common += ("class_weights={a: 3}",)
    large = world.train(*common, "batch_size=16")
    small = world.train(*common, "batch_size=1", "gradient_accumulation_steps=16")
    for tag, tolerance in (("train/loss", 1e-6), ("train/grad_norm", 1e-5)):
        assert values(small, tag) == pytest.approx(values(large, tag), rel=tolerance)


def values(run: Run, tag: str) -> list[float]:
    return [value for _, value in curves(run)[tag]]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_packed_batches_train_like_padded_ones(world: World, method: str) -> None:
    common = (f"method={method}", "max_steps=6", "lora_dropout=0", "lr=0.001", "logging_steps=1", "batch_size=5")
    free = world.train(*common)
    padded = world.train(*common, "padding_free=false")
    assert values(free, "train/loss") == pytest.approx(values(padded, "train/loss"), rel=1e-4)
    assert values(free, "eval/loss") == pytest.approx(values(padded, "eval/loss"), rel=1e-4)
    assert samples(free) == samples(padded)
    one, other = (load_file(next(r.model.glob("*.safetensors"))) for r in (free, padded))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-4)


def samples(run: Run) -> list[list[int]]:
    lines = [json.loads(line) for line in (run.logs / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["rows"] for line in lines]


def test_the_sample_log_lists_each_example_once_per_epoch(world: World) -> None:
    run = world.train("epochs=2", "batch_size=3", "gradient_accumulation_steps=2")
    steps = samples(run)
    an_epoch = len(steps) // 2
    for epoch in (steps[:an_epoch], steps[an_epoch:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(16))
    assert {len(rows) for rows in steps} == {6, 4}


def test_packing_fills_rows_up_to_max_length_and_loses_none(world: World) -> None:
    run = world.train("packing=true", "max_length=64", "batch_size=2", "epochs=1", "logging_steps=1")
    steps = samples(run)
    assert sorted(row for rows in steps for row in rows) == list(range(16))
    assert max(len(rows) for rows in steps) > 2  # of some 24 tokens each
    assert report(run, "metrics")["train"]["tokens"] == report(run, "data_report")["tokens"]["total"]


def test_packing_and_padding_do_not_go_together(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.call("train", "packing=true", "padding_free=false") == 2
    assert "packing=true is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss=weighted"], "class_weights and loss=weighted need each other"),
        (["class_weights={a: 2}"], "class_weights and loss=weighted need each other"),
        (["loss=weighted", "class_weights={no such word: 2}"], "'no such word' is neither a label nor one token"),
    ],
)
def test_weights_are_those_of_a_weighted_loss_and_of_classes_that_exist(
    world: World, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert world.call("train", *words) == 2
    assert said in capsys.readouterr().err
    assert not (world.output / "runs").exists()


def test_a_weight_on_the_first_word_of_answers_makes_it_count_more(world: World, tokenizer: Any) -> None:
    word = tokenizer.convert_ids_to_tokens(tokenizer(ANSWER, add_special_tokens=False)["input_ids"])[0]
    common = ("max_steps=1", "logging_steps=1", "lora_dropout=0", "batch_size=16")
    plain = values(world.train(*common), "train/grad_norm")
    weighted = world.train(*common, "loss=weighted", f"class_weights={{{word}: 50}}")
    assert values(weighted, "train/grad_norm") != pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_recomputes_and_changes_nothing_else(
    world: World, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = [0]
    forward = LlamaMLP.forward

    def counted(self: Any, *words: Any) -> Any:
        calls[0] += torch.is_grad_enabled()
        return forward(self, *words)

    def train(*words: str) -> tuple[int, dict[str, torch.Tensor]]:
        calls[0] = 0
        run = world.train("max_steps=3", f"method={method}", "lr=0.001", *words)
        return calls[0], load_file(next(run.model.glob("*.safetensors")))

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    once, weights = train()
    twice, same = train("gradient_checkpointing=true")
    assert twice == 2 * once
    assert weights.keys() == same.keys()
    for name in weights:
        torch.testing.assert_close(same[name], weights[name], rtol=0, atol=1e-5)


# --- the learning rate -----------------------------------------------------------------------------------

PEAK, STEPS, WARMUP = 0.01, 10, 4


def after(step: int) -> float:
    return (step - WARMUP) / (STEPS - WARMUP)


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "constant": lambda share: 1.0,
}


def rates(world: World, *words: str) -> list[float]:
    run = world.train(f"lr={PEAK}", f"max_steps={STEPS}", "logging_steps=1", *words)
    logged = curves(run)["train/learning_rate"]
    assert [step for step, _ in logged] == list(range(1, STEPS + 1))
    return [value for _, value in logged]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_learning_rate_warms_up_to_its_peak_and_follows_the_scheduler(world: World, shape: str) -> None:
    expected = [PEAK * step / WARMUP for step in range(WARMUP)]
    expected += [PEAK * SHAPES[shape](after(step)) for step in range(WARMUP, STEPS)]
    got = rates(world, f"lr_scheduler_type={shape}", f"warmup_ratio={WARMUP / STEPS}")
    assert got == pytest.approx(expected, rel=1e-5)


def test_without_warm_up_the_learning_rate_starts_at_its_peak(world: World) -> None:
    expected = [PEAK * SHAPES["cosine"](step / STEPS) for step in range(STEPS)]
    assert rates(world, "warmup_ratio=0") == pytest.approx(expected, rel=1e-5)


# --- settings and checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ({"max_grad_norm": 0.5}, {"max_grad_norm": 0.5}),
        ({"seed": 7}, {"seed": 7, "data_seed": 7}),
        ({"batch_size": 3}, {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}),
        ({"save_steps": 2, "save_total_limit": 5}, {"save_steps": 2, "save_total_limit": 5}),
        ({"eval_steps": 2}, {"eval_steps": 2}),
        ({"adam_beta1": 0.5, "optim": "adafactor"}, {"adam_beta1": 0.5, "optim": "adafactor"}),
    ],
)
def test_settings_reach_the_trainer(tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    made = build_training_arguments(TrainConfig(**ours), "float32", Schedule(2, 6), True, tmp_path)
    assert {name: getattr(made, name) for name in theirs} == theirs


def test_checkpoints_come_every_save_steps_and_the_newest_are_kept_complete(world: World) -> None:
    run = world.train("max_steps=7", "save_steps=2", "save_total_limit=2")
    folders = sorted((run.path / "checkpoints").iterdir())
    assert [f.name for f in folders] == ["checkpoint-6", "checkpoint-7"]
    for folder in folders:
        files = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
        assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= set(files)
        assert files[COMPLETE] == max(files.values())
        assert json.loads((folder / COMPLETE).read_text())["files"].keys() == files.keys() - {COMPLETE}


def test_the_evaluation_loss_comes_every_eval_steps(world: World) -> None:
    run = world.train("max_steps=6", "eval_steps=2")
    assert [step for step, _ in curves(run)["eval/loss"]] == [2, 4, 6]


def test_without_a_dev_split_there_is_no_evaluation_loss_and_the_log_says_so(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.train("max_steps=2", "eval_path=none")
    assert "eval/loss" not in curves(run)
    assert "eval_loss" not in report(run, "metrics")["train"]
    assert "no evaluation loss: " in capsys.readouterr().out


def test_an_over_long_dev_row_is_left_out_and_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "Top? " * 200, "completion": "TOP(a)"}
    path = jsonl(tmp_path / "eval" / "dev.jsonl", [long, {"prompt": "Top of it?", "completion": "TOP(a)"}])
    run = world.train("max_steps=2", "max_length=64", f"eval_path={path.parent}")
    assert f"{path}:1 has " in capsys.readouterr().out
    assert len(curves(run)["eval/loss"]) == 1
    assert len(TRAINED_ON) == report(run, "data_report")["rows_trained"]


# --- where curves go -------------------------------------------------------------------------------------


def test_curves_go_to_mlflow_if_it_is_set(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = world.train("max_steps=4", "logging_steps=2", "report_to=mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.info.run_name == run.id
    losses = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "loss")]
    assert losses == [(step, pytest.approx(value)) for step, value in curves(run)["train/loss"]]


def test_a_reporter_that_is_not_installed_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.call("train", "report_to=[wandb]") == 2
    assert "wandb is not installed" in capsys.readouterr().err
