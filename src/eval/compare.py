"""Tuned against base: the same prompts under the same conditions, or no comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from src.errors import RunError
from src.runs import Run
from src.utils.files import read_json, write_json

Result = Mapping[str, Any]


def fingerprint(conditions: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for everything the scores depend on, the model aside."""
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:12]


def baseline_folder(artifacts_dir: str, base: Mapping[str, Any], conditions: Mapping[str, Any]) -> Path:
    """Where the base model's answers under these conditions are kept."""
    which = hashlib.sha256(str(base["revision"]).encode()).hexdigest()[:8]
    name = str(base["name"]).rstrip("/").rsplit("/", 1)[-1]
    return Path(artifacts_dir) / "metrics" / f"{name}-{which}-{fingerprint(conditions)}"


def compare(tuned: Result, base: Result) -> dict[str, Any]:
    """The comparison of two results (`metrics.json`), split by split and metric by metric.

    Raises: RunError if they were not made under the same conditions, naming what differs.
    """
    ours, theirs = tuned["conditions"], base["conditions"]
    if ours != theirs:
        differing = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        raise RunError(
            f"not comparable: base and tuned model were evaluated under different {', '.join(differing)}",
            hint="run make eval-baseline with the settings of make eval",
        )
    return {
        "base_model": base["base_model"],
        "conditions": ours,
        "rows": [
            {
                "split": split,
                "metric": metric,
                "base": base["eval"][split][metric],
                "tuned": value,
                "difference": value - base["eval"][split][metric],
                "scale": tuned["metrics"][metric]["scale"],
            }
            for split, scores in tuned["eval"].items()
            for metric, value in scores.items()
        ],
    }


def record(run: Run, base: Result) -> dict[str, Any]:
    """Compare the run's result with its base's, write `comparison.json` and print the table."""
    comparison = compare(read_json(run.path / "metrics.json"), base)
    write_json(run.path / "comparison.json", comparison)
    show(comparison, f"{run.id} against {base['base_model']['name']}")
    return comparison


def show(comparison: Mapping[str, Any], title: str) -> None:
    """Print one table: split, metric, base, tuned, difference."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("split", "metric", "scale"):
        table.add_column(name)
    for name in ("base", "tuned", "difference"):
        table.add_column(name, justify="right")
    previous = None
    for row in comparison["rows"]:
        if previous not in {None, row["split"]}:
            table.add_section()
        digits = 1 if row["scale"] == "0-100" else 3
        colour = "green" if row["difference"] > 0 else "red" if row["difference"] < 0 else "dim"
        shown = [
            f"{row['base']:.{digits}f}",
            f"{row['tuned']:.{digits}f}",
            f"{row['difference']:+.{digits}f}",
        ]
        first = row["split"] if row["split"] != previous else ""
        table.add_row(first, row["metric"], row["scale"], *shown[:2], f"[{colour}]{shown[2]}[/]")
        previous = row["split"]
    Console().print(table)


def show_one(result: Result, title: str) -> None:
    """Print the scores of one model."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("metric")
    table.add_column("scale")
    for split in result["eval"]:
        table.add_column(split, justify="right")
    for metric, about in result["metrics"].items():
        digits = 1 if about["scale"] == "0-100" else 3
        table.add_row(
            metric, about["scale"], *(f"{scores[metric]:.{digits}f}" for scores in result["eval"].values())
        )
    Console().print(table)
