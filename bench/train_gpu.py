"""Speed and memory of training Llama-3-8B on one GPU with the training loop of `train`; weights are random.

    python bench/train_gpu.py [--out bench/train_gpu.md] [--only NAME ...] [--steps 12] [--budget SECONDS]
    python bench/train_gpu.py --small --steps 3        # the same code with a model for any machine
    python bench/train_gpu.py --plans                  # the planned peaks, on any machine

Each case is a separate process, and its line is written when it ends; cases for which the budget leaves no time
are not measured. Padding is not counted as tokens.

MFU: floating-point operations per second of the training (per weight and token 2 forward, 2 backward to the
activations, 2 more if the weight is trained; and attention), divided by the rate of a large bfloat16 matrix
product, measured first. Peak memory is torch.cuda.max_memory_allocated in GB of 10^9 bytes. The next columns
are the plan of the same run, without the CUDA context, which PyTorch does not count, and its ratio to the
measured peak.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402
from transformers.quantizers import AutoHfQuantizer  # noqa: E402

from src.data.store import IGNORE_INDEX, Example  # noqa: E402
from src.model import adapters, load, packed_attention  # noqa: E402
from src.model.source import Source  # noqa: E402
from src.runs import Run  # noqa: E402
from src.schema import TrainConfig  # noqa: E402
from src.train.batch_sampler import Schedule, build_sampler  # noqa: E402
from src.train.callbacks import RunRecorder  # noqa: E402
from src.train.fit import (  # noqa: E402
    CHECKPOINTING,
    CollatorAndLoss,
    build_training_arguments,
    fit,
    set_numerics,
)
from src.train.plan.estimate import MemoryEstimator  # noqa: E402
from src.train.plan.memory import CUDA_WORKSPACES  # noqa: E402
from src.utils import environment  # noqa: E402
from src.utils.process_info import ProcessInfo  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
LLAMA_3_8B: dict[str, Any] = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, pad_token_id=0,
)  # fmt: skip
SMALL: dict[str, Any] = LLAMA_3_8B | dict(
    vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


TOKENIZER: Any = SimpleNamespace(pad_token_id=0, save_pretrained=lambda *_: None)
RESULT_PREFIX = "answer "


@dataclass
class Case:
    """One line of the table: settings, lengths of the examples, and the target.

    plain: use transformers' Trainer with its defaults and padded batches instead of this project's loop.
    by_sdpa: use scaled_dot_product_attention instead of the variable-length kernel; one example per batch only.
    """

    name: str
    settings: dict[str, Any]
    lengths: Sequence[int]
    target: str = ""
    batch_size: int = 8
    plain: bool = False
    by_sdpa: bool = False


def mixed(count: int) -> list[int]:
    """Lengths typical of instruction data: log-normal, 64 to 2,048 tokens."""
    return np.random.default_rng(0).lognormal(5.5, 0.9, count).clip(64, 2048).astype(int).tolist()


R16 = {"lora_r": 16, "lora_alpha": 32}
R64 = {"lora_r": 64, "lora_alpha": 128}
# Not the paged one: PyTorch's peak does not include CUDA's managed memory.
LEAN = {"gradient_checkpointing": True, "optim": "adamw_8bit"}
# Padded to 2,048 tokens, a batch of mixed lengths fits an 80 GB GPU only where activations are recomputed.
MIXED, SAME = "LoRA r16, mixed lengths", "LoRA r16, mixed lengths, recomputed"
PADDED, TRAINER = (
    "LoRA r16, mixed lengths, padded, recomputed",
    "LoRA r16, mixed lengths, recomputed, transformers' Trainer",
)
RECOMPUTED = R16 | {"gradient_checkpointing": True}
CASES = [
    Case("LoRA r16, 8 x 512", R16, [512], ">= 14,000 tokens/s"),
    Case("LoRA r16, 1 x 4096", R16, [4096], ">= 14,000 tokens/s", 1),
    Case("LoRA r64, 8 x 512, lean", R64 | LEAN, [512], "<= 23 GB"),
    Case("LoRA r64, 8 x 512, fast", R64, [512], "<= 40 GB"),
    Case("QLoRA r16, 8 x 512", R16 | LEAN | {"method": "qlora"}, [512], "<= 12.5 GB"),
    Case(MIXED, R16, mixed(96), ">= 3 x padded"),
    Case(SAME, RECOMPUTED, mixed(96)),
    Case(PADDED, RECOMPUTED | {"padding_free": False}, mixed(96)),
    Case(TRAINER, RECOMPUTED, mixed(96), plain=True),
    Case("LoRA r16, 1 x 4096, by sdpa", R16, [4096], "", 1, by_sdpa=True),
    Case("LoRA r16, 8 x 512, without Liger", R16 | {"use_liger_kernel": False}, [512]),
    Case("full, 8 x 512", {"method": "full", "lr": 1e-5} | LEAN, [512]),
]


class RandomExamples(Sequence[Example]):
    """Examples of random tokens with the lengths of the case; the second half of each has loss."""

    def __init__(self, lengths: Sequence[int], rows: int, vocabulary: int) -> None:
        self.lengths = np.array(list(islice(cycle(lengths), rows)))
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        length = int(self.lengths[index])
        ids = np.random.default_rng(index).integers(3, self.vocabulary, length).tolist()
        return Example(ids, [i >= length // 2 for i in range(length)])


def build_model(sizes: dict[str, Any], four_bit: bool) -> Any:
    """The model with random weights, created on the device, in bfloat16 or nf4."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(LlamaConfig(**sizes))
    finally:
        torch.set_default_dtype(before)
    return quantize_nf4(model) if four_bit else model


