"""Checkpoints: complete or not there. A folder takes its name only when all in it is written and hashed."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.errors import RunError
from src.utils.files import disk_errors, read_json, sha256, write_json
from src.utils.logs import log

COMPLETE = "COMPLETE"  # written last, with the hash of every other file
STATE, RNG, PROGRESS = "trainer_state.json", "rng_state.pt", "progress.json"
NEVER_READ = "training_args.bin"  # a pickle of the settings, unredacted


@contextmanager
def sealed(target: Path, world: int = 1, writes: bool = True) -> Iterator[Path]:
    """A folder to fill, by every device, which becomes the checkpoint `target` at one stroke."""
    temporary = target.with_name(f".{target.name}.tmp")
    if writes:
        with disk_errors(target):
            for left in target.parent.glob(".*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
    _wait(world)
    with disk_errors(target):
        yield temporary
        _wait(world)
        if writes:
            _seal(temporary)
            if target.exists():  # made by the attempt that this one resumes
                shutil.rmtree(target)
            temporary.rename(target)
    _wait(world)


def _seal(folder: Path) -> None:
    (folder / NEVER_READ).unlink(missing_ok=True)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    write_json(folder / COMPLETE, {"files": {str(p.relative_to(folder)): sha256(p) for p in files}})


def _wait(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is what its marker says."""
    try:
        files = read_json(folder / COMPLETE)["files"]
        return all(sha256(folder / name) == digest for name, digest in files.items())
    except (RunError, OSError, KeyError, TypeError):
        return False


def step_of(folder: Path) -> int:
    """The step of `checkpoint-STEP`, -1 for any other name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first."""
    found = [p for p in folder.glob("checkpoint-*") if step_of(p) >= 0]
    return sorted(found, key=step_of, reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; a damaged one is passed over, which is said."""
    for found in all_of(folder):
        if is_whole(found):
            return found
        log.warning("%s is damaged and passed over", found)
    return None


def rotate(folder: Path, limit: int, best_step: int | None) -> None:
    """Remove all but the newest `limit` checkpoints and the best."""
    for old in all_of(folder)[limit:]:
        if step_of(old) != best_step:
            (old / COMPLETE).unlink(missing_ok=True)  # half removed, it is not taken for a whole one
            shutil.rmtree(old, ignore_errors=True)


def save_progress(folder: Path, seconds: float) -> None:
    write_json(folder / PROGRESS, {"seconds": seconds})


def save_rng(path: Path, world: int, writes: bool) -> None:
    """The states of all random number generators, of every device, in one file."""
    mine: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [np.random.get_state()[1].tolist(), *np.random.get_state()[2:]],  # type: ignore[index]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    states = [mine]
    if world > 1:
        states = [{}] * world
        torch.distributed.all_gather_object(states, mine)
    if writes:
        torch.save(states, path)


def load_rng(path: Path, rank: int) -> None:
    """Set the generators to what they were when the checkpoint was made."""
    state = torch.load(path, weights_only=True)[rank]
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
