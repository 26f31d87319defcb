"""report.html: what a run came to, for people. One file without script, which asks no network for anything.

It is made from the files of the run directory alone, and of any run: one that failed, that still goes on, that was
never evaluated, or whose files are older than this code. What is not there is said, and the rest is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from src import NAME, VERSION, runs
from src.errors import RunError
from src.eval.report import charts, examples, lineage, view_model
from src.schema import ReportConfig
from src.utils.files import read_json, write_text
from src.utils.logs import log
from src.utils.secrets import redact

REPORT = "report.html"
CURVES = (  # title, then the tags of its lines with their names
    ("Loss", {"train/loss": ("training", "train"), "eval/loss": ("held out", "held-out")}),
    ("Learning rate", {"train/learning_rate": ("learning rate", "train")}),
    ("Gradient norm", {"train/grad_norm": ("gradient norm", "train")}),
    ("Tokens a second", {"train/tokens_per_second": ("tokens a second", "train")}),
)


def report(cfg: ReportConfig) -> int:
    """Write the report of a run, finished or not."""
    run = runs.find_run(cfg.model_path, cfg.output_dir) if cfg.model_path else runs.newest(cfg.output_dir)
    write(run, cfg.artifacts_dir)
    return 0


def write(run: runs.Run, artifacts_dir: str | Path = "artifacts") -> Path:
    """Write `report.html` into the run's directory. The base model's answers are looked for in `artifacts_dir`."""
    path = run.path / REPORT
    write_text(path, page(run, Path(artifacts_dir)))
    log.info("report: %s", path)
    return path


def page(run: runs.Run, artifacts_dir: Path) -> str:
    """The whole page. Every text passes `redact` where it is read, and is escaped where it is written."""
    notes: list[str] = []
    manifest, result, comparison, data = (
        _read(run, name, notes) for name in ("manifest", "metrics", "comparison", "data_report")
    )
    gate = view_model.gate_of(comparison, result, str(manifest.get("task", "")))
    splits = _splits(run, artifacts_dir, result, comparison, gate, notes)
    scores = view_model.scores(comparison, result)
    values = {
        "name": NAME,
        "version": VERSION,
        "made": runs.now(),
        "run": run.id,
        "status": run.status_text,
        "manifest": manifest,
        "verdict": view_model.verdict(run.status_text, manifest, result, comparison),
        "compared": bool(comparison.get("rows")),
        "gate": gate,
        "decisive": view_model.decisive(scores, gate),
        "scores": scores,
        "span": charts.around(v for rows in scores.values() for r in rows if r.share for v in r.on_axis),
        "splits": splits,
        "curves": _curves(run, notes),
        "train": result.get("train") or {},
        "data": data,
        "settings": lineage.settings(redact(_text(run, "config_used.yaml"))),
        "evaluated_with": redact(_text(run, "evals/config_used.yaml")),
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
    environment.globals |= {"charts": charts, "facts": view_model, "took": lineage.took}
    return environment.get_template("page.html.j2")


def _day(time: str | None) -> str:
    try:
        return datetime.fromisoformat(str(time)).strftime("%-d %B %Y, %H:%M UTC")
    except ValueError:
        return ""


def _read(run: runs.Run, name: str, notes: list[str]) -> dict[str, Any]:
    """A file of the run as it is, an empty one where it is missing; what cannot be read is noted."""
    path = run.path / f"{name}.json"
    if not path.exists():
        return {}
    try:
        found = redact(read_json(path))
    except RunError:
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name} cannot be read, and is left out")
        return {}
    return found


def _text(run: runs.Run, name: str) -> str:
    path = run.path / name
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _splits(
    run: runs.Run, artifacts_dir: Path, result: Mapping[str, Any], comparison: Mapping[str, Any],
    gate: view_model.Gate, notes: list[str],
) -> list[examples.Split]:  # fmt: skip
    """The answers to each split, the deciding one first."""
    names = sorted(result.get("eval") or {}, key=lambda name: name != gate.split)
    base = view_model.baseline(artifacts_dir, result, comparison) if names else None
    if comparison and base is None:
        notes.append(
            f"The base model's answers to these prompts are not in {artifacts_dir}/metrics; make eval-baseline "
            "makes them anew"
        )
    lower = view_model.better(result, gate.metric) == "lower"
    found = []
    for name in names:
        file = f"{name}.predictions.jsonl"
        split = examples.read_split(
            name, run.path / "evals" / file, base / file if base else None, gate.metric, lower
        )
        if split is not None:
            found.append(split)
    return found


def _curves(run: runs.Run, notes: list[str]) -> list[dict[str, Any]]:
    """A figure for each of CURVES that the run has points of."""
    from src.utils.event_files import Curves  # TensorBoard: most of a second

    try:
        known = Curves.read(run.logs)
    except Exception as error:  # protobuf's, of a damaged file
        notes.append(f"The curves in logs/ cannot be read: {error}")
        return []
    figures = []
    for title, tags in CURVES:
        lines = [charts.Line(*about, list(known[tag])) for tag, about in tags.items() if known.get(tag)]
        if lines:
            said = "; ".join(
                view_model.told(line.name, line.points, "lowest" if title == "Loss" else "highest")
                for line in lines
            )
            figures.append({"title": title, "lines": lines, "said": said, "chart": charts.curve(lines, said)})
    return figures
