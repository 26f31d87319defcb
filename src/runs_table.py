"""The command `runs`: a table of all runs with scores and verdicts, and the differences between two runs."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import outcome, runs
from .errors import RunError, UserError, did_you_mean
from .run_summaries import LOSSES, RunSummary, all_summaries, is_number, summaries_of, summary_of
from .runs import Run
from .utils.commands import command, program

USAGE = """usage: {program} runs [output_dir=DIR] [--sort KEY] [--run RUN]
       {program} runs diff RUN RUN [output_dir=DIR]

List the runs with their scores and verdicts, or compare two of them.

--sort KEY  a column or a score, the best or the newest first: started, status, method, verdict, test/rougeL,
            eval_loss ...; the name of a score in metrics.json is SPLIT/METRIC
--run RUN   only this run
A RUN is the id of a run, a prefix of one, its directory, or latest."""
OUTPUT_DIR = "outputs"
FLAGS = {"--sort": ("a key", "test/rougeL"), "--run": ("a run", "latest")}  # what each needs, and an example
FACTS = ("started", "name", "run", "stage", "status", "method", "base", "data", "lr", "verdict")
MAX_SCORES = 4
PIPED_WIDTH = 200  # if stdout is not a terminal


def runs_output(words: Sequence[str]) -> str:
    """The output of `runs WORDS`; its JSON document is reported. Raises: UserError."""
    if {"-h", "--help"} & set(words):
        return USAGE.format(program=program())
    if words and words[0] == "diff":
        return _diff_output(words[1:])
    plain, flags = _parsed(words)
    if len(plain) > 1:
        raise UserError(
            f"runs does not take {plain[1]}", hint="write runs [output_dir=DIR] [--sort KEY] [--run RUN]"
        )
    return format_runs(plain[0] if plain else OUTPUT_DIR, flags.get("--sort"), run=flags.get("--run"))


def _parsed(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The positional arguments, and the values of FLAGS."""
    plain, flags = [], {}
    left = iter(words)
    for word in left:
        name, _, value = word.partition("=")
        if name in FLAGS:
            flags[name] = value or next(left, "")
            if not flags[name]:
                raise UserError(f"{name} needs {FLAGS[name][0]}", hint=f"such as {name} {FLAGS[name][1]}")
        elif name == "output_dir" and value:  # as every stage spells it
            plain.append(value)
        elif word.startswith("-"):
            raise UserError(f"{word} is not a flag of runs", hint="runs --help lists the flags")
        else:
            plain.append(word)
    return plain, flags


def _diff_output(words: Sequence[str]) -> str:
    words = [word.removeprefix("output_dir=") for word in words]
    if not 2 <= len(words) <= 3 or any(w.startswith("-") for w in words):
        raise UserError("runs diff takes two runs", hint="write runs diff RUN RUN [output_dir=DIR]")
    output_dir = words[2] if len(words) == 3 else OUTPUT_DIR
    return diff_runs(*(runs.find_run(word, output_dir) for word in words[:2]))


def format_runs(
    output_dir: str | Path, sort: str | None = None, width: int | None = None, run: str | None = None
) -> str:
    """The table of all runs, the newest first or sorted by the key `sort`; or of one `run`.

    Raises: UserError if no run has that key; RunError if there is no such run.
    """
    if run:
        found, unreadable = summaries_of([runs.find_run(run, output_dir)])
    else:
        found, unreadable = all_summaries(output_dir)
    found = _sorted(found, sort) if sort else found
    outcome.report(document=_document(found, [line.split("  ")[0] for line in unreadable]))
    if not found and not unreadable:
        return f"no runs in {output_dir}/runs; {command('train')} makes one"
    shown = _scores_shown(found, sort)
    if all(line.facts["stage"] == "train" for line in found):
        for line in found:
            line.facts["stage"] = ""
    columns = ["run", "name", "stage", "status", "method", "base", "data", "lr", "verdict", *shown]
    cells = [[line.facts.get(c) or _format_score(line.scores.get(c)) for c in columns] for line in found]
    lines = _format_table(columns, cells, width or _width())
    return "\n".join([*lines, *unreadable])


def _document(found: Sequence[RunSummary], unreadable: Sequence[str]) -> dict[str, Any]:
    """What --json prints of the runs, in the order of the table."""
    names = ("run", "name", "stage", "status", "started", "method", "base", "data", "lr", "verdict")
    entries = [{name: x.facts[name] or None for name in names} | {"scores": x.scores} for x in found]
    return {"runs": entries, "unreadable": list(unreadable)}


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED_WIDTH


def _scores_shown(lines: Sequence[RunSummary], sort: str | None) -> list[str]:
    """The scores with a column: the sort key, the metrics of the verdicts, the losses of training."""
    known = {name for line in lines for name in line.scores}
    decided = list(dict.fromkeys(line.facts["decided by"] for line in lines if line.facts["decided by"]))
    wanted = [sort or "", *decided, "test/rougeL", "test/accuracy", "eval_loss", "train_loss"]
    return [name for name in dict.fromkeys(wanted) if name in known][:MAX_SCORES]


