"""CPU time of encoding alone, compared with `datasets.map` and its mask of the assistant's tokens.

    python bench/encoding.py [--rows 20000] [--repeat 3] [--model models/SmolLM2-135M-Instruct]

Both sides start from rows on disk in their own format (a row store, an Arrow file), use the same tokenizer, chat
template (with generation marks) and number of processes, and end with token ids and a mask on disk. Ours also
compares what each row says with its text, and with the proof derives the mask of a sample a second time. What
counts is the CPU seconds of the process tree within that step, not of start-up or of reading the
source file. The sides take turns; the ratio is that of their medians. Needs `pip install datasets`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.data import make_rows  # noqa: E402

PEER, ALONE, PROVEN = "datasets.map, in batches", "encoding", "encoding, with the proof of the mask"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cpu_seconds() -> float:
    """Of this process and the children that it has waited for."""
    return sum(os.times()[:4])


def encode(file: Path, model: str, folder: Path, processes: int, proven: bool) -> float:
    """The CPU seconds in which we encode a file of chat rows."""
    from src.data.chat import ChatTokenizer
    from src.data.contamination import EvaluationRows
    from src.data.encode import EncodingOptions
    from src.data.loader import load_rows
    from src.data.sources import fetch_parts
    from src.data.tokens import np, rows_to_verify, write_tokens
    from src.schema import TrainDataArgs

    parts = fetch_parts(TrainDataArgs(dataset_path=str(file)), folder)
    store = load_rows(parts, EvaluationRows([], 0.8), 0.8, folder, processes)
    chat = ChatTokenizer(tokenizer_of(model))
    rows = len(store)
    verified = rows_to_verify(rows, every=False, seed=1) if proven else np.zeros(rows, bool)
    before = cpu_seconds()
    stats, examples = write_tokens(
        folder, store, np.arange(rows), chat, EncodingOptions(4096), verified, processes
    )
    used = cpu_seconds() - before
    assert len(examples) == rows and stats.mask["agrees"] == verified.sum(), stats.mask
    return used


def map_rows(file: Path, model: str, folder: Path, processes: int) -> float:
    """The CPU seconds of `datasets.map` for a file of chat rows."""
    from datasets import load_dataset

    tokenizer = tokenizer_of(model)

    def batch(rows):  # type: ignore[no-untyped-def]
        return tokenizer.apply_chat_template(
            rows["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )

    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "datasets"))
    before = cpu_seconds()
    done = rows.map(
        batch, batched=True, num_proc=processes, remove_columns=rows.column_names, load_from_cache_file=False
    )
    used = cpu_seconds() - before
    assert len(done) == len(rows) and sum(done[0]["assistant_masks"])
    return used


def tokenizer_of(model: str):  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / model)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def compare(file: Path, rows: int, model: str, folder: Path, processes: int = 2, repeat: int = 3) -> None:
    """Measure each side `repeat` times in turn, each time in a new process, and print medians and ratios."""
    found: dict[str, list[float]] = {}
    for _ in range(repeat):
        for side in (PEER, ALONE, PROVEN):
            with tempfile.TemporaryDirectory(dir=folder) as own:
                kept = Path(own) if side == PEER else folder / "ours"  # the row store is made once
                kept.mkdir(exist_ok=True)
                found.setdefault(side, []).append(_in_new_process(side, file, model, kept, processes))
    peer = median(found[PEER])
    for side, seconds in found.items():
        each = ", ".join(f"{one:.1f}" for one in sorted(seconds))
        used = median(seconds)
        print(
            f"{side:<40} {used:7.1f} CPU s  {used / rows * 1e6:6.0f} us a row  {used / peer:5.2f} x  ({each})",
            flush=True,
        )


def _in_new_process(side: str, file: Path, model: str, folder: Path, processes: int) -> float:
    words = [sys.executable, __file__, "--measure", json.dumps([side, str(file), model, str(folder), processes])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(done.stdout.split()[-1])


def measure(side: str, file: str, model: str, folder: str, processes: int) -> float:
    if side == PEER:
        return map_rows(Path(file), model, Path(folder), processes)
    return encode(Path(file), model, Path(folder), processes, side == PROVEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(*json.loads(args.measure)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.jsonl"
        make_rows(file, args.rows)
        print(f"{args.rows:,} rows, num_proc={args.processes}, {args.repeat} times", flush=True)
        compare(file, args.rows, args.model, Path(scratch), args.processes, args.repeat)


if __name__ == "__main__":
    main()
