"""The text log: on the terminal at once, and in the run directory from its first line on."""

from __future__ import annotations

import logging
import logging.handlers
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

from src.utils.console import silence_stdout
from src.utils.secrets import redact

log = logging.getLogger("assay")


class _Screen(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes above a progress bar, not through it; a reader that has gone away ends no training."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
        except BrokenPipeError:
            silence_stdout()


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return str(redact(super().format(record)))


_waiting = logging.handlers.MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1)


def start_logging(silent: bool = False) -> None:
    """Log to the terminal, and keep what is said until `log_to` gives it a file.

    Of processes that train together the first one speaks; the others are `silent`.
    In a process that has logged before, that log is ended: nothing more is written to it, and nothing of it
    to the next.
    """
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
    _waiting.setTarget(None)
    _waiting.buffer.clear()
    screen = _Screen()
    screen.setFormatter(_Redacting("%(message)s"))
    log.handlers = [logging.NullHandler()] if silent else [screen, _waiting]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, is no reason to die
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at import, used or not
    for module in ("transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    warnings.filterwarnings("ignore", message="Position ids are not supported")  # eval/generate.py does without


def log_to(folder: Path) -> None:
    """Write the log to `folder`/run.log, from its first line on."""
    folder.mkdir(exist_ok=True)  # removed by hand
    handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(message)s"))
    _waiting.setTarget(handler)
    _waiting.flush()
    log.removeHandler(_waiting)
    log.addHandler(handler)