def _sorted(lines: list[RunSummary], key: str) -> list[RunSummary]:
    """Sort by a score (best first), by `started` (newest first), or by another column; runs without it are last.

    Raises: UserError if no run has the key.
    """
    known = [*FACTS, *dict.fromkeys(name for line in lines for name in line.scores)]
    if key not in known:
        raise UserError(
            f"--sort {key}: no run has that key{did_you_mean(key, known)}",
            hint=f"the keys are: {', '.join(known)}",
        )
    if key in FACTS:
        having = sorted((x for x in lines if x.facts[key]), key=lambda x: x.facts[key], reverse=key == "started")
        return having + [x for x in lines if not x.facts[key]]
    lower = any(key in line.lower for line in lines if key in line.scores)
    having = sorted((x for x in lines if key in x.scores), key=lambda x: x.scores[key], reverse=not lower)
    return having + [x for x in lines if key not in x.scores]


# Dropped from narrow tables, in this order. A name that was made holds method, data and lr.
OPTIONAL_COLUMNS = ("base", "stage", "train_loss", "method", "eval_loss", "data", "lr")
SHORTEST_NAME = 8  # where even the least widths are too wide
FLEXIBLE = {"status": 12, "name": 20}  # columns that are cut, and the least width of each


def _format_table(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> list[str]:
    """Lines of at most `width` characters: optional columns are dropped, then scores, and long texts are cut."""
    rows = [list(columns), *(list(row) for row in cells)]
    widths = [max(_width_of(row[i]) for row in rows) for i in range(len(columns))]
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows[1:]) or not cells]
    least = [min(w, FLEXIBLE.get(name, w)) for w, name in zip(widths, columns, strict=True)]

    def excess(sizes: Sequence[int]) -> int:
        return sum(sizes[i] for i in kept) + 2 * (len(kept) - 1) - width

    scores = [name for name in columns if "/" in name]
    for name in (*OPTIONAL_COLUMNS, *reversed(scores[1:])):
        if excess(least) > 0:
            kept = [i for i in kept if columns[i] != name]
    for name, smallest in (*FLEXIBLE.items(), ("name", SHORTEST_NAME)):
        i = list(columns).index(name)
        if i in kept:
            widths[i] = max(min(widths[i], smallest), widths[i] - max(0, excess(widths)))
    return ["  ".join(_cell(row[i], widths[i], columns[i]) for i in kept).rstrip() for row in rows]


def _cell(text: str, width: int, column: str) -> str:
    if _width_of(text) > width:
        while _width_of(text) >= width:
            text = text[:-1]
        text += "…"
    space = " " * (width - _width_of(text))
    return space + text if "/" in column or column in LOSSES else text + space


def _width_of(text: str) -> int:
    """The columns of a terminal that a text takes: Chinese, Japanese and Korean letters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def diff_runs(first: Run, second: Run) -> str:
    """The settings, facts and scores in which two runs differ."""
    if first.path == second.path:
        raise RunError(f"both arguments are the run {first.id}", hint="name two different runs")
    lines = []
    document: dict[str, Any] = {"runs": [first.id, second.id]}
    for title, (a, b) in _compared(first, second):
        keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
        document[title] = {key: [a.get(key), b.get(key)] for key in keys}
        if keys:
            lines += ["", title, *(_change(key, a.get(key), b.get(key)) for key in keys)]
    outcome.report(document=document)
    output = [f"{first.id} -> {second.id}", *lines]
    return "\n".join(output if lines else [*output, "", "no difference in settings, data or scores"])


def _compared(first: Run, second: Run) -> Iterator[tuple[str, tuple[dict[str, Any], dict[str, Any]]]]:
    pair = (first, second)
    yield "settings", _both([_flat(_settings(run)) for run in pair])
    lines = [summary_of(run) for run in pair]
    names = ("stage", "status", "method", "base", "data", "data version", "verdict")
    code = [{"code": str(run.manifest.get("code", {}).get("commit") or "")[:12]} for run in pair]
    yield "facts", _both([{n: x.facts[n] for n in names} | c for x, c in zip(lines, code, strict=True)])
    yield "scores", _both([line.scores for line in lines])


def _both(values: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    return values[0], values[1]


def _change(key: str, before: Any, after: Any) -> str:
    moved = f"  ({after - before:+.4g})" if is_number(before) and is_number(after) else ""
    return f"  {key:<28} {_format_value(before)} -> {_format_value(after)}{moved}"


def _format_value(value: Any) -> str:
    return "-" if value is None or value == "" else f"{value:.6g}" if isinstance(value, float) else str(value)


def _settings(run: Run) -> Any:
    try:
        return run.settings
    except RunError:
        return {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return found


def _format_score(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
