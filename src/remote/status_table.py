"""The runs of a server as ssh-status shows them, however wide the terminal is."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from src.remote.connection import Connection
from src.remote.jobs import Job, meaning, run_of
from src.utils.logs import SafeConsole

SHOWN = 20  # jobs, of a long list
GAP = "  "
NARROWEST = 40  # columns, of any terminal
LEAST = 24  # columns for the last line of a log; where there are fewer it stands below


class JobRow(NamedTuple):
    run: str
    stage: str
    status: str
    lasted: str
    directory: str  # that it works in, where its name is another
    last: str


TITLES = JobRow("run", "stage", "status", "for", "", "last line of its log")


def print_table(jobs: Sequence[Job], connection: Connection, everything: bool = False) -> None:
    """Print the runs of a server: those that run and the newest, or `everything`.

    A line each, with the last line of its log beside the rest, or below where there is no room for that. Only that
    line is ever cut off, and not where no terminal is to show it.
    """
    if not jobs:
        print(f"nothing has been run in {connection.target.dir} on {connection.target}")
        return
    shown = [job for i, job in enumerate(jobs) if everything or i < SHOWN or job["status"] == "running"]
    screen = SafeConsole(highlight=False, markup=False, soft_wrap=True)
    width = max(NARROWEST, screen.width) if sys.stdout.isatty() or os.environ.get("COLUMNS") else None
    screen.print(f"{connection.target}:{connection.target.dir}")
    rows = [TITLES, *(_row(job) for job in shown)]
    for line, is_title in _beside(rows, width) or _below(rows, width or 0):
        screen.print(Text(line, style="bold" if is_title else ""))
    if len(shown) < len(jobs):
        screen.print(f"and {len(jobs) - len(shown)} older ones: make ssh-status ALL=1")


def _row(job: Job) -> JobRow:
    id, run = str(job["id"]), run_of(job)
    end = job["ended"] or (job["now"] if job["status"] == "running" else job["heard"]) or job["started"]
    last = "".join(c if c.isprintable() else " " for c in Text.from_ansi(job["last"]).plain)
    lasted = duration(end - job["started"])
    return JobRow(id, str(job["stage"]), meaning(job), lasted, f"in {run}" if run != id else "", last)


def _beside(rows: Sequence[JobRow], width: int | None) -> list[tuple[str, bool]] | None:
    """A line for each row, and whether it is the titles'; None where they would be too long."""
    cells = [(f"{row.run} {row.directory}".rstrip(), *row[1:4]) for row in rows]
    widths = [max(cell_len(each[i]) for each in cells) for i in range(4)]
    room = None if width is None else width - sum(widths) - 4 * len(GAP)
    if room is not None and room < LEAST:
        return None
    parts = [
        (*map(set_cell_size, each, widths), _cut(row.last, room)) for each, row in zip(cells, rows, strict=True)
    ]
    return [(GAP.join(each).rstrip(), i == 0) for i, each in enumerate(parts)]


def _below(rows: Sequence[JobRow], width: int) -> Iterator[tuple[str, bool]]:
    """As `_beside`, with the rest of each row in a second line."""
    fitting = [row for row in rows if cell_len(GAP.join(row[:4])) <= width]
    widths = [max((cell_len(row[i]) for row in fitting), default=0) for i in range(4)]
    for row in rows:
        line = GAP.join(map(set_cell_size, row[:4], widths)).rstrip()
        if row not in fitting or cell_len(line) > width:
            line = GAP.join(row[:4])
        for part in textwrap.wrap(line, width, subsequent_indent=GAP, break_on_hyphens=False):
            yield part, row is TITLES
        if rest := ": ".join(filter(None, (row.directory, row.last))):
            yield GAP + _cut(rest, width - len(GAP)), row is TITLES


def _cut(text: str, room: int | None) -> str:
    if room is None or cell_len(text) <= room:
        return text
    return set_cell_size(text, room - 1).rstrip() + "…"


def duration(seconds: float) -> str:
    """`3 h 12 min`, the two greatest units."""
    seconds = max(0, round(seconds))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    parts = ((days, "d"), (hours % 24, "h"), (minutes % 60, "min"), (seconds % 60, "s"))
    first = next((i for i, (n, _) in enumerate(parts) if n), len(parts) - 1)
    return " ".join(f"{n} {unit}" for n, unit in parts[first : first + 2] if n) or "0 s"
