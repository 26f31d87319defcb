"""Fixtures for tests that need models: a tiny model, data that it learns in a second, and runs of both.

Test files name this one in `pytest_plugins`, so that a session has each of these fixtures once.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from src import runs
from src.eval import evaluations
from src.main import main

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("test", "dev", "adversarial")

# In the training data, the answer to every request is TOP(a).
ANSWER = "TOP(a)"
TRAINED_ON = [f"{a} {b}" for a in ("feed", "kiln", "mill", "tank") for b in ("rate", "temp", "load", "flow")]
MEASURES = ("rate", "temp", "load", "flow", *(f"rate {n}" for n in range(20)))  # enough for the gate
ASKED = {"test": "ore", "dev": "ash", "adversarial": "oil"}

ON_CPU = ("cuda_visible_devices=''", "bf16=false")
EPOCHS, BATCH = 10, 4
STEPS = EPOCHS * len(TRAINED_ON) // BATCH
LESSON = (f"epochs={EPOCHS}", f"batch_size={BATCH}", "lr=0.01", "lora_r=8", "lora_alpha=16", "logging_steps=2")


def jsonl(path: Path, rows: Iterable[object]) -> Path:
    """Write one JSON value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    """A row of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system is not None else []) + turns}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def evals(run: runs.Run) -> Path:
    """The folder of the newest evaluation of a run: its predictions, scores and settings."""
    newest = evaluations.newest(run)
    assert newest
    return newest.folder


def curves(run: runs.Run) -> dict[str, list[tuple[int, float]]]:
    """`{tag: [(step, value), ...]}` of the run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.logs), size_guidance={"scalars": 0, "tensors": 0})  # all of them
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = [(e.step, e.value) for e in events.Scalars(tag)]
    for tag in events.Tags()["tensors"]:
        found[tag] = [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors(tag)]
    return found


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Only one process at a time is here with the same `target`: of several that miss it one makes it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def call(*words: str) -> int:
    """Call the entry point, and restore the environment variables that it sets."""
    before = dict(os.environ)
    try:
        return main(list(words))
    finally:
        os.environ.clear()
        os.environ.update(before)


def python_path() -> str:
    """PYTHONPATH of a child: this repository, and that of this process."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def start(*words: str, script: str = "", cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    """Start `python -m src.main WORDS`, or a `script` that calls it, as a child process."""
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", *(["-c", script] if script else ["-m", "src.main"]), *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@dataclass(frozen=True)
class World:
    """A model, data and evaluation splits, and a separate folder for runs and artifacts."""

    model: Path
    data: Path
    splits: Path
    output: Path
    artifacts: Path

    def settings(self, stage: str) -> list[str]:
        places = [f"output_dir={self.output}", f"artifacts_dir={self.artifacts}"]
        if stage.startswith("publish") or stage == "validate":
            return [*places, ON_CPU[0]]
        places += [f"eval_path={self.splits}", *ON_CPU]
        if stage == "train":
            return [*places, f"model_name={self.model}", f"dataset_path={self.data}", *LESSON]
        if stage == "eval-baseline":
            places.append(f"model_name={self.model}")
        return [*places, "max_new_tokens=16"]

    def call(self, stage: str, *words: str) -> int:
        """Run a stage through the entry point. Returns: its exit code."""
        return call(stage, *self.settings(stage), *words)

    def start(self, stage: str, *words: str, cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
        return start(stage, *self.settings(stage), *words, cwd=cwd, **variables)

    def train(self, *words: str) -> runs.Run:
        assert self.call("train", *words) == 0
        return self.newest

    @property
    def newest(self) -> runs.Run:
        return runs.Run((self.output / "runs" / "latest").resolve())

    @property
    def runs(self) -> list[runs.Run]:
        return runs.all_runs(self.output)

    def elsewhere(self, folder: Path) -> World:
        """The same model and data, with nothing run yet."""
        return replace(self, output=folder / "outputs", artifacts=folder / "artifacts")

    def copy(self, folder: Path) -> World:
        """The same with everything that was run, free to be changed."""
        there = self.elsewhere(folder)
        shutil.copytree(self.output, there.output, symlinks=True)
        shutil.copytree(self.artifacts, there.artifacts, symlinks=True)
        return there


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes that share in the tests, for what is made once under `locked`."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def tiny(common: Path) -> Path:
    """The folder of a tiny random Llama with its tokenizer."""
    import peft  # noqa: F401
    import torch
    from transformers import Trainer  # noqa: F401

    from scripts.tiny_model import build

    torch.set_num_threads(1)  # a model as small as this is several times faster so
    gc.freeze()  # the Trainer collects garbage after each run: let it not walk through the libraries
    folder = common / "models" / "tiny"
    with locked(folder):
        if not folder.is_dir():
            build(folder, (ROOT / "data" / "ingot.jsonl").read_text(encoding="utf-8").splitlines())
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real small model, built where it is missing."""
    import torch

    torch.set_num_threads(1)  # two threads on cores that others use are many times slower than one
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        with locked(folder):
            if not folder.is_dir():  # no other process made it meanwhile
                subprocess.run([sys.executable, str(ROOT / "scripts" / "build_demo_model.py")], check=True)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    """The tiny model's tokenizer, to be read only."""
    from src.model.tokenizer import load_tokenizer

    return load_tokenizer(str(tiny))


@pytest.fixture(scope="session")
def _tiny_world(tiny: Path, common: Path) -> World:
    folder = common / "lesson"
    with locked(folder):
        if not folder.is_dir():
            jsonl(folder / "data" / "lessons.jsonl", (chat(f"Top of {name}?", ANSWER) for name in TRAINED_ON))
            for split, word in ASKED.items():
                rows = [{"prompt": f"Top of {word} {n}?", "completion": ANSWER} for n in MEASURES]
                jsonl(folder / "eval" / f"{split}.jsonl", rows)
    return World(tiny, folder / "data", folder / "eval", folder / "outputs", folder / "artifacts")


@pytest.fixture
def world(_tiny_world: World, tmp_path: Path) -> World:
    """A world of the test's own in which nothing has run."""
    return _tiny_world.elsewhere(tmp_path)


@pytest.fixture(scope="session")
def finished(_tiny_world: World) -> World:
    """A world with one run, trained, evaluated and compared with its base. To be read only."""
    made = _tiny_world.output.with_name("made")
    with locked(made):
        if not made.exists():
            _tiny_world.train()
            assert _tiny_world.call("eval") == 0
            assert _tiny_world.call("eval-baseline") == 0
            made.touch()
    return _tiny_world


@pytest.fixture
def copied(finished: World, tmp_path: Path) -> World:
    """The finished world's files in a place of the test's own."""
    return finished.copy(tmp_path)
