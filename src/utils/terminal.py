"""The only place that writes to a terminal: text of files, models and servers cannot control it.

Within `printable_streams`, stdout and stderr show no secret, and control characters as escapes: a row that holds
ESC ] 52 does not reach the clipboard, and U+202E does not turn a line around. Files and --json keep the text. What
moves the cursor or sets colours on purpose (bars, tables) writes to `unfiltered(stream)` what `printable` returns.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import IO, Any, cast

from .secrets import redact

# Control and format characters, separators of lines, surrogates; not the joiners of scripts and emoji (U+200C, D),
# nor the signs of Arabic and other scripts that count as format characters and are visible.
_CONTROL = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)
_BAR_CURSOR = re.compile("\r|\n*(?:\x1b\\[A)*")  # by which tqdm begins what it writes


def printable(text: str) -> str:
    r"""`text` with control characters as escapes; it stays on its lines, and a terminal shows all of it.

    >>> print(printable("a\tb\n\x1b[2J"))
    a	b
    \x1b[2J
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class _PrintableStream:
    """A text stream whose text is `printable` and holds no secret. Everything else is that of `unfiltered`."""

    def __init__(self, stream: Any) -> None:
        self.unfiltered = stream

    def write(self, text: str) -> int:
        self.unfiltered.write(printable(redact(text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


def unfiltered(stream: Any) -> IO[str]:
    """The stream behind one of `printable_streams`, or `stream` itself."""
    return cast(IO[str], getattr(stream, "unfiltered", stream))


def _filtered(stream: Any) -> Any:
    return stream if stream is None or hasattr(stream, "unfiltered") else _PrintableStream(stream)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Within the `with` statement, what is written to stdout and stderr is filtered."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_filtered, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def let_bars_move() -> None:
    """Let the bars of tqdm, those of libraries included, move the cursor. Their text is filtered."""
    std: Any = import_module("tqdm.std")
    if hasattr(std.DisableOnWriteError, "filters"):
        return

    class BarStream(std.DisableOnWriteError):  # type: ignore[misc]
        filters = True

        def __init__(self, wrapped: Any, tqdm_instance: Any) -> None:
            super().__init__(wrapped, tqdm_instance)

            def write(text: str) -> None:
                moves = cast(re.Match[str], _BAR_CURSOR.match(text))[0]
                unfiltered(wrapped).write(moves + printable(text[len(moves) :]))

            self.wrapper_setattr("write", self.disable_on_exception(tqdm_instance, write))

    std.DisableOnWriteError = BarStream