def quantize_nf4(model: Any) -> Any:
    """The model as loaded in nf4; its layers are quantized one after another in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantizer = AutoHfQuantizer.from_config(load._nf4_config("bfloat16", None))
    weights = {name: m.weight.data for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantizer.preprocess_model(model=model, device_map=None)
    for name, module in model.named_modules():
        weight = weights.pop(name, None)
        if isinstance(module, Linear4bit):
            module.weight = Params4bit(weight, requires_grad=False, **module.weight.__dict__).to(weight.device)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    return model


class Clock:
    """Records when each step ends, and the number of tokens processed until then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def tick(self, state: Any) -> None:
        if HAS_GPU:
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())
        self.tokens.append(int(state.num_input_tokens_seen))

    @property
    def rate(self) -> float:
        """Tokens a second, without the first quarter of the steps."""
        warm = max(1, len(self.ends) // 4) - 1
        return (self.tokens[-1] - self.tokens[warm]) / (self.ends[-1] - self.ends[warm])


class Recorder(RunRecorder):
    """A run recorder with a clock; it saves no checkpoint at the end."""

    def __init__(self, run: Run, clock: Clock) -> None:
        super().__init__(run)
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.clock.tick(state)
        super().on_step_end(args, state, control, **named)
        control.should_save = False


class ClockCallback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.tick(state)


def planned_peak(
    cfg: TrainConfig,
    rows: RandomExamples,
    sizes: dict[str, Any],
    device: str = DEVICE,
    with_liger: bool | None = None,
) -> float:
    """The planned peak in GB for these settings, from the architecture of the model.

    `with_liger`: None for the kernels that a run on this machine uses.
    """
    fixed = CUDA_WORKSPACES if device == "cuda" else 0
    if with_liger is None:
        kernels = environment.choose_kernels(cfg.use_liger_kernel, cfg.cuda_visible_devices)
        with_liger = kernels.value == "liger"
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(folder)
        source = Source(folder, Path(folder), None)
        estimator = MemoryEstimator(source, rows, [], "bfloat16", device, TOKENIZER, fixed, with_liger=with_liger)
        found = estimator.memory(replace(cfg, output_dir=folder), cfg.gradient_checkpointing is True)
    return found.peak / 1e9


def settings(case: Case, steps: int) -> TrainConfig:
    cfg = TrainConfig(
        batch_size=case.batch_size, max_steps=steps, lora_dropout=0.0, logging_steps=steps, save_steps=10**6,
        max_length=max(case.lengths), deterministic=False, gradient_checkpointing=False,
    )  # fmt: skip
    return replace(cfg, **case.settings)


def measure(case: Case, sizes: dict[str, Any], steps: int) -> dict[str, float]:
    """Train for `steps` steps. Returns: tokens per second; the measured and the planned peak in GB."""
    cfg = settings(case, steps)
    rows = RandomExamples(case.lengths, steps * case.batch_size, sizes["vocab_size"])
    plan = 0.0 if case.plain else planned_peak(cfg, rows, sizes)
    if case.by_sdpa:
        packed_attention._attend_varlen = attend_by_sdpa
    model = adapters.apply_method(
        build_model(sizes, cfg.method == "qlora"), cfg, Source("random", None, None), steps=steps
    )
    if HAS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    with tempfile.TemporaryDirectory() as name:
        if case.plain:
            train_with_trainer(model, rows, cfg, clock, name)
        else:
            run = Run(Path(name))
            run.logs.mkdir()
            train(model, rows, cfg, Recorder(run, clock))
    peak = torch.cuda.max_memory_allocated() / 1e9 if HAS_GPU else 0.0
    return {"rate": clock.rate, "peak": peak, "planned": plan}


def train(model: Any, rows: Any, cfg: TrainConfig, recorder: RunRecorder) -> None:
    """Train with this project's loop."""
    sampler = build_sampler(rows, cfg, cfg.seed, cfg.max_length if cfg.packing else None, ProcessInfo())
    schedule = Schedule.from_batches(len(sampler), cfg)
    collator_and_loss = CollatorAndLoss.for_model(
        model,
        TOKENIZER,
        "bfloat16",
        task=cfg.task,
        method=cfg.method,
        speed=cfg,
        loss=cfg,
        distributed=cfg.distributed,
    )
    set_numerics(cfg, cfg.cuda_visible_devices)
    args = build_training_arguments(cfg, "bfloat16", schedule, False, recorder.run.checkpoints)
    fit(
        model, TOKENIZER, rows, [], sampler=sampler, schedule=schedule, collator_and_loss=collator_and_loss,
        args=args, dtype="bfloat16", loop=cfg, speed=cfg, distributed=cfg.distributed, seed=cfg.seed,
        recorder=recorder, locate_row=str,
    )  # fmt: skip


def attend_by_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Replaces packed_attention._attend_varlen for batches of one example."""
    return packed_attention._attend_row(query, key, value, scaling, 0.0, window, None).transpose(1, 2)


def train_with_trainer(model: Any, rows: RandomExamples, cfg: TrainConfig, clock: Clock, folder: str) -> None:
    """Train with transformers' Trainer and its own loss, padded to the longest example of each batch."""
    args = TrainingArguments(
        folder, per_device_train_batch_size=cfg.batch_size, max_steps=cfg.max_steps or 1, bf16=True,
        optim=cfg.optim, learning_rate=cfg.lr, logging_steps=10**6, save_strategy="no", report_to=[],
        include_num_input_tokens_seen="non_padding", remove_unused_columns=False, use_cpu=not HAS_GPU,
        disable_tqdm=True, **{CHECKPOINTING: cfg.gradient_checkpointing is True},
    )  # fmt: skip

    def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
        made = {
            "input_ids": ([e.ids for e in examples], 0),
            "attention_mask": ([[1] * len(e.ids) for e in examples], 0),
            "labels": ([e.labels for e in examples], IGNORE_INDEX),
        }
        return {
            name: pad_sequence([torch.tensor(x) for x in of_rows], batch_first=True, padding_value=fill)
            for name, (of_rows, fill) in made.items()
        }

    Trainer(model, args, collate, rows, callbacks=[ClockCallback(clock)]).train()


def operations(case: Case, sizes: dict[str, Any]) -> float:
    """Floating-point operations of training on one token."""
    hidden, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    kv = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    shapes = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, inner)] * 3
    weights = layers * sum(a * b for a, b in shapes)
    adapter = layers * case.settings.get("lora_r", 0) * sum(a + b for a, b in shapes)
    head = 0.5 * hidden * sizes["vocab_size"]  # the head is computed where there is a label
    attention = layers * 2 * hidden * sum(n * n for n in case.lengths) / sum(case.lengths)
    passes = 6 if case.settings.get("method") == "full" else 4
    return passes * (weights + head) + 6 * adapter + 3 * attention


