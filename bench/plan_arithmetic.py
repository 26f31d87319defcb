"""How far the arithmetic of a plan is from its simulation: `python bench/plan_arithmetic.py`.

Both estimate the peak without the fixed part, from config.json alone. The configs have the sizes of the classes of
transformers, or those given here.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.data.store import Example
from src.model.source import Source
from src.model.tokenizer import load_tokenizer
from src.schema import TrainConfig
from src.train.plan.arithmetic import ArithmeticEstimator
from src.train.plan.estimate import MemoryEstimator

MODELS = {
    "gpt2": transformers.GPT2Config(),
    "qwen2 0.5B": transformers.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "llama 1B": transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_key_value_heads=8, vocab_size=128_256
    ),
}  # fmt: skip
FOLDERS = ("models/tiny-random-llama", "models/SmolLM2-135M-Instruct")
SETTINGS = ({}, {"gradient_checkpointing": True}, {"method": "full"}, {"method": "qlora"},
            {"method": "full", "optim": "adafactor"}, {"padding_free": False})  # fmt: skip
ROWS = [
    Example([1] * n, [False] * (n // 2) + [True] * (n - n // 2)) for n in (512, 300, 200, 700) for _ in range(4)
]


def compare(folder: str, device: str, dtype: str, cache: str, settings: dict) -> float:  # type: ignore[type-arg]
    """The relative difference of the two peaks."""
    cfg = TrainConfig(batch_size=4, cache_dir=cache, **settings)
    tokenizer = load_tokenizer(FOLDERS[0])
    peaks = [
        kind(Source(folder, Path(folder), None), ROWS, ROWS[:4], dtype, device, tokenizer, fixed=0)
        .memory(cfg, cfg.gradient_checkpointing is True).peak
        for kind in (ArithmeticEstimator, MemoryEstimator)
    ]  # fmt: skip
    return peaks[0] / peaks[1] - 1


def _folders(into: Path) -> Iterator[tuple[str, str]]:
    yield from zip(FOLDERS, FOLDERS, strict=True)
    for name, config in MODELS.items():
        config.save_pretrained(into / name)
        yield name, str(into / name)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for name, folder in _folders(Path(temporary)):
            for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
                found = [compare(folder, device, dtype, temporary + "/cache", dict(s)) for s in SETTINGS]
                print(f"{name:<30} {device:<4} {dtype:<8}", *(f"{each:>+5.0%}" for each in found), flush=True)
    for number, settings in enumerate(SETTINGS):
        print(number, settings)


if __name__ == "__main__":
    main()
