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
UNREDACTED_PICKLE = "training_args.bin"  # a pickle of the settings, unredacted


@contextmanager
def atomic_checkpoint(target: Path, world: int = 1, writes: bool = True) -> Iterator[Path]:
    """A folder to fill, by every device, which becomes the checkpoint `target` at one stroke."""
    temporary = target.with_name(f".{target.name}.tmp")
    if writes:
        with disk_errors(target):
            for left in target.parent.glob(".*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
    _barrier(world)
    with disk_errors(target):
        yield temporary
        _barrier(world)
        if writes:
            _seal(temporary)
            if target.exists():  # made by the attempt that this one resumes
                shutil.rmtree(target)
            temporary.rename(target)
    _barrier(world)


def _seal(folder: Path) -> None:
    (folder / UNREDACTED_PICKLE).unlink(missing_ok=True)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    write_json(folder / COMPLETE, {"files": {str(p.relative_to(folder)): sha256(p) for p in files}})


def _barrier(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint is what its marker says."""
    try:
        files = read_json(folder / COMPLETE)["files"]
        return all(sha256(folder / name) == digest for name, digest in files.items())
    except (RunError, OSError, KeyError, TypeError):
        return False


def step_number(folder: Path) -> int:
    """The step of `checkpoint-STEP`, -1 for any other name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first."""
    found = [p for p in folder.glob("checkpoint-*") if step_number(p) >= 0]
    return sorted(found, key=step_number, reverse=True)


def find_newest(folder: Path, with_best: bool = False, until: int | None = None) -> Path | None:
    """The newest whole checkpoint in `folder`; a damaged one is passed over, which is said.

    Args:
        with_best: whether it needs the checkpoint of the best step so far as well.
        until: only checkpoints of this step or before it.
    """
    for found in list_checkpoints(folder):
        if until is not None and step_number(found) > until:
            continue
        if not is_complete(found):
            log.warning("%s is damaged and passed over", found)
        elif with_best and not _best_is_complete(found):
            log.warning("%s is passed over: the checkpoint of its best step is damaged or missing", found)
        else:
            return found
    return None


def _best_is_complete(folder: Path) -> bool:
    best = read_json(folder / STATE)["best_global_step"]
    return best in (None, step_number(folder)) or is_complete(folder.with_name(f"checkpoint-{best}"))


def discard_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after `step`: damaged ones, in the way of those that will be made anew."""
    for found in list_checkpoints(folder):
        if step_number(found) > step:
            shutil.rmtree(found)


def rotate(folder: Path, limit: int, best_step: int | None) -> None:
    """Remove all but the newest `limit` checkpoints and the best."""
    for old in list_checkpoints(folder)[limit:]:
        if step_number(old) != best_step:
            (old / COMPLETE).unlink(missing_ok=True)  # half removed, it is not taken for a whole one
            shutil.rmtree(old, ignore_errors=True)


def save_progress(folder: Path, seconds: float) -> None:
    write_json(folder / PROGRESS, {"seconds": seconds})


def save_rng_state(path: Path, world: int, writes: bool, loss: float, logged: int) -> None:
    """The states of all random number generators, of every device, in one file.

    With them goes the sum of the losses since step `logged`, the last one that the curves have a point of.
    """
    mine: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [np.random.get_state()[1].tolist(), *np.random.get_state()[2:]],  # type: ignore[index]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "loss": [loss, logged],
    }
    states = [mine]
    if world > 1:
        states = [{}] * world
        torch.distributed.all_gather_object(states, mine)
    if writes:
        torch.save(states, path)


def load_rng_state(path: Path, rank: int) -> tuple[float, int]:
    """Set the generators to what they were when the checkpoint was made. Returns: `loss` and `logged`."""
    state = torch.load(path, weights_only=True)[rank]
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    loss, logged = state["loss"]
    return loss, logged
