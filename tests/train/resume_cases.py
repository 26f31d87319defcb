"""Runs that are stopped and resumed, each in a separate process, and their expected results."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from src import runs
from src.runs import Run
from src.train import checkpoint
from tests.fixtures import World, curves, locked, tree
from tests.fork_server import ForkServer, KillPoint

# Dropout draws random numbers, steps add batches up, and saves and evaluations come at odd moments.
STEPS = (
    "epochs=3", "batch_size=2", "gradient_accumulation_steps=2", "lora_dropout=0.2", "deterministic=true",
    "logging_steps=2", "save_steps=3", "eval_steps=2", "lr=0.003",
)  # fmt: skip
TRAIN, FIT, CHECKPOINT = "src.train.pipeline", "src.train.fit", "src.train.checkpoint"
ALL_STEPS = 12


def end_of(run: Run) -> dict[str, Any]:
    """The results that must be equal, however often a run was stopped."""
    figures = json.loads((run.path / "metrics.json").read_text())["train"]
    shown = curves(run)
    rate = shown.pop("train/tokens_per_second")
    return {
        "model": tree(run.model),
        "rows": (run.logs / "samples.jsonl").read_text(),
        "figures": {key: value for key, value in figures.items() if key != "seconds"},
        "curves": shown,
        "rate": [step for step, _ in rate],
        "status": run.status,
        "left": [str(p.relative_to(run.path)) for p in run.path.rglob("*.tmp")],
    }


@dataclass
class Stage:
    """A world, and the fork server that runs its commands."""

    world: World
    fork_server: ForkServer

    def __call__(self, *words: str, moment: KillPoint | None = None) -> tuple[int, str]:
        self.start(*words, moment=moment)
        return self.fork_server.end()

    def start(self, *words: str, moment: KillPoint | None = None, calls: tuple[str, ...] = ()) -> int:
        """Returns: its pid."""
        kill_points = (moment,) if moment else ()
        return self.fork_server.start(
            "train", *self.world.settings("train"), *STEPS, *words, kill_points=kill_points, calls=calls
        )

    def train(self, *words: str) -> Run:
        code, said = self(*words)
        assert code == 0, said
        return self.world.newest


@pytest.fixture
def stage(world: World, fork_server: ForkServer) -> Stage:
    return Stage(world, fork_server)


VARIANTS = {
    "plain": (),
    "packed": ("packing=true", "max_length=96"),
    # the rate is so high that the second evaluation is worse than the first, whatever dropout would have drawn
    "best": (
        "load_best_model_at_end=true", "lr=0.03", "lr_scheduler_type=constant", "max_steps=5",
        "save_total_limit=1", "lora_dropout=0",
    ),
}  # fmt: skip


class Undisturbed(dict[str, Any]):
    """The results of the variants without interruption; the first test process that needs one trains it."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage, self.folder = stage, folder

    def __missing__(self, name: str) -> Any:
        world = self.stage.world.elsewhere(self.folder / name)
        with locked(world.output):
            if not world.output.is_dir():
                Stage(world, self.stage.fork_server).train(*VARIANTS[name])
        self[name] = end_of(world.newest)
        return self[name]


@pytest.fixture(scope="session")
def undisturbed(_tiny_world: World, fork_server: ForkServer, common: Path) -> Undisturbed:
    return Undisturbed(Stage(_tiny_world, fork_server), common / "undisturbed")


def assert_resumes(stage: Stage, expected: dict[str, Any], *words: str) -> str:
    """The same command resumes the run, and it ends like an undisturbed one. Returns its output."""
    (before,) = stage.world.runs
    assert before.status == runs.INTERRUPTED
    code, said = stage(*words)
    assert code == 0, said
    (run,) = stage.world.runs
    assert run.path == before.path
    assert end_of(run) == expected
    return said


@pytest.fixture(scope="session")
def almost(_tiny_world: World, fork_server: ForkServer, common: Path) -> World:
    """A run killed in its tenth step, with the checkpoints 6 and 9. Read-only."""
    world = _tiny_world.elsewhere(common / "almost")
    with locked(world.output):
        if not world.output.is_dir():
            code, said = Stage(world, fork_server)(moment=KillPoint(f"{FIT}:AssayTrainer.compute_loss", nth=19))
            assert code == -signal.SIGKILL, said
    assert [p.name for p in checkpoint.list_checkpoints(world.runs[0].checkpoints)] == [
        "checkpoint-9",
        "checkpoint-6",
    ]
    return world


@pytest.fixture
def killed(almost: World, fork_server: ForkServer, tmp_path: Path) -> Stage:
    """A copy of it, free to be changed."""
    there = almost.elsewhere(tmp_path)
    shutil.copytree(almost.output, there.output, symlinks=True)
    return Stage(there, fork_server)
