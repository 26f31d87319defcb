"""The pipeline on an NVIDIA GPU: kernels, memory, determinism, answers. Without one, the skip reason says so.

No download: models have random weights. Each run is a separate process, so that several processes can share these
tests: `pytest -m gpu -n 4`.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from bench.plan_memory import case, measure_peak
from tests.fixtures import World, evals, locked, tree
from tests.train.resume_cases import STEPS, end_of

pytest_plugins = ["tests.fixtures"]

HAS_GPU = bool(shutil.which("nvidia-smi")) and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="NO NVIDIA GPU HERE: training and answering on a GPU is NOT tested"),
]

DEVICE = "cuda"
ON_GPU = ("cuda_visible_devices=0", "bf16=auto")
METHODS = ("lora", "qlora", "full")
ROWS = (200, 3, 64, 129)  # lengths
LOSS, GRADIENT = 5e-3, 5e-2  # relative differences that bfloat16 makes
SIZES: dict[str, Any] = dict(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
)  # fmt: skip
SMOLLM2_135M: dict[str, Any] = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
)  # fmt: skip

KILLED = """
import os, signal, sys
from tests.fork_server import KillPoint, at
at(KillPoint("src.train.trainer:AssayTrainer.compute_loss", nth=19), lambda: os.kill(os.getpid(), signal.SIGKILL))
from src.main import main
sys.exit(main(sys.argv[1:]))
"""
WITH_LITTLE_MEMORY = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(450e6 / torch.cuda.get_device_properties(0).total_memory)
from src.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def shaped(tiny: Path, common: Path) -> Path:
    """The folder of a model of SmolLM2-135M's shape with random weights and the tiny model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from src.model.tokenizer import load_tokenizer

    folder = common / "models" / "shaped"
    with locked(folder):
        if not folder.is_dir():
            tokenizer = load_tokenizer(str(tiny))
            ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
            model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M, **ids, bos_token_id=None))
            model.to(torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return folder


# --- one step --------------------------------------------------------------------------------------------


class Step:
    """A model with a method applied, and the loss and gradients of one batch."""

    def __init__(self, method: str, **settings: Any) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from bench.train_gpu import quantize_nf4
        from src.model import adapters
        from src.model.source import Source
        from src.schema import TrainConfig

        self.cfg = TrainConfig(method=method, lora_dropout=0.0, **settings)  # type: ignore[arg-type]
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZES)).to(DEVICE, torch.bfloat16)
        model = quantize_nf4(model) if method == "qlora" else model
        self.model = adapters.apply_method(model, self.cfg, Source("random", None, None), steps=1)
        for name, p in self.model.named_parameters():
            if "lora_B" in name:  # zero at first, and then lora_A has no gradient
                torch.nn.init.normal_(p, std=0.05)
        self.model.train()

    def __call__(
        self, padding_free: bool = True, inside: AbstractContextManager[Any] | None = None
    ) -> tuple[float, Any]:
        """The mean loss of the rows, and its gradients as one vector; both are computed `inside`."""
        import torch

        from bench.train_gpu import TOKENIZER, RandomExamples
        from src.model.adapters import training_precision
        from src.train.fit import CollatorAndLoss

        self.cfg.padding_free = padding_free
        cfg = self.cfg
        processing = CollatorAndLoss.for_model(
            self.model,
            TOKENIZER,
            "bfloat16",
            task=cfg.task,
            method=cfg.method,
            speed=cfg,
            loss=cfg,
            distributed="ddp",
        )
        assert processing.objective.packed == padding_free
        rows = RandomExamples(ROWS, len(ROWS), SIZES["vocab_size"])
        batch = processing.collate(list(enumerate(rows[i] for i in range(len(ROWS)))))
        weight = processing.objective.criterion.total_weight(batch["labels"])
        batch = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        self.model.zero_grad()
        computed = training_precision(self.model, "bfloat16")
        with inside or nullcontext(), processing.objective.attention(self.model), computed:
            loss = processing.objective.summed_loss(self.model, batch) / weight.to(DEVICE)
            loss.backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        return loss.item(), torch.cat([p.grad.flatten().float() for p in trained])


def assert_alike(one: tuple[float, Any], other: tuple[float, Any]) -> None:
    assert one[0] == pytest.approx(other[0], rel=LOSS)
    assert (one[1] - other[1]).norm() / other[1].norm() < GRADIENT


class Seen(AbstractContextManager[Any]):
    """The names of the operations inside."""

    def __enter__(self) -> Any:
        from torch.utils._python_dispatch import TorchDispatchMode

        self.names = names = []  # type: ignore[var-annotated]

        class Seeing(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                names.append(str(func))
                return func(*args, **(kwargs or {}))

        self.mode = Seeing()
        return self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)

    def times(self, part: str) -> int:
        return sum(part in name for name in self.names)


@pytest.mark.parametrize("method", METHODS)
def test_packed_batches_give_the_loss_and_the_gradients_of_padded_ones(method: str) -> None:
    step = Step(method)
    assert_alike(step(padding_free=True), step(padding_free=False))


@pytest.mark.parametrize("method", METHODS)
def test_one_kernel_attends_for_all_rows(method: str) -> None:
    seen, layers = Seen(), SIZES["num_hidden_layers"]
    Step(method)(inside=seen)
    assert seen.times("_varlen_attn.default") == seen.times("_varlen_attn_backward.default") == layers
    assert not seen.times("scaled_dot_product")


