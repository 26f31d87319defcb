"""Throughput and memory of checking, tokenizing and caching training data, compared with `datasets.map`.

    python bench/data.py [--rows 1000000] [--model models/SmolLM2-135M-Instruct]

Writes a seeded file of chat rows of about 100 tokens and runs check-data on it in a separate process. Then runs
`datasets.map` with the same tokenizer in three ways: one row at a time as in its documentation, in batches, and in
batches on every core. `datasets.map` only renders and tokenizes; check-data also finds duplicates and
contamination, computes the loss mask and verifies a sample of it. Needs `pip install datasets`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.utils.workers import cores  # noqa: E402

OURS = "src.main check-data"
DATASETS_MAP = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer
file, model, cache, batched, processes = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
def row(r):
    return tokenizer.apply_chat_template(r["messages"], tokenize=True, return_dict=True)
def batch(b):
    texts = tokenizer.apply_chat_template(b["messages"], tokenize=False)
    return tokenizer(texts, add_special_tokens=False)
rows = load_dataset("json", data_files=file, split="train", cache_dir=cache)
done = rows.map(batch if batched == "1" else row, batched=batched == "1", num_proc=int(processes) or None,
                remove_columns=rows.column_names)
assert len(done) == len(rows)
"""


def make_rows(file: Path, count: int) -> None:
    """Write `count` rows of words with the frequencies of natural language (Zipf's law)."""
    rng = random.Random(7)
    demo = (ROOT / "data" / "ingot.jsonl").read_text(encoding="utf-8").split()
    plain = sorted({w.strip('",.:{}[]').lower() for w in demo if w.strip('",.:{}[]').isalpha()})
    words = plain + [w + end for w in plain for end in ("s", "ed", "ing", "er", "ly")]
    weights = [1 / (rank + 3) for rank in range(len(words))]

    def text() -> str:
        return " ".join([*rng.choices(words, weights, k=27), str(rng.randrange(10**6))])

    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            turns = [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
            out.write(json.dumps({"messages": turns}) + "\n")


def measure(words: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory in GiB (PSS of the process tree) of a command."""
    peak = 0
    start = time.perf_counter()
    before = os.times()
    with subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    ) as child:

        def watch() -> None:
            nonlocal peak
            while child.poll() is None:
                peak = max(peak, memory(child.pid))
                time.sleep(0.5)

        thread = threading.Thread(target=watch)
        thread.start()
        child.wait()
        thread.join()
    after = os.times()
    if child.returncode:
        raise SystemExit(f"{words[:4]} failed with exit code {child.returncode}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, used, peak / 2**30


def memory(pid: int) -> int:
    """Bytes that a process and its children use; shared memory counts once (PSS)."""
    total = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--dir", type=Path, help="where files are written (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        file, folder = Path(scratch) / "rows.jsonl", Path(scratch)
        make_rows(file, args.rows)
        print(f"{args.rows:,} rows, {file.stat().st_size / 2**20:,.0f} MiB, {cores()} cores", flush=True)
        ours = [sys.executable, "-m", *OURS.split(), f"dataset_path={file}", f"model_name={args.model}"]
        ours += [f"output_dir={folder / 'ours'}", "on_bad_row=skip"]
        report("check-data, first time", ours, args.rows)
        report("check-data, from its cache", ours, args.rows)
        for title, batched, processes in (
            ("datasets.map, a row at a time", 0, 0),
            ("datasets.map, in batches", 1, 0),
            (f"datasets.map, in batches, num_proc={cores()}", 1, cores()),
        ):
            with tempfile.TemporaryDirectory(dir=scratch) as cache:
                words = [
                    sys.executable,
                    "-c",
                    DATASETS_MAP,
                    str(file),
                    args.model,
                    cache,
                    str(batched),
                    str(processes),
                ]
                report(title, words, args.rows)


def report(title: str, words: list[str], rows: int) -> None:
    wall, used, peak = measure(words)
    print(f"{title:<40} {wall:7.1f} s  {rows / wall:9,.0f} rows/s  {used:7.1f} CPU s  {peak:5.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
