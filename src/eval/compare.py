"""The stage `compare`, and comparison.json: every metric of every split with its interval, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .. import outcome, runs
from ..errors import UserError
from ..runs import Run
from ..schema import CompareConfig, GateArgs
from ..utils.files import write_json
from ..utils.logs import SafeConsole
from ..utils.units import count
from . import evaluations, results, significance, verdict, verdict_text
from .evaluations import Evaluation
from .results import EvalResult
from .significance import Comparison

Result = Mapping[str, Any]
BASELINE = "baseline"


def compare_runs(cfg: CompareConfig) -> int:
    """Compare two evaluated runs, or a run with its base, and print whether the first is better."""
    run = runs.find_run(cfg.run_a, cfg.output_dir)
    if cfg.run_b == BASELINE:
        first = EvalResult.of_run(run)
        second = results.baseline_of(first, cfg.artifacts_dir)
    else:
        first, second = results.comparable(run, runs.find_run(cfg.run_b, cfg.output_dir))
    comparison = compare(first, second, cfg.gate)
    outcome.report(run=run.path, document={"comparison": comparison, "first": first.name, "second": second.name})
    columns = ("base", "tuned") if cfg.run_b == BASELINE else ("second", "first")
    show(comparison, f"{first.name} against {second.name}", columns)
    verdict_text.report(comparison, run)
    return 0


def compare(tuned: EvalResult, base: EvalResult, gate: GateArgs) -> dict[str, Any]:
    """The content of comparison.json: a row for each split and metric, and the gate's verdict.

    Raises: RunError if the models were evaluated under different conditions, naming what differs.
    """
    results.require_same_conditions(tuned, base)
    judged, why = _verdict(tuned, base, gate)
    return {
        "base_model": base.result["base_model"],
        "baseline": str(base.folder),
        "conditions": tuned.result["conditions"],
        "confidence": gate.confidence,
        "rows": [row for split in tuned.result["eval"] for row in _rows(tuned, base, split, gate)],
        "verdict": judged,
        "no_verdict": why,
    }


def _rows(tuned: EvalResult, base: EvalResult, split: str, gate: GateArgs) -> list[dict[str, Any]]:
    metrics = tuned.result["eval"][split]
    pairs = {metric: results.pair_scores(tuned, base, split, metric) for metric in metrics}
    paired = {metric: pair for metric, pair in pairs.items() if pair}
    compared: dict[str, Comparison] = {}
    if paired:
        found = significance.compare(list(paired.values()), confidence=gate.confidence, resamples=gate.resamples)
        compared = dict(zip(paired, found, strict=True))
    return [_row(tuned, base, split, metric, compared.get(metric)) for metric in metrics]


def _row(tuned: EvalResult, base: EvalResult, split: str, metric: str, found: Comparison | None) -> dict[str, Any]:
    about, scores = tuned.result["metrics"][metric], [m.result["eval"][split][metric] for m in (base, tuned)]
    return {
        "split": split,
        "metric": metric,
        "scale": about["scale"],
        "better": about["better"],
        "base": scores[0],
        "tuned": scores[1],
        "difference": scores[1] - scores[0],
        "low": found and found.low,
        "high": found and found.high,
        "p_value": found and found.p_value,
        "test": found and found.test,
        "examples": len(tuned.rows(split)),
        "detectable": found and found.detectable,
    }


def _verdict(
    tuned: EvalResult, base: EvalResult, gate: GateArgs
) -> tuple[Mapping[str, Any] | None, Mapping[str, str] | None]:
    """The verdict; or why the gate cannot decide with what was evaluated, for which `publish` refuses the run."""
    try:
        return verdict.as_json(verdict.decide(tuned, base, gate)), None
    except UserError as error:
        return None, {"reason": "; ".join(error.problems), "hint": error.hint}


def record(run: Run, baseline: Path, gate: GateArgs, evaluation: Evaluation | None = None) -> dict[str, Any]:
    """Compare an evaluation of the run, by default the newest, with its base; write comparison.json.

    Prints the table.
    """
    found = evaluation or evaluations.require(run)
    tuned, base = EvalResult.of_run(run, found), EvalResult.of_base(baseline)
    comparison = compare(tuned, base, gate)
    for folder in {found.records, found.folder}:
        write_json(folder / evaluations.COMPARISON, comparison)
    outcome.report(run=run.path, document={"comparison": comparison})
    show(comparison, f"{run.id} against {base.name}")
    return comparison


def is_significant(row: Mapping[str, Any], confidence: float) -> bool:
    """Whether the interval excludes 0, and the randomisation test agrees."""
    excludes_0 = row["low"] is not None and not row["low"] <= 0 <= row["high"]
    return bool(excludes_0 and row["p_value"] <= 1 - confidence)


def show(comparison: Mapping[str, Any], title: str, columns: tuple[str, str] = ("base", "tuned")) -> None:
    """Print a table with the rows of each split.

    Where the terminal is narrow, the scales are left out. No figure is truncated.
    """
    available, unlimited = SafeConsole().width, SafeConsole(width=200)
    shown = table(comparison, columns)
    if unlimited.measure(shown).maximum > available:
        shown = table(comparison, columns, scales=False)
    console = SafeConsole(width=max(available, unlimited.measure(shown).maximum))
    console.print(title, style="italic", highlight=False, soft_wrap=True)
    console.print(shown)
    console.print("* significant: the interval excludes 0 and the paired test agrees", highlight=False)


def table(comparison: Mapping[str, Any], columns: tuple[str, str], scales: bool = True) -> Table:
    """A row for each metric of each split, as it is printed."""
    confidence = comparison["confidence"]
    found = Table(
        header_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    widest = max((len(row["metric"]) for row in comparison["rows"]), default=0)
    found.add_column("metric", max_width=max(widest, 20))  # the name of a split wraps, figures do not
    if scales:
        found.add_column("scale", no_wrap=True)
    for name in (*columns, "difference", f"{100 * confidence:g}% interval"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("")
    previous = None
    for row in comparison["rows"]:
        if previous != row["split"]:
            if previous:
                found.add_row()
            found.add_row(f"[bold]{row['split']}[/], {count(row['examples'], 'row')}")
        metric, scale, *cells = _cells(row, confidence)
        found.add_row(metric, *([scale] if scales else []), *cells)
        previous = row["split"]
    return found


def _cells(row: Mapping[str, Any], confidence: float) -> list[str]:
    digits = verdict.digits(row["scale"])
    sign = {"higher": 1, "lower": -1, "neither": 0}[row["better"]] * row["difference"]
    marked = is_significant(row, confidence)
    colour = "dim" if not marked else "green" if sign > 0 else "red" if sign < 0 else "bold"
    interval = "" if row["low"] is None else f"{row['low']:+.{digits}f} to {row['high']:+.{digits}f}"
    return [
        row["metric"],
        row["scale"].replace("from ", "≥ "),
        f"{row['base']:.{digits}f}",
        f"{row['tuned']:.{digits}f}",
        f"[{colour}]{row['difference']:+.{digits}f}[/]",
        interval,
        "*" if marked else "",
    ]


def show_one(found: EvalResult, title: str) -> None:
    """Print the scores of one model."""
    result = found.result
    table = Table(header_style="bold")
    table.add_column("metric")
    table.add_column("scale")
    for split in result["eval"]:
        table.add_column(f"{split}, {count(len(found.rows(split)), 'row')}", justify="right")
    for metric, about in result["metrics"].items():
        digits = verdict.digits(about["scale"])
        scores = (f"{scores[metric]:.{digits}f}" for scores in result["eval"].values())
        table.add_row(metric, about["scale"], *scores)
    console = SafeConsole()
    console.print(title, style="italic", highlight=False, soft_wrap=True)
    console.print(table)
