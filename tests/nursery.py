"""Commands in processes of their own, forked from one that has imported what is heavy: they start at once.

`python -m tests.nursery` reads orders, one line of JSON each, and answers with the child's pid and then with how
it ended. An order may name a moment: before the nth call of some function the child sends itself a signal.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Moment:
    """The signal `send` comes before the `nth` call of `function`, 0 for each, or after it.

    A function is module:name or module:Class.name.
    """

    function: str
    nth: int = 1
    after: bool = False
    send: int = signal.SIGKILL


def at(moment: Moment, act: Any) -> None:
    """Call `act` at the moment."""
    module, _, name = moment.function.partition(":")
    holder: Any = import_module(module)
    *classes, name = name.split(".")
    for each in classes:
        holder = getattr(holder, each)
    plain, calls = getattr(holder, name), [0]

    @wraps(plain)
    def watched(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if moment.nth in (0, calls[0]) and not moment.after:
            act()
        found = plain(*args, **named)
        if moment.nth in (0, calls[0]) and moment.after:
            act()
        return found

    setattr(holder, name, watched)


def warm() -> None:
    """Import what a training needs. No loss is computed: torch could not do so in a fork any more."""
    import torch

    torch.set_num_threads(1)
    for module in ("src.train.pipeline", "src.train.fit", "src.model.load", "src.model.methods"):
        import_module(module)
    for module in ("src.cli", "transformers.models.llama.modeling_llama", "peft.tuners.lora", "boto3"):
        import_module(module)


def fork(words: list[str], said: Path, moments: list[Moment], prepare: Any = lambda: None) -> int:
    """Run one command in a child. Returns: its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for moment in moments:
            at(moment, lambda moment=moment: os.kill(os.getpid(), moment.send))
        prepare()
        from src.main import main

        code = main(words)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code, or minus the signal, of a child that ends."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    warm()
    for line in sys.stdin:
        order = json.loads(line)
        moments = [Moment(**each) for each in order["moments"]]
        pid = fork(order["words"], Path(order["said"]), moments, lambda: os.environ.update(order["variables"]))  # noqa: B023
        answers.write(f"{pid}\n")
        answers.write(f"{ended(pid)}\n")


class Nursery:
    """The process that forks, from outside. One command at a time."""

    def __init__(self, folder: Path) -> None:
        self.said = folder / "said.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def start(self, *words: str, moments: tuple[Moment, ...] = (), **variables: str) -> int:
        """Start a command. Returns: its pid."""
        assert self.process.stdin is not None
        order = {"words": words, "said": str(self.said), "moments": [vars(m) for m in moments]}
        self.process.stdin.write(json.dumps(order | {"variables": variables}) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def end(self) -> tuple[int, str]:
        """Wait for its end. Returns: the exit code, or minus the signal that killed it, and what it said."""
        return int(self._answer()), self.said.read_text(encoding="utf-8")

    def __call__(self, *words: str, moments: tuple[Moment, ...] = (), **variables: str) -> tuple[int, str]:
        self.start(*words, moments=moments, **variables)
        return self.end()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    found = Nursery(tmp_path_factory.mktemp("nursery"))
    yield found
    found.process.communicate()


if __name__ == "__main__":
    serve()
