"""Speed and memory of training Llama-3-8B on one GPU, by the loop that `train` runs; weights are random.

    python bench/train_gpu.py [--out bench/train_gpu.md] [--only NAME ...] [--steps 12]
    python bench/train_gpu.py --small --steps 3        # the same code on a model that any machine can hold

MFU: floating-point operations that the training needs (2 a weight and token forwards, 2 backwards to the
activations, 2 more where the weight is trained, and attention) a second, against the rate of a large bfloat16
matrix product measured first. Peak memory is torch.cuda.max_memory_allocated in GB of 10^9 bytes; beside it stands
what `plan` says of the same training, without the CUDA context, which PyTorch does not count, and the plan's share
of what was measured.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

from src.data.rows import Example  # noqa: E402
from src.model import adapters  # noqa: E402
from src.model.source import Source  # noqa: E402
from src.runs import Run  # noqa: E402
from src.schema import TrainConfig  # noqa: E402
from src.train.callbacks import RunRecorder  # noqa: E402
from src.train.estimate import Estimator  # noqa: E402
from src.train.fit import fit  # noqa: E402
from src.train.memory import CUDA_WORKSPACES  # noqa: E402

LLAMA_3_8B: dict[str, Any] = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, pad_token_id=0,
)  # fmt: skip
SMALL: dict[str, Any] = LLAMA_3_8B | dict(
    vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@dataclass
class Case:
    """One line of the table: settings, the lengths of a batch's rows, and what is aimed at."""

    name: str
    settings: dict[str, Any]
    lengths: Sequence[int]
    target: str = ""


def mixed(count: int) -> list[int]:
    """Lengths as instruction data has them: log-normal, 64 to 2,048 tokens."""
    return np.random.default_rng(0).lognormal(5.5, 0.9, count).clip(64, 2048).astype(int).tolist()


R16 = {"lora_r": 16, "lora_alpha": 32}
R64 = {"lora_r": 64, "lora_alpha": 128}
LEAN = {"gradient_checkpointing": True, "optim": "paged_adamw_8bit"}
CASES = [
    Case("LoRA r16, 8 x 512", R16, [512] * 8, ">= 14,000 tokens/s"),
    Case("LoRA r16, 1 x 4096", R16, [4096], ">= 14,000 tokens/s"),
    Case("LoRA r64, 8 x 512, lean", R64 | LEAN, [512] * 8, "<= 23 GB"),
    Case("LoRA r64, 8 x 512, fast", R64, [512] * 8, "<= 40 GB"),
    Case("QLoRA r16, 8 x 512", R16 | LEAN | {"method": "qlora"}, [512] * 8, "<= 12.5 GB"),
    Case("full, 8 x 512", {"method": "full", "lr": 1e-5} | LEAN, [512] * 8),
    Case("LoRA r16, mixed lengths", R16, mixed(8), ">= 3 x padded"),
    Case("LoRA r16, mixed lengths, padded", R16 | {"padding_free": False}, mixed(8)),
]


