"""The end of a command: its warnings once more, its verdict, and the next command; or, with --json, one document.

Stages `report` what they have found while they run. Nothing but the standard library is imported.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from . import MAIN
from .utils.terminal import printable, printable_streams, unfiltered
from .utils.units import count

FLAGS = {"--json", "--quiet"}
QUIET = "ASSAY_QUIET"  # environment variable: 1 is --quiet, for the processes that a launcher starts
FOLLOWED = "ASSAY_FOLLOWED"  # environment variable of a job on a server: its client prints the next command
MAX_WARNINGS = 5  # that are repeated at the end
MAX_WARNING_CHARS = 240


@dataclass
class Outcome:
    """What one job of a command has found.

    Args:
        run: the run directory that it wrote or judged.
        verdict: the sentences that the person reads last.
        document: what --json prints of it.
        facts: what the choice of the next command depends on.
    """

    stage: str
    run: Path | None = None
    verdict: str = ""
    document: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Step(NamedTuple):
    """What a person does next: a command of Assay and, before it, what only a person can do.

    Args:
        words: what follows the stage; the folders that were typed are added.
        before: half a sentence, such as `add 8 rows to test.jsonl`.
    """

    stage: str
    words: tuple[str, ...] = ()
    before: str = ""


@dataclass
class Output:
    """How this process prints: `json` and `quiet` are the flags, `warnings` all that were logged, in order."""

    json: bool = False
    quiet: bool = False
    warnings: list[str] = field(default_factory=list)
    jobs: list[Outcome] = field(default_factory=list)
    summary: Outcome | None = None  # of a sweep over its jobs
    ends_elsewhere: bool = False  # another process prints the end: the main one of a process group


output = Output()


def begin(stage: str) -> Outcome:
    """Begin the outcome of a job. Later `report`s belong to it."""
    output.jobs.append(Outcome(stage))
    return output.jobs[-1]


def current() -> Outcome:
    """The outcome of the job that is running, or of the last one."""
    return output.jobs[-1] if output.jobs else begin("")


def last_job() -> Outcome:
    """What the command as a whole found: its sweep, or its last job."""
    return output.summary or current()


def report(
    *, run: Path | None = None, verdict: str = "", document: Mapping[str, Any] | None = None, **facts: Any
) -> None:
    """Add to the outcome of the current job; what is given replaces what was reported before."""
    mine = current()
    mine.run = run or mine.run
    mine.verdict = verdict or mine.verdict
    mine.document |= document or {}
    mine.facts |= facts


def show(text: str) -> None:
    """Print a line of a stage, not with --quiet."""
    if not output.quiet:
        print(fit(text, sys.stdout), flush=True)


def warn(text: str) -> None:
    """Print a warning before the log begins, and once more at the end."""
    output.warnings.append(text)
    print(fit(f"warning: {text}", sys.stderr), file=sys.stderr, flush=True)


def take_flags(argv: Sequence[str]) -> list[str]:
    """The words without the flags of every command, --json and --quiet, which are set."""
    global output
    quiet = "--quiet" in argv or os.environ.get(QUIET) == "1"
    output = Output("--json" in argv, quiet)
    return [word for word in argv if word not in FLAGS]


@contextmanager
def streams() -> Iterator[IO[str]]:
    """Yield stdout, and filter both streams, see `printable_streams`.

    With --json, all that anything else prints to stdout goes to stderr, child processes included. What is yielded
    is not filtered: JSON escapes control characters.
    """
    with printable_streams():
        if output.json:
            with _stdout_to_stderr() as documents:
                yield documents
        else:
            yield sys.stdout


@contextmanager
def _stdout_to_stderr() -> Iterator[IO[str]]:
    """Within the `with` statement, stdout is stderr. Yields the former stdout."""
    before, saved = sys.stdout, None
    with suppress(OSError, ValueError, AttributeError):  # a captured stdout has no descriptor
        if before.fileno() == 1:
            before.flush()
            saved = os.dup(1)
            os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield os.fdopen(os.dup(saved), "w", encoding="utf-8") if saved is not None else unfiltered(before)
    finally:
        sys.stdout = before
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def print_end(error: str, next_line: str) -> None:
    """Print the warnings once more, the verdict or the error, and the next command as the very last line."""
    sys.stdout.flush()
    stream = sys.stderr if error else sys.stdout
    shown = not output.ends_elsewhere and (not error or output.summary is not None)  # an interrupted sweep has one
    verdict = last_job().verdict if shown else ""
    lines = [*_warning_lines(bool(error)), *verdict.splitlines(), *error.splitlines()]
    for line in lines:
        print(fit(line, stream), file=stream)
    if next_line:
        print(fit(f"next: {next_line}", stream), file=stream)
    stream.flush()


def _warning_lines(failed: bool) -> list[str]:
    """The warnings once more, each once and short."""
    known = list(dict.fromkeys(output.warnings))
    if not known or output.quiet or failed or output.ends_elsewhere:
        return []
    short = [textwrap.shorten(text, MAX_WARNING_CHARS, placeholder=" ...") for text in known[:MAX_WARNINGS]]
    more = [f"  and {len(known) - MAX_WARNINGS} more, above"] if len(known) > MAX_WARNINGS else []
    return [f"{count(len(known), 'warning')}:", *(f"  {text}" for text in short), *more]


def document(stage: str, code: int, error: Mapping[str, Any], next_line: str) -> dict[str, Any]:
    """The JSON document of a command, see docs/commands.md."""
    found = [_of_job(job) for job in output.jobs]
    merged = found[-1] if len(found) == 1 and not output.summary else {"jobs": found} if found else {}
    if output.summary:
        merged |= _of_job(output.summary)
    merged = {k: v for k, v in merged.items() if k not in {"stage", "exit_code"}}
    ending = {"warnings": list(dict.fromkeys(output.warnings)), "next": next_line or None}
    return {"stage": stage, "exit_code": code, **error, **merged, **ending}


def _of_job(job: Outcome) -> dict[str, Any]:
    named = {"run": job.run.name, "run_dir": str(job.run)} if job.run else {}
    return {**named, **({"verdict": job.verdict} if job.verdict else {}), **job.document}


def fit(text: str, stream: IO[str]) -> str:
    """The text as it is shown: on a terminal, lines break between words, and further ones are indented.

    A command stays on one line; where it is too long, its lines end with a backslash, so that a shell takes them.
    """
    if not stream.isatty():
        return text
    text = printable(text)
    width = shutil.get_terminal_size().columns
    return "\n".join(_wrapped(line, width) for line in text.split("\n"))


_WORD = r"(?:'[^']*'|\"[^\"]*\"|\\.|[^\s'\"\\])+"  # of a shell: what is quoted is a part of it
_COMMAND = re.compile(
    rf"(?<![\w/])(?:make|assay|python -m {re.escape(MAIN)}) [a-z][a-z-]*"
    rf"(?: (?:[\w.@/+~-]+=|--?[a-z]){_WORD[:-1]}*)*"
)
_SPACE, _MORE = "\0", "\1"  # a space inside a word; the end of a word that more of a command follows


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    label = re.match(r" *\S+(?: \S+)* {2,}", line)  # of a table with two columns
    own = len(line) - len(line.lstrip()) + 2
    indent = " " * (len(label[0]) if label and len(label[0]) <= width // 3 else min(own, width // 3))

    def marked(command: re.Match[str]) -> str:
        fits = len(indent + command[0]) < width
        words = [command[0]] if fits else re.findall(_WORD, command[0])
        return f"{_MORE} ".join(word.replace(" ", _SPACE) for word in words)

    filled = textwrap.fill(
        _COMMAND.sub(marked, line), width - 1, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False, replace_whitespace=False, drop_whitespace=True,
    )  # fmt: skip
    return filled.replace(f"{_MORE}\n", " \\\n").replace(_MORE, "").replace(_SPACE, " ")
