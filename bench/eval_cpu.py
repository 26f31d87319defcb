"""Cost of an evaluation on a CPU, compared with LLaMA-Factory's predict and with one prompt at a time.

    python bench/eval_cpu.py [--prompts 200] [--real-prompts 64]

The first table: CPU seconds of complete processes, start and imports included, one thread each, the same
prompts, the same tiny model, 64 new tokens for every prompt (the model's settings forbid an earlier end, so
that both do the same work). LLaMA-Factory has a separate environment (created once, in .bench/); it runs with
its default batch size, and again with ours. Its package requires torchaudio, which has no build for this torch;
an empty module replaces it, because text needs none.

The second: SmolLM2-135M, our batches compared with one prompt at a time, in the precision of bf16=auto; the
time of the generation alone, which metrics.json records, and the CPU seconds of the complete process less its
start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.cost import Cost, cost  # noqa: E402

FACTORY = ["llamafactory==0.9.5", "torchvision==0.28.0", "jieba==0.42.1", "nltk==3.10.4", "rouge-chinese==1.0.3"]
VENV = ROOT / ".bench" / "llamafactory"
TOKENS = 64
TARGET, FASTER = 0.65, 5.0


def requests(count: int) -> list[tuple[str, str]]:
    """The first rows of the demo's data, prompt and answer."""
    lines = (ROOT / "data" / "ingot.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    turns = [{m["role"]: m["content"] for m in json.loads(line)["messages"]} for line in lines]
    return [(turn["user"], turn["assistant"]) for turn in turns]


def prepare(folder: Path, count: int) -> None:
    """The tiny model, which always generates TOKENS tokens, and the rows in the format that each program reads."""
    from scripts.tiny_model import build

    build(folder / "model", (ROOT / "data" / "ingot.jsonl").read_text(encoding="utf-8").splitlines())
    settings = folder / "model" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"min_new_tokens": TOKENS}))
    (folder / "ours").mkdir()
    (folder / "theirs").mkdir()
    pairs = requests(count)
    with (folder / "ours" / "test.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs)
    rows = [{"instruction": p, "input": "", "output": c} for p, c in pairs]
    (folder / "theirs" / "rows.json").write_text(json.dumps(rows))
    (folder / "theirs" / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))


def install_factory() -> Path:
    """LLaMA-Factory's command, in its own environment with our version of torch."""
    command = VENV / "bin" / "llamafactory-cli"
    if not (VENV / "ready").exists():
        pip = [str(VENV / "bin" / "pip")]
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        torch = f"torch=={version('torch').partition('+')[0]}"
        subprocess.run([*pip, "install", "-q", torch], check=True)
        subprocess.run([*pip, "install", "-q", torch, *FACTORY], check=True)
        subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio"], check=True)
        (next(VENV.glob("lib/python*/site-packages")) / "torchaudio.py").write_text("")
        (VENV / "ready").touch()
    return command


def ours(folder: Path, model: Path, **settings: Any) -> list[str]:
    settings = {
        "model_name": model, "eval_path": folder / "ours", "splits": "[test]", "output_dir": folder / "outputs",
        "artifacts_dir": folder / "artifacts", "max_new_tokens": TOKENS, "cuda_visible_devices": "''",
        "overwrite_answers": True,
    } | settings  # fmt: skip
    words = (f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in settings.items())
    return [sys.executable, "-m", "src.main", "eval-baseline", *words]


def theirs(folder: Path, command: Path, batch_size: int) -> list[str]:
    settings = {
        "stage": "sft", "do_predict": True, "predict_with_generate": True, "model_name_or_path": folder / "model",
        "dataset_dir": folder / "theirs", "eval_dataset": "rows", "template": "empty", "finetuning_type": "full",
        "output_dir": folder / "predicted", "max_new_tokens": TOKENS, "do_sample": False,
        "per_device_eval_batch_size": batch_size, "report_to": "none", "overwrite_cache": True, "use_cpu": True,
        "infer_dtype": "bfloat16", "bf16_full_eval": True,
    }  # fmt: skip
    return [str(command), "train", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def compare_with_factory(folder: Path, count: int) -> None:
    command = install_factory()
    prepare(folder, count)
    cost(ours(folder, folder / "model", max_examples=1), folder)  # warm-up: page cache
    us = cost(ours(folder, folder / "model"), folder)
    check(folder, count)
    print(f"{count} prompts x {TOKENS} tokens, tiny model, one thread{'':<9}CPU s{'':>9}ratio   wall s")
    print(f"{'ours':<44}{us.cpu:>14.1f}{'':>14}{us.wall:>9.1f}")
    for batch_size, what in (
        (8, "LLaMA-Factory 0.9.5, its batch size, 8"),
        (64, "LLaMA-Factory 0.9.5, batch size 64"),
    ):
        them = cost(theirs(folder, command, batch_size), folder)
        wanted = f"(<= {TARGET})" if batch_size == 8 else ""
        print(f"{what:<44}{them.cpu:>14.1f}{us.cpu / them.cpu:>14.3f}{them.wall:>9.1f}  {wanted}")


def newest(folder: Path) -> Path:
    """The newest result."""
    return max((folder / "artifacts" / "metrics").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def check(folder: Path, count: int) -> None:
    """Raises: SystemExit unless each prompt has TOKENS new tokens."""
    path = newest(folder) / "test.predictions.jsonl"
    counts = [json.loads(line)["tokens"] for line in path.read_text().splitlines()]
    if counts != [TOKENS] * count:
        raise SystemExit(f"not {count} answers of {TOKENS} tokens: {counts}")


def compare_with_batch_size_1(folder: Path, count: int) -> None:
    model = ROOT / "models" / "SmolLM2-135M-Instruct"
    more = {"generation.min_new_tokens": TOKENS, "metrics": "[exact_match]"}
    start = cost(ours(folder, model, max_examples=1, eval_batch_size=2, max_new_tokens=1, metrics="[exact_match]"),
                 folder)  # fmt: skip
    found = {}
    for size in ("auto", 1):
        spent = cost(ours(folder, model, eval_batch_size=size, max_examples=count, **more), folder)
        generated = json.loads((newest(folder) / "metrics.json").read_text())["generated"]
        found[size] = Cost(spent.cpu - start.cpu, generated["seconds"])
    print(f"\nSmolLM2-135M, {count} prompts x {TOKENS} tokens, one thread{'':<5}CPU s   wall s")
    for size, each in found.items():
        print(f"{f'eval_batch_size={size}':<40}{each.cpu:>14.1f}{each.wall:>9.1f}")
    cpu, wall = (one / batch for one, batch in zip(found[1], found["auto"], strict=True))
    print(f"{'times faster':<40}{cpu:>14.1f}{wall:>9.1f}  (>= {FASTER:g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--real-prompts", type=int, default=64)
    args = parser.parse_args()
    shown = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    load = os.getloadavg()[0]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, {date.today()}")
    print(f"Python {sys.version.split()[0]}, {shown}\n")
    with tempfile.TemporaryDirectory() as name:
        compare_with_factory(Path(name), args.prompts)
        compare_with_batch_size_1(Path(name), args.real_prompts)


if __name__ == "__main__":
    main()
