"""Terminal output and the text log, which is shown at once and kept in the run directory from its first line.

A reader that closes the pipe (`... | head`) does not end the command.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.segment import Segment
from tqdm import tqdm

from .. import outcome
from .secrets import redact
from .terminal import let_bars_move, printable, unfiltered

log = logging.getLogger("assay")
_buffer = logging.handlers.MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1)


class SafeConsole(Console):
    """rich's console, without its exit when the reader closes the pipe. With --quiet it prints nothing.

    Its styles reach the terminal; control characters in a text do not.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"quiet": outcome.output.quiet} | options)

    @property
    def file(self) -> IO[str]:
        return unfiltered(super().file)

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> None:
        silence_stdout()


def silence_stdout() -> None:
    """Discard what any library prints from now on: a broken pipe stays broken."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def eprint(text: str) -> None:
    """Print to stderr, unbuffered."""
    print(text, file=sys.stderr, flush=True)


def shows_bars() -> bool:
    """Whether a person sees progress bars: stderr is a terminal, and the command is not quiet."""
    return sys.stderr.isatty() and not outcome.output.quiet


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether the terminal shows a line of the log now: not a verdict, nor progress that it shows as a bar."""
    return not getattr(record, "at_end", False) and not (getattr(record, "bar", False) and shows_bars())


def log_verdict(text: str, **reported: Any) -> None:
    """Log how the stage ended. The terminal shows it at the very end, after the warnings; see outcome.report."""
    log.info("%s", text, extra={"at_end": True})
    outcome.report(verdict=str(redact(text)), **reported)


class _TerminalHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes above a progress bar, not through it; a closed pipe does not end a training run."""

    def emit(self, record: logging.LogRecord) -> None:
        if outcome.output.quiet and record.levelno < logging.WARNING:
            return
        try:
            tqdm.write(outcome.fit(self.format(record), sys.stdout), file=sys.stdout)
            sys.stdout.flush()  # a killed process shows what it has logged
        except BrokenPipeError:
            silence_stdout()
        except OSError:  # in a program that calls the Python API; streams.py handles a command's
            self.handleError(record)


class _WarningCollector(logging.Handler):
    """Keeps the warnings for the end of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            outcome.output.warnings.append(str(redact(record.getMessage())))


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return str(redact(super().format(record)))


class _TerminalFormatter(_RedactingFormatter):
    """A warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return prefix + super().format(record)


def start_logging(silent: bool = False) -> None:
    """Log to the terminal, and buffer the lines until `log_to` opens a file for them.

    Only the main process of a process group logs; the others are `silent`. In a process that has logged before,
    the earlier log is closed, and none of its lines enter the new one.
    """
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
    _buffer.setTarget(None)
    _buffer.buffer.clear()
    terminal = _TerminalHandler()
    terminal.setFormatter(_TerminalFormatter("%(message)s"))
    terminal.addFilter(_is_shown)
    let_bars_move()
    if not shows_bars():
        for library in ("HF_HUB", "HF_DATASETS"):  # HF_HUB's holds for transformers too
            os.environ[f"{library}_DISABLE_PROGRESS_BARS"] = "1"
    log.handlers = [logging.NullHandler()] if silent else [terminal, _buffer, _WarningCollector()]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # a log that cannot be written, as on a full disk, must not end the run
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns when it is imported, used or not
    for module in ("transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    warnings.filterwarnings("ignore", message="Position ids are not supported")  # eval/generate.py passes none


def log_to(folder: Path) -> None:
    """Write the log, from its first line, to `folder`/run.log."""
    folder.mkdir(exist_ok=True)  # the user may have removed it
    handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
    handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    _buffer.setTarget(handler)
    _buffer.flush()
    log.removeHandler(_buffer)
    log.addHandler(handler)