class Repeated(Sequence[Example]):
    """As many batches of the case as the training takes, of random tokens; the second half of a row is learnt."""

    def __init__(self, lengths: Sequence[int], batches: int, vocabulary: int) -> None:
        self.lengths = np.array(list(lengths) * batches)
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        length = int(self.lengths[index])
        ids = np.random.default_rng(index).integers(3, self.vocabulary, length).tolist()
        return Example(ids, [i >= length // 2 for i in range(length)])


def built(sizes: dict[str, Any], four_bit: bool) -> Any:
    """The model with random weights, made on the device, in bfloat16 or nf4."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        if not four_bit:
            with torch.device(device):
                return LlamaForCausalLM(LlamaConfig(**sizes))
        with tempfile.TemporaryDirectory() as folder:  # bitsandbytes packs weights as they are loaded
            LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
            packed = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )  # fmt: skip
            return LlamaForCausalLM.from_pretrained(
                folder, quantization_config=packed, dtype=torch.bfloat16, device_map={"": device}
            )
    finally:
        torch.set_default_dtype(before)


class Clock(RunRecorder):
    """Notes when each step ended."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.ends: list[float] = []

    def on_step_end(self, *words: Any, **named: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())
        super().on_step_end(*words, **named)


class Measured(NamedTuple):
    """Real tokens a second after the first steps; peaks in GB, as measured (0 without a GPU) and as planned."""

    rate: float
    peak: float
    planned: float

    @property
    def shown(self) -> str:
        """The peaks as cells of the table."""
        ratio = f"{self.planned / self.peak:.2f}" if self.peak else ""
        return f"{self.peak:.1f} | {self.planned:.1f} | {ratio}"


def planned(cfg: TrainConfig, rows: Repeated, sizes: dict[str, Any]) -> float:
    """The peak in GB that a plan says for these settings; it is made from the shape of the model alone."""
    device, fixed = ("cuda", CUDA_WORKSPACES) if torch.cuda.is_available() else ("cpu", 0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(folder)
        estimator = Estimator(Source(folder, Path(folder), None), rows, [], "bfloat16", device, None, fixed)
        found = estimator.memory(replace(cfg, output_dir=folder), cfg.gradient_checkpointing is True)
    return found.peak / 1e9


def measure(case: Case, sizes: dict[str, Any], steps: int) -> Measured:
    """Train for `steps` steps; the first ones are not timed."""
    cfg = TrainConfig(
        batch_size=len(case.lengths), max_steps=steps, lora_dropout=0.0, logging_steps=steps, save_steps=10**6,
        max_length=max(case.lengths), deterministic=False,
    )  # fmt: skip
    for key, value in case.settings.items():
        setattr(cfg, key, value)
    if cfg.gradient_checkpointing == "auto":
        cfg.gradient_checkpointing = False
    rows = Repeated(case.lengths, steps, sizes["vocab_size"])
    plan = planned(cfg, rows, sizes)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = built(sizes, cfg.method == "qlora")
    model = adapters.apply(model, cfg, Source("random", None, None), steps=steps)
    with tempfile.TemporaryDirectory() as name:
        run = Run(Path(name))
        run.logs.mkdir()
        clock = Clock(run)
        no_tokenizer: Any = SimpleNamespace(pad_token_id=0, save_pretrained=lambda *_: None)
        fit(model, no_tokenizer, rows, [], cfg, "bfloat16", clock, run.checkpoints, str)
    warm = max(1, steps // 4)
    rate = sum(case.lengths) * (len(clock.ends) - warm) / (clock.ends[-1] - clock.ends[warm - 1])
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Measured(rate, peak, plan)


def operations(case: Case, sizes: dict[str, Any]) -> float:
    """Floating-point operations that the training of one token needs."""
    hidden, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    kv = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    learnt = 0.5 * hidden * sizes["vocab_size"]  # the head is computed where there is a label
    attention = layers * 2 * hidden * sum(n * n for n in case.lengths) / sum(case.lengths)
    passes = 6 if case.settings.get("method") == "full" else 4
    return passes * (weights + learnt) + 3 * attention


def matmul_rate() -> float:
    """Measured operations a second of an 8192-cubed bfloat16 product (1024 on a CPU)."""
    device, n = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for repeat in (3, 20):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.monotonic()
        for _ in range(repeat):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
    return 2 * n**3 * repeat / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = SMALL if args.small else LLAMA_3_8B
    if not torch.cuda.is_available() and not args.small:
        raise SystemExit("there is no GPU here; --small runs the same code on a small model")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rate = matmul_rate()
    lines = [
        f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{datetime.now(timezone.utc):%Y-%m-%d}: `python {' '.join(sys.argv)}`; "
        f"bfloat16 products {rate / 1e12:.0f} TFLOP/s",
        "",
        "| case | tokens/s | MFU | peak GB | planned GB | planned / peak | target |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for case in CASES:
        if args.only and not any(part in case.name for part in args.only):
            continue
        try:
            found = measure(case, sizes, args.steps)
            used = found.rate * operations(case, sizes) / rate
            shown = f"{found.rate:,.0f} | {used:.0%} | {found.shown}"
        except Exception as error:  # one case that fails leaves the others their line
            shown = f"failed: {type(error).__name__}: {str(error)[:80]} | | | | "
        lines.append(f"| {case.name} | {shown} | {case.target} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
