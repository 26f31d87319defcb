"""Checkpoints that are complete or absent: a folder gets its name after every file is written and hashed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import RunError
from ..utils.files import disk_errors, flush_files, read_json, sha256, write_json
from ..utils.logs import log

COMPLETE = "COMPLETE"  # the marker: written last, holds the hash of every other file
STATE, RNG, PROGRESS = "trainer_state.json", "rng_state.pt", "progress.json"
UNREDACTED_PICKLE = "training_args.bin"  # the Trainer writes its settings there, secrets included


@contextmanager
def atomic_checkpoint(target: Path, world_size: int = 1, writes: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that every process fills; rename it to `target` when it is complete."""
    temporary = target.with_name(f".{target.name}.tmp")
    if writes:
        with disk_errors(target):
            for leftover in target.parent.glob(".*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir(parents=True)
    _barrier(world_size)
    with disk_errors(target):
        yield temporary
        _barrier(world_size)
        if writes:
            _seal(temporary)
            if target.exists():  # of an earlier attempt
                shutil.rmtree(target)
            temporary.rename(target)
    _barrier(world_size)


def _seal(folder: Path) -> None:
    (folder / UNREDACTED_PICKLE).unlink(missing_ok=True)
    files = flush_files(folder)
    write_json(folder / COMPLETE, {"files": {str(p.relative_to(folder)): sha256(p) for p in files}})


def _barrier(world_size: int) -> None:
    if world_size > 1:
        torch.distributed.barrier()


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint has the hash that the marker records."""
    try:
        files = read_json(folder / COMPLETE)["files"]
        return all(sha256(folder / name) == digest for name, digest in files.items())
    except (RunError, OSError, KeyError, TypeError):
        return False


def step_number(folder: Path) -> int:
    """STEP of a folder `checkpoint-STEP`; -1 for any other name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if step_number(p) >= 0]
    return sorted(found, key=step_number, reverse=True)


def find_newest(folder: Path, with_best: bool = False, until: int | None = None) -> Path | None:
    """The newest complete checkpoint in `folder`; a warning names each damaged one that is skipped.

    Args:
        with_best: whether the checkpoint of the best step so far must be complete as well.
        until: consider only checkpoints of this step or an earlier one.
    """
    for found in list_checkpoints(folder):
        if until is not None and step_number(found) > until:
            continue
        if not is_complete(found):
            log.warning("%s is damaged and is skipped", found)
        elif with_best and not _best_is_complete(found):
            log.warning("%s is skipped: the checkpoint of its best step is damaged or missing", found)
        else:
            return found
    return None


def _best_is_complete(folder: Path) -> bool:
    best = read_json(folder / STATE)["best_global_step"]
    return best in (None, step_number(folder)) or is_complete(folder.with_name(f"checkpoint-{best}"))


def discard_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after `step`: they are damaged, and training will write them again."""
    for found in list_checkpoints(folder):
        if step_number(found) > step:
            shutil.rmtree(found)


def rotate(folder: Path, limit: int, best_step: int | None) -> None:
    """Remove all checkpoints except the newest `limit` and the best."""
    for old in list_checkpoints(folder)[limit:]:
        if step_number(old) != best_step:
            (old / COMPLETE).unlink(missing_ok=True)  # so that a half-removed checkpoint is not complete
            shutil.rmtree(old, ignore_errors=True)


def save_progress(folder: Path, seconds: float) -> None:
    write_json(folder / PROGRESS, {"seconds": seconds})


def save_rng_state(path: Path, world_size: int, writes: bool, loss: float, logged: int) -> None:
    """Write the random number generator states of every process to one file.

    Args:
        loss: sum of the losses since step `logged`.
        logged: the last step whose loss was logged.
    """
    mine: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [np.random.get_state()[1].tolist(), *np.random.get_state()[2:]],  # type: ignore[index]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "loss": [loss, logged],
    }
    states = [mine]
    if world_size > 1:
        states = [{}] * world_size
        torch.distributed.all_gather_object(states, mine)
    if writes:
        torch.save(states, path)


def load_rng_state(path: Path, rank: int) -> tuple[float, int]:
    """Restore the generators of process `rank`. Returns: `loss` and `logged` of save_rng_state."""
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
