"""Weights, gradients and optimizer sharded over processes: the same training as in one, saved complete."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from src.errors import ModelError
from src.train import trainer
from tests.fixtures import World, curves
from tests.test_gpu import HAS_GPU
from tests.train.several import TWO, Start, ended, samples, until

pytest_plugins = ["tests.fixtures", "tests.fork_server", "tests.train.several"]

deepspeed = pytest.mark.skipif(
    not find_spec("deepspeed"),
    reason="DEEPSPEED IS NOT INSTALLED: distributed=zero2 and zero3 are NOT tested (requirements-deepspeed.txt)",
)
ENGINES = ["fsdp2", pytest.param("zero2", marks=deepspeed), pytest.param("zero3", marks=deepspeed)]
COMMON = (
    "epochs=4",
    "batch_size=6",
    "lora_dropout=0",
    "lr=0.003",
    "logging_steps=1",
    "save_steps=1",
    "resume=auto",
)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_sharded_weights_train_alike_resume_and_are_saved_complete(
    world: World, start: Start, fork: Start, engine: str, method: str
) -> None:
    begin = fork if engine == "fsdp2" else start
    words = (*COMMON, *TWO, f"parallel={engine}", f"method={method}")
    child = begin(*words)
    run = until(child, world, "step 2/")
    child.send_signal(signal.SIGTERM)
    code, said = ended(child)
    assert code == 75, said
    code, said = ended(begin(*words))
    assert code == 0, said
    assert "resuming after step" in said
    assert [r.id for r in world.runs] == [run.id]

    one = world.train(*COMMON, f"method={method}", "gradient_accumulation_steps=2")
    assert samples(run) == samples(one)
    for tag in ("train/loss", "train/grad_norm", "eval/loss"):
        assert [v for _, v in curves(run)[tag]] == pytest.approx([v for _, v in curves(one)[tag]], rel=1e-3), tag
    for path in one.model.glob("*.safetensors"):
        shared, whole = load_file(run.model / path.name), load_file(path)
        assert shared.keys() == whole.keys()
        for key, tensor in whole.items():
            assert shared[key].dtype == tensor.dtype
            assert torch.allclose(shared[key], tensor, atol=2e-3), key


@pytest.mark.parametrize("preset", ["ddp", "fsdp2", *(pytest.param(p, marks=deepspeed) for p in (
    "zero2", "zero2_offload", "zero3", "zero3_offload"))])  # fmt: skip
def test_every_preset_starts_on_one_device(world: World, start: Start, fork: Start, preset: str) -> None:
    begin = fork if preset in {"ddp", "fsdp2"} else start
    code, said = ended(begin(f"parallel={preset}", "max_steps=2", "num_proc=1"))
    assert code == 0, said
    assert world.newest.status == "finished"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="NO NVIDIA GPU HERE: sharing out weights over GPUs is NOT tested")
@pytest.mark.parametrize("preset", ["fsdp2", *(pytest.param(p, marks=deepspeed) for p in ("zero2", "zero3"))])
def test_sharded_weights_on_a_gpu_are_computed_in_bfloat16(world: World, start: Start, preset: str) -> None:
    code, said = ended(start(f"parallel={preset}", "max_steps=4", "cuda_visible_devices='0'", "bf16=true"))
    assert code == 0, said
    assert curves(world.newest)["train/loss"]


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_weights_that_an_engine_has_not_sharded_are_refused(engine: str) -> None:
    model: Any = torch.nn.Linear(2, 2)
    trainer.check_sharded(model, "ddp")
    trainer.check_sharded(model, "zero2")
    with pytest.raises(ModelError, match=f"distributed={engine} left 2 weights unsharded, the first is weight"):
        trainer.check_sharded(model, engine)
