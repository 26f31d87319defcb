"""report.html, a summary of a run for people: a single file without scripts that loads nothing from a network.

It is made from the files of any run directory, also of a run that failed, still runs, was never evaluated or comes
from an older version. A note names each file that is missing or cannot be read, and the rest is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from ... import NAME, VERSION, outcome, runs
from ...errors import RunError
from ...schema import ReportConfig
from ...utils.files import read_object, write_text
from ...utils.logs import log
from ...utils.secrets import redact
from .. import evaluations
from . import charts, examples, lineage, view_model

REPORT = "report.html"
CURVES = (  # title, {tag: (name of the line, its CSS class)}
    ("Loss", {"train/loss": ("training", "train"), "eval/loss": ("dev", "held-out")}),
    ("Learning rate", {"train/learning_rate": ("learning rate", "train")}),
    ("Gradient norm", {"train/grad_norm": ("gradient norm", "train")}),
    ("Tokens a second", {"train/tokens_per_second": ("tokens a second", "train")}),
)


def report(cfg: ReportConfig) -> int:
    """Write the report of a run in any state. Returns: 0."""
    run = runs.find_run(cfg.model_path, cfg.output_dir) if cfg.model_path else runs.newest(cfg.output_dir)
    path = write_report(run, cfg.artifacts_dir)
    outcome.report(run=run.path, document={"report": str(path)})
    return 0


def write_report(run: runs.Run, artifacts_dir: str | Path = "artifacts") -> Path:
    """Write `report.html` into the run directory; the base model's predictions are read from `artifacts_dir`."""
    path = run.path / REPORT
    write_text(path, render_page(run, Path(artifacts_dir)))
    log.info("report: %s", path)
    return path


def render_page(run: runs.Run, artifacts_dir: Path) -> str:
    """The HTML page. Every text is redacted when it is read, and escaped when it is written."""
    notes: list[str] = []
    manifest, result, comparison, data = (
        _read(run, name, notes) for name in ("manifest", "metrics", "comparison", "data_report")
    )
    gate = view_model.gate_view(comparison, result, str(manifest.get("task", "")))
    folder = _evaluation_folder(run)
    splits = _splits(folder, artifacts_dir, result, comparison, gate, notes)
    scores = view_model.scores(comparison, result)
    values = {
        "name": NAME,
        "version": VERSION,
        "made": runs.now(),
        "run": run.id,
        "run_name": str(manifest.get("run_name") or ""),
        "status": run.status_text,
        "manifest": manifest,
        "verdict": view_model.verdict(run.status_text, manifest, result, comparison),
        "compared": bool(comparison.get("rows")),
        "gate": gate,
        "decisive": view_model.decisive(scores, gate),
        "scores": scores,
        "axis_range": charts.axis_with_zero(
            v for rows in scores.values() for r in rows if r.bounded for v in r.on_axis
        ),
        "splits": splits,
        "curves": _curves(run, notes),
        "train": result.get("train") or {},
        "data": data,
        "settings": lineage.settings(redact(_text(run.path / "config_used.yaml"))),
        "evaluated_with": redact(_text(folder / "config_used.yaml")),
        "lineage": lineage.lineage(manifest, result),
        "files": lineage.files(manifest, result),
        "packages": manifest.get("packages") or {},
        "notes": notes,
    }
    return _template().render(values)


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=ChainableUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": charts.number, "count": charts.count, "day": _day}
    environment.globals |= {"charts": charts, "view": view_model, "duration": lineage.duration}
    return environment.get_template("page.html.j2")


def _day(time: str | None) -> str:
    try:
        return datetime.fromisoformat(str(time)).strftime("%-d %B %Y, %H:%M UTC")
    except ValueError:
        return ""


def _read(run: runs.Run, name: str, notes: list[str]) -> dict[str, Any]:
    """A JSON file of the run, {} if it does not exist; a note is added if it cannot be read."""
    path = run.path / f"{name}.json"
    if not path.exists():
        return {}
    try:
        return dict(redact(read_object(path, runs.FIGURES if name == "metrics" else ())))
    except RunError:
        notes.append(f"{path.name} cannot be read and is not shown")
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _evaluation_folder(run: runs.Run) -> Path:
    """The folder with the predictions of the newest evaluation."""
    try:
        newest = evaluations.newest(run)
    except RunError:  # another note says so
        newest = None
    return newest.folder if newest else run.path / evaluations.EVALS


def _splits(
    folder: Path, artifacts_dir: Path, result: Mapping[str, Any], comparison: Mapping[str, Any],
    gate: view_model.GateView, notes: list[str],
) -> list[examples.SplitView]:  # fmt: skip
    """The predictions on each split, the split that decides first."""
    names = sorted(result.get("eval") or {}, key=lambda name: name != gate.split)
    base = view_model.baseline(artifacts_dir, result, comparison) if names else None
    if comparison and base is None:
        notes.append(
            f"The base model's predictions on these prompts are not in {artifacts_dir}/metrics; "
            "make eval-baseline generates them"
        )
    lower = view_model.better(result, gate.metric) == "lower"
    found = []
    for name in names:
        file = f"{name}.predictions.jsonl"
        split = examples.read_split(name, folder / file, base / file if base else None, gate.metric, lower)
        if split is not None:
            found.append(split)
    return found


def _curves(run: runs.Run, notes: list[str]) -> list[dict[str, Any]]:
    """One figure for each entry of CURVES that was logged."""
    from ...utils.event_files import Curves  # imports TensorBoard, which takes most of a second

    try:
        known = Curves.read(run.logs)
    except Exception as error:  # from protobuf, for a damaged file
        notes.append(f"The curves in logs/ cannot be read: {error}")
        return []
    figures = []
    for title, tags in CURVES:
        lines = [charts.PlotLine(*style, list(known[tag])) for tag, style in tags.items() if known.get(tag)]
        if lines:
            description = "; ".join(
                view_model.describe_curve(line.name, line.points, "lowest" if title == "Loss" else "highest")
                for line in lines
            )
            figures.append(
                {
                    "title": title,
                    "lines": lines,
                    "description": description,
                    "chart": charts.line_chart(lines, description),
                }
            )
    return figures
