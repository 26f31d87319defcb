"""The table of `ssh-status`, fitted to the width of the terminal."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from ..utils.logs import SafeConsole
from ..utils.units import count
from .jobs import Job, format_status, run_id

MAX_JOBS = 20
GAP = "  "
MIN_WIDTH = 40  # columns
MIN_LAST_LINE = 24  # columns for the last line of a log beside the rest; with fewer it is printed below


class JobRow(NamedTuple):
    id: str
    stage: str
    status: str
    duration: str
    run: str  # the run directory, if its id differs
    last_line: str


TITLES = JobRow("run", "stage", "status", "for", "", "last log line")


def print_table(jobs: Sequence[Job], server: str, folder: str, everything: bool = False) -> None:
    """Print the jobs of a server: those that run and the newest, or `everything`.

    Each is one line, ending in the last line of its log; that is printed below where it does not fit. Only the
    last line of the log is ever truncated, and only on a terminal.
    """
    if not jobs:
        print(f"no runs in {folder} on {server}")
        return
    shown = [job for i, job in enumerate(jobs) if everything or i < MAX_JOBS or job["status"] == "running"]
    console = SafeConsole(highlight=False, markup=False, soft_wrap=True)
    width = max(MIN_WIDTH, console.width) if sys.stdout.isatty() or os.environ.get("COLUMNS") else None
    console.print(f"{server}:{folder}")
    rows = [TITLES, *(_row(job) for job in shown)]
    for line, is_title in _one_line_each(rows, width) or _two_lines_each(rows, width or 0):
        console.print(Text(line, style="bold" if is_title else ""))
    if len(shown) < len(jobs):
        console.print(f"{count(len(jobs) - len(shown), 'older run')} not shown: make ssh-status ALL=1 lists them")


def _row(job: Job) -> JobRow:
    id, run = str(job["id"]), run_id(job)
    end = job["ended"] or (job["now"] if job["status"] == "running" else job["log_time"]) or job["started"]
    last_line = "".join(c if c.isprintable() else " " for c in Text.from_ansi(job["last_line"]).plain)
    duration = format_duration(end - job["started"])
    return JobRow(id, str(job["stage"]), format_status(job), duration, f"in {run}" if run != id else "", last_line)


def _one_line_each(rows: Sequence[JobRow], width: int | None) -> list[tuple[str, bool]] | None:
    """One line for each row, and whether it is the title; None if they do not fit into `width` columns."""
    cells = [(f"{row.id} {row.run}".rstrip(), *row[1:4]) for row in rows]
    widths = [max(cell_len(each[i]) for each in cells) for i in range(4)]
    space = None if width is None else width - sum(widths) - 4 * len(GAP)
    if space is not None and space < MIN_LAST_LINE:
        return None
    parts = [
        (*map(set_cell_size, each, widths), _truncate(row.last_line, space))
        for each, row in zip(cells, rows, strict=True)
    ]
    return [(GAP.join(each).rstrip(), i == 0) for i, each in enumerate(parts)]


def _two_lines_each(rows: Sequence[JobRow], width: int) -> Iterator[tuple[str, bool]]:
    """As `_one_line_each`, with the run directory and the last line of the log in a second line."""
    fitting = [row for row in rows if cell_len(GAP.join(row[:4])) <= width]
    widths = [max((cell_len(row[i]) for row in fitting), default=0) for i in range(4)]
    for row in rows:
        line = GAP.join(map(set_cell_size, row[:4], widths)).rstrip()
        if row not in fitting or cell_len(line) > width:
            line = GAP.join(row[:4])
        for part in textwrap.wrap(line, width, subsequent_indent=GAP, break_on_hyphens=False):
            yield part, row is TITLES
        if rest := ": ".join(filter(None, (row.run, row.last_line))):
            yield GAP + _truncate(rest, width - len(GAP)), row is TITLES


def _truncate(text: str, width: int | None) -> str:
    if width is None or cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…"


def format_duration(seconds: float) -> str:
    """`3 h 12 min`, the two largest units."""
    seconds = max(0, round(seconds))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    parts = ((days, "d"), (hours % 24, "h"), (minutes % 60, "min"), (seconds % 60, "s"))
    first = next((i for i, (n, _) in enumerate(parts) if n), len(parts) - 1)
    return " ".join(f"{n} {unit}" for n, unit in parts[first : first + 2] if n) or "0 s"
