"""Runs killed at random moments, compared with undisturbed runs: `python bench/resume.py [KILLS] [SEED]`.

A run is killed (SIGKILL, from outside) up to three times in a row before it may finish. Its adapter, sample log,
curves and metrics must then equal those of the undisturbed run. Half of the kills come at a random moment, half
right after the start of a chosen part, so that short parts are hit as well. Linux; a few minutes on two cores.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.runs import Run, training_runs  # noqa: E402
from src.utils.files import sha256  # noqa: E402
from tests.fixtures import ANSWER, TRAINED_ON, chat, curves, jsonl  # noqa: E402
from tests.fork_server import KillPoint, at, ended, fork, warm  # noqa: E402

SETTINGS = {
    "accumulated": ["batch_size=2", "gradient_accumulation_steps=2", "epochs=3", "save_steps=3", "eval_steps=2"],
    "packed": ["packing=true", "max_length=96", "batch_size=1", "epochs=2.5", "save_steps=2", "eval_epochs=0.5"],
    "best": ["batch_size=4", "epochs=4", "load_best_model_at_end=true", "lr=0.03", "save_total_limit=1",
             "early_stopping_patience=3", "eval_steps=2", "method=dora"],
    "padded, full": ["method=full", "padding_free=false", "batch_size=3", "epochs=2", "save_steps=1",
                     "neftune_noise_alpha=5"],
}  # fmt: skip
COMMON = ["lora_dropout=0.2", "deterministic=true", "logging_steps=2", "lr=0.003", "lora_r=8", "bf16=false",
          "cuda_visible_devices=''"]  # fmt: skip
FIT, CHECKPOINT = "src.train.fit", "src.train.checkpoint"
PARTS = {
    "step": f"{FIT}:AssayTrainer.compute_loss",
    "batches": f"{FIT}:AssayTrainer.get_batch_samples",
    "evaluation": f"{FIT}:AssayTrainer.evaluate",
    "checkpoint": f"{FIT}:AssayTrainer._save_checkpoint",
    "sealing": f"{CHECKPOINT}:_seal",
    "rotation": f"{CHECKPOINT}:rotate",
    "resuming": f"{FIT}:AssayTrainer._load_rng_state",
    "model": "src.train.pipeline:save_model",
}
NAMES = ["start", *PARTS]
IN_A_ROW = 3


def report_parts(pipe: int) -> None:
    """Make each part of a run write its number to `pipe` when it starts."""
    for number, function in enumerate(PARTS.values(), 1):
        at(KillPoint(function, 0), lambda number=number: os.write(pipe, bytes([number])))


def train_and_kill(words: list[str], log: Path, part: int | None, delay: float) -> tuple[int, str]:
    """Train, and kill the process `delay` seconds after its start, or after the start of a `part`.

    Returns: its exit code, and the part that was running.
    """
    reader, writer = os.pipe()
    pid = fork(words, log, lambda: report_parts(writer))
    os.close(writer)
    now, deadline = 0, time.monotonic() + delay if part is None else float("inf")
    while time.monotonic() < deadline:
        ready = select.select([reader], [], [], min(1e6, max(0.0, deadline - time.monotonic())))[0]
        if ready and not (seen := os.read(reader, 1)):
            break  # it has ended
        elif ready:
            now = seen[0]
            deadline = min(deadline, time.monotonic() + delay) if now == part else deadline
    os.kill(pid, signal.SIGKILL)
    os.close(reader)
    return ended(pid), NAMES[now]


def result(run: Run) -> dict[str, Any]:
    """What must equal that of an undisturbed run."""
    figures = json.loads((run.path / "metrics.json").read_text())["train"]
    shown = curves(run)
    return {
        "weights": sha256(next(run.model.glob("*.safetensors"))),
        "rows": (run.logs / "samples.jsonl").read_text(),
        "figures": {key: value for key, value in figures.items() if key != "seconds"},
        "curves": {tag: [s if "second" in tag else (s, v) for s, v in of] for tag, of in shown.items()},
    }


def prepare(folder: Path) -> list[str]:
    """A tiny model, made in a child process, and its data."""
    if not (pid := os.fork()):
        from scripts.tiny_model import build

        root = Path(__file__).resolve().parents[1]
        build(folder / "tiny", (root / "data" / "ingot.jsonl").read_text(encoding="utf-8").splitlines())
        os._exit(0)
    assert ended(pid) == 0
    jsonl(folder / "data" / "train.jsonl", (chat(f"Top of {name}?", ANSWER) for name in TRAINED_ON))
    rows = [{"prompt": f"Top of ash {n}?", "completion": ANSWER} for n in ("rate", "temp", "load", "flow")]
    jsonl(folder / "eval" / "dev.jsonl", rows)
    return [f"model_name={folder / 'tiny'}", f"dataset_path={folder / 'data'}", f"eval_path={folder / 'eval'}"]


def main(kills: int, seed: int) -> int:
    draw, done, wrong = random.Random(seed), 0, 0
    folder = Path(tempfile.mkdtemp(prefix="assay-resume-"))
    warm()
    common = ["train", *COMMON, *prepare(folder)]
    expected, lasts = {}, {}
    for name, words in SETTINGS.items():
        out = folder / "alone" / name.replace(", ", "-")
        before = time.monotonic()
        assert ended(fork([*common, *words, f"output_dir={out}"], folder / "log.txt")) == 0
        lasts[name] = time.monotonic() - before
        expected[name] = result(training_runs(out)[0])
    print(
        f"{'kill':>4}  {'settings':<13} {'during':<11} {'killed after':<22} {'then resumed':<26} end", flush=True
    )
    kills_by_part: Counter[str] = Counter()
    number, same = 0, 0
    while done < kills:
        name = list(SETTINGS)[number % len(SETTINGS)]
        number += 1
        out, log, moment, rows = folder / f"killed-{number}", folder / "log.txt", "", []
        words = [*common, *SETTINGS[name], f"output_dir={out}"]
        while True:
            more = done < kills and len(rows) < IN_A_ROW
            part = draw.choice([None, draw.randrange(1, len(NAMES))]) if more else 0
            delay = draw.uniform(0, lasts[name]) if part is None else draw.uniform(0, 0.05)
            code, where = train_and_kill(words, log, part, delay)
            text = log.read_text()
            if rows and where == "start" and code and "resuming" not in text:
                rows[-1].append("killed before that")
            elif rows:
                rows[-1] += [line.split("resuming ")[1].split(",")[0] for line in text.splitlines()
                             if "resuming after" in line][:1] or ["from the start"]  # fmt: skip
            if code == 0:
                break
            assert code == -signal.SIGKILL, text
            moment = f"{delay:.3f} s of {'its start' if part is None else NAMES[part]}"
            done += 1
            kills_by_part[where] += 1
            rows.append([done, name, where, moment])
        runs = training_runs(out)
        equal = len(runs) == 1 and result(runs[0]) == expected[name]
        wrong, same = wrong + (not equal), same + equal
        for row in rows:
            end = ("identical" if equal else "DIFFERS") if row is rows[-1] else "killed again"
            print(f"{row[0]:>4}  {row[1]:<13} {row[2]:<11} {row[3]:<22} {row[4]:<26} {end}", flush=True)
        shutil.rmtree(out)
    print(f"{done} kills in {number} runs: {same} ended identically, {wrong} did not; "
          + ", ".join(f"{k} {v}" for k, v in kills_by_part.most_common()))  # fmt: skip
    shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*(numbers + [50, 1][len(numbers) :])))
