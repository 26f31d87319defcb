"""What is printed, in colours and tables too; a reader that goes away (`... | head`) ends no command."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class SafeConsole(Console):
    """rich's console, which would end the process when its reader goes away."""

    def on_broken_pipe(self) -> None:
        silence_stdout()


def silence_stdout() -> None:
    """Let what is written from now on, by whatever library, go nowhere: a pipe stays broken."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def eprint(text: str) -> None:
    """Say something beside what is printed: on the standard error, at once."""
    print(text, file=sys.stderr, flush=True)
