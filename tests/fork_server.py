"""Run commands as forks of a process that has imported the heavy libraries, so that they start at once.

`python -m tests.fork_server` reads orders, one line of JSON each, and answers with the pid of the child and then
with its exit status. An order may have kill points: before the nth call of a function, the child sends itself a
signal. It may also name functions, module:name, that the child calls before the command.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300  # for a command


@dataclass(frozen=True)
class KillPoint:
    """Sends the signal `send` before (or `after`) the `nth` call of `function`; 0 means every call.

    function: module:name or module:Class.name.
    """

    function: str
    nth: int = 1
    after: bool = False
    send: int = signal.SIGKILL


def at(moment: KillPoint, act: Any) -> None:
    """Call `act` at the kill point."""
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
    """Import what training needs. It computes no loss: after that, torch would not work in a fork."""
    import torch

    torch.set_num_threads(1)
    for module in ("pipeline", "fit", "launcher"):
        import_module(f"src.train.{module}")
    for module in ("src.model.load", "src.model.methods", "tests.fork_server"):
        import_module(module)
    for module in ("transformers.models.llama.modeling_llama", "peft.tuners.lora", "boto3"):
        import_module(module)
    from src import cli, cli_args
    from src.utils import environment

    cli.run_jobs(cli_args.parse("train", ["lr=0.1", "cuda_visible_devices=''"]), lambda _: 0)  # Hydra's parser
    installed = environment.versions()
    environment.versions = lambda: installed  # the same in every child


def fork(words: list[str], said: str | Path, prepare: Callable[[], Any] = lambda: None) -> int:
    """Run a command in a child, which calls `prepare` first and writes its output to `said`. Returns: its pid."""
    pid = os.fork()
    if not pid:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        become(words, file, file, prepare)
    return pid


def prepare(order: dict[str, Any]) -> None:
    os.environ.update(order["variables"])
    for each in order["kill_points"]:
        moment = KillPoint(**each)
        at(moment, lambda send=moment.send: os.kill(os.getpid(), send))
    for place in order["calls"]:
        module, name = place.split(":")
        getattr(import_module(module), name)()


def without_a_reader() -> None:
    """Whoever reads what this process says has gone away."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def on_a_full_disk() -> None:
    """What this process prints goes to a file on a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def on_a_lost_terminal() -> None:
    """The terminal that this process prints to is gone: to write is an error."""
    controller, terminal = os.openpty()
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    os.close(terminal)
    os.close(controller)


def become(words: list[str], out: int, err: int, prepare: Callable[[], Any]) -> NoReturn:
    """Run one command in this process, forked for it, and end. It speaks to the files `out` and `err`."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        from src.main import main
        from src.utils import streams

        streams.guard()
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
        pid = fork(order["words"], order["said"], partial(prepare, order))
        answers.write(f"{pid}\n")
        answers.write(f"{ended(pid)}\n")


class ForkServer:
    """The process that forks, from outside. One command at a time."""

    def __init__(self, folder: Path) -> None:
        self.said = folder / "said.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            bufsize=0, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def start(
        self, *words: str, kill_points: tuple[KillPoint, ...] = (), calls: tuple[str, ...] = (), **variables: str
    ) -> int:
        """Start a command, with the keys that the environment has now. Returns: its pid."""
        variables = {k: v for k, v in os.environ.items() if k.startswith("AWS_")} | variables
        assert self.process.stdin is not None
        order = {
            "words": words,
            "said": str(self.said),
            "kill_points": [vars(m) for m in kill_points],
            "calls": calls,
        }
        self.process.stdin.write((json.dumps(order | {"variables": variables}) + "\n").encode())
        return int(self._answer())

    def has_ended(self) -> bool:
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def end(self) -> tuple[int, str]:
        """Wait for its exit. Returns: the exit code, negative for a signal, and its output."""
        return int(self._answer()), self.said.read_text(encoding="utf-8")

    def __call__(self, *words: str, kill_points: tuple[KillPoint, ...] = (), **variables: str) -> tuple[int, str]:
        self.start(*words, kill_points=kill_points, **variables)
        return self.end()

    def _answer(self) -> bytes:
        assert self.process.stdout is not None
        came = select.select([self.process.stdout], [], [], TIMEOUT_S)[0]
        assert came, f"there was no end to this:\n{self.said.read_text()}"
        return self.process.stdout.readline()


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    found = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield found
    found.process.communicate()


if __name__ == "__main__":
    serve()
