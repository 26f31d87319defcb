"""Planned and measured peak memory of training: `python bench/plan_memory.py`.

Each case trains for a few steps in a separate process on rows of a given length. On a CPU the peak is Linux's
VmHWM, on a GPU `torch.cuda.max_memory_allocated`, and the plan is taken without the CUDA context, which PyTorch
does not count. `--cases smollm2` uses the demo's model, `tiny` the random one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2, TINY = "models/SmolLM2-135M-Instruct", "models/tiny-random-llama"

WORDS = ["ore", "ash", "mill", "feed", "kiln", "tank", "rate", "flow"]
CONTEXT = 500_000_000  # src.train.plan.memory.CUDA_CONTEXT

CHILD = """
import os, sys
from src.main import main
code = main(sys.argv[1:])
import torch
if torch.cuda.is_initialized():
    peak = torch.cuda.max_memory_allocated()
else:
    peak = 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
print("peak", peak, flush=True)
os._exit(code)
"""


class Case(NamedTuple):
    """A model, the approximate number of words per row, and the settings of the run."""

    model: str
    words: int
    settings: tuple[str, ...]


class Result(NamedTuple):
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1


def case(model: str, words: int, batch_size: int, *settings: str) -> Case:
    return Case(model, words, (f"batch_size={batch_size}", *settings))


CASES = {
    "smollm2": [
        case(SMOLLM2, 100, 4, "method=lora", "gradient_checkpointing=false"),
        case(SMOLLM2, 200, 8, "method=lora", "gradient_checkpointing=false"),
        case(SMOLLM2, 200, 8, "method=lora", "gradient_checkpointing=true"),
        case(SMOLLM2, 200, 8, "method=lora", "gradient_checkpointing=false", "lora_dropout=0.05"),
        case(SMOLLM2, 100, 4, "method=full", "gradient_checkpointing=false"),
        case(SMOLLM2, 200, 8, "method=full", "gradient_checkpointing=true"),
        case(SMOLLM2, 100, 4, "method=qlora", "gradient_checkpointing=false"),
        case(SMOLLM2, 200, 8, "method=qlora", "gradient_checkpointing=true"),
        case(SMOLLM2, 100, 4, "method=lora", "bf16=false", "gradient_checkpointing=false"),
    ],
    "tiny": [
        case(TINY, 100, 4, "method=lora"),
        case(TINY, 200, 16, "method=full"),
        case(TINY, 200, 16, "method=lora", "gradient_checkpointing=true"),
    ],
}


def measure_peak(case: Case, folder: Path, steps: int = 4) -> Result:
    """Train in a separate process. Returns: the planned and the measured peak."""
    draw = random.Random(0)
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(64):
            prompt, answer = (
                " ".join(draw.choices(WORDS, k=round(case.words / 2 * f)))
                for f in (draw.uniform(0.7, 1), draw.uniform(0.7, 1))
            )
            turns = [{"role": "user", "content": f"{number} {prompt}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    words = [
        f"model_name={case.model}", f"dataset_path={rows}", "max_length=2048", f"max_steps={steps}",
        "resume=never", f"output_dir={folder / 'outputs'}", "eval_path=none", *case.settings,
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "train", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    peak = int(done.stdout.rsplit("peak ", 1)[1])
    plan = json.loads((folder / "outputs/runs/latest/manifest.json").read_text())["plan"]
    predicted = plan["memory"]["peak"] - (CONTEXT if plan["device"] == "cuda" else 0)
    return Result(predicted, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", choices=[*CASES, "all"], default="all")
    chosen = parser.parse_args().cases
    cases = [c for name, of in CASES.items() if chosen in (name, "all") for c in of]
    print(f"{'model':<22} {'words':>5}  {'predicted':>9} {'measured':>9} {'error':>7}  settings")
    for each in cases:
        with tempfile.TemporaryDirectory() as folder:
            found = measure_peak(each, Path(folder))
        sizes = f"{found.predicted / 1e9:>6.2f} GB {found.measured / 1e9:>6.2f} GB {found.error:>+7.1%}"
        print(f"{Path(each.model).name:<22} {each.words:>5}  {sizes}  {' '.join(each.settings)}", flush=True)


if __name__ == "__main__":
    main()
