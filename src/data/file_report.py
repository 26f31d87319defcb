"""What deserves a look in the training files: names of other splits; files left out, empty or missing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MAX_LISTED
from ..utils.units import count

SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.(.*)")  # as the Hub and `datasets` name the parts of a split


def file_findings(report: dict[str, Any]) -> list[str]:
    """One sentence a finding, from the entries `files` and `not_matched` of a data report."""
    files = report["files"]
    held_out = [Path(file["file"]).name for file in files if file.get("like_held_out")]
    empty = [Path(file["file"]).name for file in files if not file["rows_in"]]
    missing = missing_shards([str(file["file"]) for file in files])
    found = [
        (
            held_out, "trained on, named like a held-out split",
            "dataset_pattern chooses the training files, and eval_path names evaluation files",
        ),
        (
            report.get("not_matched", []), "of the data folder not trained on",
            "dataset_pattern chooses the training files; dataset_path may be one file",
        ),
        (empty, "without a row", "fetch or create the file again, or remove it"),
        (missing, "missing of a numbered series", "fetch the rest of the data set"),
    ]  # fmt: skip
    return [
        f"{count(len(names), 'file')} {what}: {_listed(names)} ({remedy})"
        for names, what, remedy in found
        if names
    ]


def missing_shards(files: Sequence[str]) -> list[str]:
    """The names that lack in series such as `train-00000-of-00003.parquet` of which several files are there.

    >>> missing_shards(["x-00000-of-00003.csv", "x-00002-of-00003.csv"])
    ['x-00001-of-00003.csv']
    """
    series: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for file in files:
        if match := SHARD.fullmatch(file):
            series[match[1], match[3], match[4]].add(int(match[2]))
    return [
        Path(f"{start}-{number:05}-of-{total}.{end}").name
        for (start, total, end), present in series.items()
        if len(present) > 1
        for number in range(int(total))
        if number not in present
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (" ..." if len(names) > MAX_LISTED else "")
