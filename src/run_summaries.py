"""What the run table shows of each run, with an index, so that thousands of runs are listed at once.

outputs/runs/.index.json   {"code": hash, "runs": {id: {"stamp": [...], "facts" ...}}}
An entry counts while the files of its run are unchanged. An index that is missing, damaged, or written by other
code is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from . import VERSION, run_names
from .errors import RunError
from .run_names import data_name, format_lr, run_name
from .runs import CONFIG, FIGURES, RUNNING, Run, run_dirs, status_text_of
from .utils.files import read_object, write_text

LOSSES = ("eval_loss", "train_loss", "loss")  # lower is better
INDEX = ".index.json"
FILES = ("manifest.json", CONFIG, "metrics.json", "comparison.json")  # what an entry is made from
MIN_INDEXED = 50  # runs; fewer are read in no time
WRONG_SHAPE = (AttributeError, TypeError, ValueError, KeyError)

Entry = dict[str, Any]  # `problem`, or `facts`, `scores`, `lower` and `live`


class RunSummary(NamedTuple):
    """The columns of a run.

    facts: texts by column.
    scores: `{test/rougeL: 0.4}`, and the losses of training.
    lower: names of the scores for which lower is better.
    """

    facts: dict[str, str]
    scores: dict[str, float]
    lower: frozenset[str]


def all_summaries(output_dir: str | Path) -> tuple[list[RunSummary], list[str]]:
    """The columns of all runs, the latest start first; and a line for each run that cannot be read."""
    root = Path(output_dir) / "runs"
    listed = run_dirs(output_dir)
    try:
        return _sorted_out(_indexed(root, listed, _read_index(root)))
    except WRONG_SHAPE:  # an index that was changed by hand
        return _sorted_out(_indexed(root, listed, {}))


def summaries_of(listed: Sequence[Run]) -> tuple[list[RunSummary], list[str]]:
    """As `all_summaries`, of these runs."""
    return _sorted_out({run.id: _entry(run) for run in listed})


def summary_of(run: Run) -> RunSummary:
    """Raises: RunError if its records have another shape."""
    found, problems = summaries_of([run])
    if problems:
        raise RunError(f"run {problems[0].replace('  ', ': ')}")
    return found[0]


def _sorted_out(entries: Mapping[str, Entry]) -> tuple[list[RunSummary], list[str]]:
    """The columns, and the lines of the runs without; the status is that of now."""
    found, missing = [], sorted(f"{id}  {x['problem']}" for id, x in entries.items() if "problem" in x)
    for entry in entries.values():
        if "problem" not in entry:
            live = entry["live"]
            status = status_text_of(live) + (f": {live['error']}" if live["error"] else "")
            facts = entry["facts"] | {"status": " ".join(status.split())}
            found.append(RunSummary(facts, entry["scores"], frozenset(entry["lower"])))
    found.sort(key=lambda x: (x.facts["started"], len(x.facts["run"]), x.facts["run"]), reverse=True)
    return found, missing


# The index


def _indexed(root: Path, listed: Sequence[Run], index: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entry of each run, from the index where it is current; the index is written if it was not."""
    entries: dict[str, Entry] = {}
    for run in listed:
        stamp = _stamp(run)
        known = index.get(run.id, {})
        entries[run.id] = known if known.get("stamp") == stamp else _entry(run) | {"stamp": stamp}
    if entries != index and len(entries) >= MIN_INDEXED:
        with suppress(RunError, OSError):  # in a folder of another user
            write_text(root / INDEX, json.dumps({"code": _code(), "runs": entries}))
    return entries


def _read_index(root: Path) -> Mapping[str, Entry]:
    with suppress(OSError, *WRONG_SHAPE):
        found = json.loads((root / INDEX).read_text(encoding="utf-8"))
        if found["code"] == _code():
            return dict(found["runs"])
    return {}


