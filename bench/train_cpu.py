"""Cost of training on a CPU, compared with `trl sft`: the same model, rows, batches and LoRA, one after the other.

    python bench/train_cpu.py [--rows 2000] [--dropout 0.05]

CPU seconds are those of the complete process, start and imports included; one thread for both. The start varies by
5 %, so its figure is the median of five alternating runs. trl has a separate virtual environment (created once, in
.bench/). Its default is gradient checkpointing; a run without it is shown as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.cost import Cost, cost  # noqa: E402

TRL = "trl==1.16.0"
VENV = ROOT / ".bench" / "trl"
TARGETS = {"start (1 step)": 0.4, "50 steps": 0.36, "full epoch": 0.38}
RSS_TARGET = 0.5


def rows(count: int) -> list[tuple[str, str]]:
    """Prompts and answers of 100 tokens on average, of very different lengths (log-normal)."""
    draw = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = ["".join(draw.choice(letters, draw.integers(2, 8))) for _ in range(3500)]

    def text(length: int) -> str:
        return " ".join(words[i % 3500] for i in draw.zipf(1.2, length))

    prompt_lengths = draw.lognormal(3.6, 0.6, count).clip(5, 200).astype(int)
    answer_lengths = draw.lognormal(3.0, 0.7, count).clip(3, 150).astype(int)
    return [
        (f"{text(a)} {i}", text(b)) for i, (a, b) in enumerate(zip(prompt_lengths, answer_lengths, strict=True))
    ]


def build_model(folder: Path, texts: list[str]) -> None:
    """A Llama of 4.2 million parameters with a tokenizer of 4,096 tokens, in bfloat16."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from scripts.tiny_model import CHAT_TEMPLATE

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[2])
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=0, bos_token_id=None,
        )
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(folder: Path, count: int) -> None:
    """The model, and the rows in the format that each program reads."""
    pairs = rows(count)
    build_model(folder / "model", [text for pair in pairs for text in pair])
    for name in ("ours", "trl"):
        (folder / name).mkdir()
    with (folder / "ours" / "train.jsonl").open("w") as ours, (folder / "trl" / "train.jsonl").open("w") as theirs:
        for prompt, answer in pairs:
            request, reply = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
            ours.write(json.dumps({"messages": [request, reply]}) + "\n")
            theirs.write(json.dumps({"prompt": [request], "completion": [reply]}) + "\n")


def install_trl() -> Path:
    """The trl command of the separate environment, with the versions that this project pins."""
    command = VENV / "bin" / "trl"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
        shared = [p for p in pins if p.split("==")[0] in {"transformers", "peft", "accelerate", "numpy"}]
        torch = [p for p in pins if p.startswith("torch==")]
        for packages in (torch, [TRL, *shared]):
            subprocess.run([VENV / "bin" / "pip", "install", "-q", *packages], check=True)
    return command


def ours(folder: Path, steps: int | None, dropout: float) -> list[str]:
    settings = {
        "model_name": folder / "model", "dataset_path": folder / "ours", "eval_path": "none",
        "output_dir": folder / "outputs", "resume": "never", "epochs": 1, "batch_size": 8, "lr": 1e-3,
        "max_length": 512, "lora_r": 16, "lora_alpha": 32, "lora_dropout": dropout, "lora_target_modules": "null",
        "logging_steps": 10, "max_steps": steps or "null",
    }  # fmt: skip
    return [sys.executable, "-m", "src.main", "train", *(f"{k}={v}" for k, v in settings.items())]


def theirs(folder: Path, trl: Path, steps: int | None, dropout: float, checkpointing: bool) -> list[str]:
    settings = {
        "model_name_or_path": folder / "model", "dataset_name": folder / "trl", "output_dir": folder / "trl-out",
        "num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_length": 512,
        "lora_r": 16, "lora_alpha": 32, "lora_dropout": dropout, "lora_target_modules": "all-linear",
        "report_to": "none", "max_steps": steps or -1, "gradient_checkpointing": checkpointing,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [str(trl), "sft", "--use_peft", "--use_cpu", *words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout of both")
    args = parser.parse_args()
    trl = install_trl()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    print(f"{args.rows} rows, LoRA r16 on all linear layers, dropout {args.dropout:g}, batch 8, one thread\n")
    print(f"{'':<16}{'CPU s':>20}{'ratio':>8}{'target':>8}{'wall s':>16}{'peak MB':>16}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.rows)
        cost(ours(folder, 1, args.dropout), folder)  # warm-up: page cache, cached tokens
        cost(theirs(folder, trl, 1, args.dropout, True), folder)
        for what, steps, times in (("start (1 step)", 1, 5), ("50 steps", 50, 1), ("full epoch", None, 1)):
            us, them = medians(
                ours(folder, steps, args.dropout), theirs(folder, trl, steps, args.dropout, True), times, folder
            )
            show(what, us, them, TARGETS[what])
        them = cost(theirs(folder, trl, None, args.dropout, False), folder)
        show("  without g.c.", us, them, None)


def medians(one: list[str], other: list[str], times: int, folder: Path) -> list[Cost]:
    """The costs of two commands, run in turn `times` times: of each the run with the median of CPU seconds."""
    costs = [(cost(one, folder), cost(other, folder)) for _ in range(times)]
    return [sorted(of)[times // 2] for of in zip(*costs, strict=True)]


def show(what: str, us: Cost, them: Cost, target: float | None) -> None:
    wanted = f"{target:.2f}" if target else ""
    cpu, wall, rss = (f"{u:.1f} / {t:.1f}" for u, t in zip(us, them, strict=True))
    print(f"{what:<16}{cpu:>20}{us.cpu / them.cpu:>8.3f}{wanted:>8}{wall:>16}{rss:>16}{us.rss / them.rss:>8.3f}")


if __name__ == "__main__":
    main()