def measure_matmul() -> dict[str, Any]:
    """Measured operations per second of an 8192-cubed bfloat16 product (1024 on a CPU), and the device's name."""
    n = 8192 if HAS_GPU else 1024
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    for repeat in (3, 20):
        if HAS_GPU:
            torch.cuda.synchronize()
        began = time.monotonic()
        for _ in range(repeat):
            a @ a
        if HAS_GPU:
            torch.cuda.synchronize()
    rate = 2 * n**3 * repeat / (time.monotonic() - began)
    return {"rate": rate, "device": torch.cuda.get_device_name() if HAS_GPU else "CPU"}


def run_in_subprocess(name: str, args: argparse.Namespace, seconds: float | None) -> dict[str, Any]:
    """Run a case, or "products", in a separate process. Returns: its figures, or why there are none."""
    words = [sys.executable, __file__, "--one", name, "--steps", str(args.steps), *["--small"] * args.small]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {seconds:.0f} s"}
    results = [line for line in done.stdout.splitlines() if line.startswith(RESULT_PREFIX)]
    if done.returncode or not results:
        print(done.stdout[-4000:], file=sys.stderr, flush=True)
        lines = [line for line in done.stdout.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        return {"failed": lines[-1].replace("|", "/")[:120]}
    return dict(json.loads(results[-1].removeprefix(RESULT_PREFIX)))


def line(case: Case, found: dict[str, Any] | None, rate: float, sizes: dict[str, Any], seconds: float) -> str:
    """The line of a case in the table; `found` is None if it was not measured."""
    if found is None or "failed" in found:
        reason = "not measured" if found is None else f"failed: {found['failed']}"
        return f"| {case.name} | {reason} | | | | | {case.target} | {seconds:.0f} |"
    used = found["rate"] * operations(case, sizes) / rate
    plan, peak = found["planned"], found["peak"]
    memory = f"{peak:.1f} | {plan:.1f} | {f'{plan / peak:.2f}' if peak and plan else ''}"
    return f"| {case.name} | {found['rate']:,.0f} | {used:.0%} | {memory} | {case.target} | {seconds:.0f} |"


def ratios(found: dict[str, dict[str, Any] | None]) -> list[str]:
    """The speed-up of packed over padded batches, as sentences."""
    rates = {name: (found.get(name) or {}).get("rate") for name in (MIXED, SAME, PADDED, TRAINER)}
    sentences = [
        f"{one}: {rates[one] / rates[other]:.2f} times the tokens per second of {other}."
        for one in (MIXED, SAME)
        for other in (PADDED, TRAINER)
        if rates[one] and rates[other]
    ]
    return ["", *sentences] if sentences else []


def report(args: argparse.Namespace, cases: Sequence[Case], sizes: dict[str, Any]) -> list[str]:
    """Measure one case after another, and write each result to `--out` at once."""
    began = time.monotonic()
    about = run_in_subprocess("products", args, args.budget)
    if "failed" in about:
        raise SystemExit(f"no matrix product: {about['failed']}")
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "peft"))
    head = [
        f"{about['device']}, Python {sys.version.split()[0]}, {packages}, "
        f"{datetime.now(timezone.utc):%Y-%m-%d}: `python {shlex.join(sys.argv)}`; "
        f"bfloat16 products {about['rate'] / 1e12:.0f} TFLOP/s",
        "",
        "| case | tokens/s | MFU | peak GB | planned GB | planned / peak | target | s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    found: dict[str, dict[str, Any] | None] = {}
    took = dict.fromkeys((case.name for case in cases), 0.0)
    for case in cases:
        started = time.monotonic()
        left = None if args.budget is None else args.budget - (started - began)
        if left is None or left > args.least:
            found[case.name] = run_in_subprocess(case.name, args, left)
        took[case.name] = time.monotonic() - started
        rows = [line(c, found.get(c.name), about["rate"], sizes, took[c.name]) for c in cases]
        print(rows[cases.index(case)], flush=True)
        if args.out:
            args.out.write_text("\n".join(head + rows + ratios(found)) + "\n")
    return head + rows + ratios(found)


def plans(cases: Sequence[Case], sizes: dict[str, Any], steps: int) -> Iterator[str]:
    """The table of the planned peaks of all cases on a GPU."""
    yield "| case | planned GB, with Liger | without | target |"
    yield "| --- | ---: | ---: | --- |"
    for case in (c for c in cases if not (c.plain or c.by_sdpa or "use_liger_kernel" in c.settings)):
        rows = RandomExamples(case.lengths, steps * case.batch_size, sizes["vocab_size"])
        of = [planned_peak(settings(case, steps), rows, sizes, "cuda", with_liger) for with_liger in (True, False)]
        yield f"| {case.name} | {of[0]:.1f} | {of[1]:.1f} | {case.target if 'GB' in case.target else ''} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="time limit of all cases")
    parser.add_argument(
        "--least", type=float, default=30, metavar="SECONDS", help="minimum remaining time to start a case"
    )
    parser.add_argument("--plans", action="store_true", help="print only the planned GPU peaks")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = SMALL if args.small else LLAMA_3_8B
    if args.one:
        case = next((c for c in CASES if c.name == args.one), None)
        found = measure(case, sizes, args.steps) if case else measure_matmul()
        print(f"\n{RESULT_PREFIX}{json.dumps(found)}", flush=True)
        os._exit(0)
    cases = [c for c in CASES if not args.only or any(part in c.name for part in args.only)]
    if args.plans:
        for row in plans(cases, sizes, args.steps):
            print(row, flush=True)
        return
    if not HAS_GPU and not args.small:
        raise SystemExit("no GPU was found; --small runs the same code on a small model, --plans trains nothing")
    print("\n" + "\n".join(report(args, cases, sizes)))


if __name__ == "__main__":
    main()