@pytest.mark.parametrize("shared", [1, 4], ids=["a head each", "shared heads"])
@pytest.mark.parametrize("window", [None, 50], ids=["", "windowed"])
@pytest.mark.parametrize("size", [64, 128])
def test_the_kernel_computes_what_each_row_alone_gives_in_fp32(shared: int, window: int | None, size: int) -> None:
    import torch

    from src.model import packed_attention

    torch.manual_seed(0)
    shapes = [(1, heads, sum(ROWS), size) for heads in (8, 8 // shared, 8 // shared)]
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    weights = torch.randn(1, sum(ROWS), 8, size, device=DEVICE)
    packed_attention.set_row_lengths(ROWS)
    plain, _ = packed_attention.attend(None, *leaves, None, sliding_window=window)  # type: ignore[arg-type]
    expected = torch.autograd.grad((plain * weights).sum(), leaves)
    with torch.autocast(DEVICE, torch.bfloat16):
        fast, _ = packed_attention.attend(None, *leaves, None, sliding_window=window)  # type: ignore[arg-type]
    assert (plain.dtype, fast.dtype) == (torch.float32, torch.bfloat16)
    for got, right in zip(
        (fast, *torch.autograd.grad((fast * weights).sum(), leaves)), (plain, *expected), strict=True
    ):
        assert (got.float() - right).norm() / right.norm() < 3e-2


@pytest.mark.parametrize("method", METHODS)
def test_liger_s_kernels_give_the_loss_and_the_gradients_of_plain_ones(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("liger_kernel")
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.models.llama import modeling_llama

    from src.train.batch_sampler import Schedule
    from src.train.fit import build_training_arguments

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # it puts its own in their places
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    step, seen = Step(method), Seen()
    plain = step(inside=seen)
    assert seen.times("silu")
    args = build_training_arguments(step.cfg, "bfloat16", Schedule(1, 1), False, tmp_path)
    assert args.use_liger_kernel
    apply_liger_kernel(step.model, args.liger_kernel_config)
    assert_alike(step(inside=seen), plain)
    assert not seen.times("silu")  # it is a part of a kernel now


# --- complete runs -------------------------------------------------------------------------------------


def done(world: World, stage: str, *words: str, code: int = 0, **how: Any) -> str:
    """Run a stage on the GPU in a separate process. Returns its output."""
    process = world.start(stage, *ON_GPU, *words, **how)
    said, _ = process.communicate()
    assert process.returncode == code, said
    return said


@pytest.mark.parametrize("kernels", ["auto", "false"])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("method", METHODS)
def test_the_peak_of_a_training_on_the_gpu_is_the_one_planned(
    shaped: Path, tmp_path: Path, method: str, checkpointing: str, kernels: str
) -> None:
    words = (f"method={method}", f"gradient_checkpointing={checkpointing}", f"use_liger_kernel={kernels}", *ON_GPU)
    found = measure_peak(case(str(shaped), 400, 16, *words), tmp_path)
    assert abs(found.error) < 0.1, found


@pytest.mark.parametrize(
    "words",
    [
        ("method=lora",), ("method=qlora", "optim=paged_adamw_8bit"), ("method=full",), ("method=dora",),
        ("method=prefix",), ("method=prompt",), ("method=lora", "packing=true", "max_length=128"),
        ("method=lora", "bf16=false"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_run_on_the_gpu_learns_and_answers(world: World, words: tuple[str, ...]) -> None:
    said = done(world, "train", *words)
    run = world.newest
    assert run.manifest["precision"]["value"] == ("float16" if "bf16=false" in words else "bfloat16")
    assert run.manifest["hardware"]["gpus"]
    virtual = words[0] in ("method=prefix", "method=prompt")  # these tokens improve a random model little
    assert ("batches are padded" in said) == virtual, said
    figures = json.loads((run.path / "metrics.json").read_text())["train"]
    assert virtual or figures["eval_loss"] < 6  # untrained: ln(512) = 6.2
    done(world, "eval")
    assert evals(run).is_dir()


def test_two_deterministic_runs_give_the_same_bytes(world: World, tmp_path: Path) -> None:
    worlds = [world.elsewhere(tmp_path / name) for name in ("one", "other")]
    for each in worlds:
        done(each, "train", *STEPS)
    assert tree(worlds[0].newest.model) == tree(worlds[1].newest.model)


def test_a_killed_run_resumes_to_the_same_bytes(world: World, tmp_path: Path) -> None:
    whole = world.elsewhere(tmp_path / "whole")
    done(whole, "train", *STEPS)
    done(world, "train", *STEPS, code=-signal.SIGKILL, script=KILLED)
    assert "resuming after step 9" in done(world, "train", *STEPS)
    assert end_of(world.newest) == end_of(whole.newest)


def test_out_of_memory_is_one_error_message(world: World, shaped: Path) -> None:
    words = (f"model_name={shaped}", "batch_size=16", "gradient_checkpointing=false")
    said = done(world, "train", *words, code=2, script=WITH_LITTLE_MEMORY)
    assert "out of memory at step 1" in said
    assert "gradient_checkpointing=true" in said
    assert "Traceback" not in said


def test_what_a_plan_finds_too_large_is_refused_before_the_model_is_loaded(world: World) -> None:
    said = done(world, "train", "memory_gb=0.3", code=2)  # a CUDA context alone takes more
    assert "there are 0.30 GB" in said
    assert "Traceback" not in said