def _stamp(run: Run) -> list[list[int] | None]:
    """What changes with every change of the run's files."""
    stamp: list[list[int] | None] = []
    for name in FILES:
        try:
            found = os.stat(os.path.join(run.path, name))
            stamp.append([found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns])
        except OSError:
            stamp.append(None)
    return stamp


def _code() -> str:
    sources = b"".join(Path(str(module)).read_bytes() for module in (__file__, run_names.__file__))
    return hashlib.sha256(VERSION.encode() + sources).hexdigest()


# One run


def _entry(run: Run) -> Entry:
    manifest = run.readable_manifest
    if manifest is None:
        return {"problem": "its manifest.json cannot be read"}
    try:
        return _summarise(run, manifest)
    except (RunError, *WRONG_SHAPE):  # which must not hide the others
        return {"problem": "its metrics.json or comparison.json is damaged"}


def _summarise(run: Run, manifest: Mapping[str, Any]) -> Entry:
    """Everything but the status, which depends on processes: `live` is what it is made from."""
    settings = _learning_rate(run) if manifest["stage"] == "train" else {}
    metrics = _read(run.path / "metrics.json", FIGURES)
    verdict = _read(run.path / "comparison.json").get("verdict") or {}
    outcome = str(verdict.get("outcome", ""))
    facts = {
        "started": str(manifest["started"]),
        "name": run_name(manifest, settings) if manifest["stage"] == "train" else "",
        "run": run.id,
        "stage": str(manifest["stage"]),
        "method": str(manifest.get("method", "")),
        "base": str(manifest.get("base_model", {}).get("name", "")).rstrip("/").rsplit("/", 1)[-1],
        "data": data_name(manifest.get("data", {})),
        "data version": _data_version(manifest.get("data", {})),
        "lr": format_lr(settings.get("lr")),
        "verdict": "inconclusive" if outcome == "cannot_tell" else outcome.replace("_", " "),
    }
    scores = {k: float(v) for k, v in metrics.get("train", {}).items() if k in LOSSES and is_number(v)}
    lower = set(LOSSES)
    for split, values in metrics.get("eval", {}).items():
        for metric, value in values.items():
            scores[f"{split}/{metric}"] = float(value)
            if metrics.get("metrics", {}).get(metric, {}).get("better") == "lower":
                lower.add(f"{split}/{metric}")
    decided = f"{verdict.get('split')}/{verdict.get('metric')}"
    facts["named"] = str(manifest.get("run_name") or "")
    facts["decided by"] = decided if decided in scores else ""
    return {"facts": facts, "scores": scores, "lower": sorted(lower), "live": _live(manifest)}


def _live(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that its status is made from."""
    kept = {"status": record["status"], "error": record.get("error")}
    if record["status"] == RUNNING:
        kept["process"] = record["process"]
    return kept | ({"evaluation": _live(record["evaluation"])} if "evaluation" in record else {})


def _data_version(data: Mapping[str, Any]) -> str:
    """The shortened commit, revision or hash of the training data, with the number of further files."""
    for key in ("commit", "revision", "sha256"):
        if data.get(key):
            return str(data[key])[:12]
    hashes = [str(f["sha256"]) for f in data.get("files", []) if f.get("sha256")]
    return (hashes[0][:12] + (f" +{len(hashes) - 1}" if len(hashes) > 1 else "")) if hashes else ""


def _learning_rate(run: Run) -> Mapping[str, Any]:
    """The setting lr of a run. To read all of its settings as YAML takes fifty times as long."""
    with suppress(OSError, ValueError, TypeError, yaml.YAMLError):
        if line := re.search(r"^lr: .*$", (run.path / CONFIG).read_text(encoding="utf-8"), re.MULTILINE):
            return dict(yaml.safe_load(line[0]))
    with suppress(RunError):
        return run.settings
    return {}


def _read(path: Path, groups: Sequence[str] = ()) -> Mapping[str, Any]:
    """A JSON file of a run; empty if it is missing or corrupt, which must not prevent the table."""
    try:
        return read_object(path, groups) if path.is_file() else {}
    except RunError:
        return {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
