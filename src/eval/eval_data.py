"""The evaluation files of a run: those that it was trained with, unless others are named.

Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import config
from ..data.eval_files import NO_DATA, eval_path_of, find_eval_path, split_files
from ..errors import DataError, UserError
from ..runs import Run
from ..schema import DataArgs, TrainConfig
from ..utils.commands import command
from ..utils.files import read_object
from ..utils.units import count
from .inherit import FORMER_DEFAULTS

KINDS = ("exact", "normalised", "near")  # of matches between training and evaluation rows
ORDER = ("test", "dev", "adversarial")  # the first splits of every table, then the others by name


def find_files(
    eval_path: str | None, splits: list[str] | None, run: Run | None, folder: Path | None = None
) -> dict[str, Path]:
    """The file of each split that is evaluated.

    Args:
        eval_path: None, or as the run was trained: its evaluation files, with the rows that it held out.
        splits: None: every split that is there.
        run: the run that is evaluated; None for a model without a run.
        folder: the model of such an evaluation, for the message; None: a base model, evaluated on the files of the
            default training data.
    Raises: DataError if there are no evaluation files, or none for a named split.
    """
    eval_path = None if eval_path == NO_DATA else eval_path
    recorded = _recorded(run) if run else None
    held_out = held_out_file(run) if run and eval_path in (None, recorded) else None
    path = eval_path or recorded
    if run is None and folder is None:
        path = eval_path or _text(find_eval_path(None, DataArgs.dataset_path))
    found = split_files(path, held_out)
    if not found:
        raise DataError(*_none_found(path, run, folder), hint=_remedy(run))
    missing = [name for name in splits or [] if name not in found]
    if missing:
        in_folder = path is not None and Path(path).is_dir()
        fact = f"{path}/{{}}.jsonl does not exist" if in_folder else "there is no split {}"
        raise DataError(
            *(fact.replace("{}", name) for name in missing),
            hint=f"set splits to some of {', '.join(_ordered(found))}, or set eval_path",
        )
    chosen = {name: found[name] for name in splits or _ordered(found)}
    if run and held_out and held_out in chosen.values() and not held_out.is_file():
        fact = f"{held_out}, the rows that run {run.id} held out of its training data, does not exist"
        raise DataError(fact, hint=f"restore it, or {_remedy(run)}")
    return chosen


def _ordered(names: Mapping[str, Any]) -> list[str]:
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def _recorded(run: Run) -> str | None:
    """The evaluation path that a run was trained with."""
    manifest = run.manifest
    if "evaluation_data" in manifest:
        return _text((manifest["evaluation_data"] or {}).get("path"))
    try:
        settings = run.settings
        typed = settings.get("eval_path")
        if typed != FORMER_DEFAULTS["eval_path"] or manifest["stage"] != "train":
            return _text(typed)
        known = {key: value for key, value in settings.items() if key in config.defaults("train")}
        cfg: TrainConfig = config.load("train", known | {"eval_path": None})
    except UserError:
        return None
    return eval_path_of(cfg, None)  # the last version recorded its default, for any training data


def held_out_file(run: Run | None) -> Path | None:
    """The file of the rows that `eval_split` held out of the run's training data; None if it held out none."""
    if run is None:
        return None
    name = (run.manifest.get("evaluation_data") or {}).get("held_out")
    return run.path / name if name else None


def _text(path: object) -> str | None:
    return None if path is None else str(path)


def _none_found(path: str | None, run: Run | None, folder: Path | None) -> list[str]:
    if path is not None:
        there = Path(path).exists()
        return [f"{path} {'holds no data files' if there else 'does not exist'}"]
    if run:
        return [f"run {run.id} was trained without evaluation data"]
    return [f"{folder} does not say on what it is evaluated" if folder else "there is no evaluation data"]


def _remedy(run: Run | None) -> str:
    named = "set eval_path to a folder with test.jsonl"
    if run is None or run.manifest["stage"] != "train":
        return named
    typed = command("eval", run.word, eval_path="FOLDER")
    return f"{named}: {typed}; or train with eval_split=0.1, which holds rows out"


def changes_since_training(run: Run, files: Mapping[str, Path], hashes: Mapping[str, str]) -> dict[str, str]:
    """By split a sentence for each evaluation file that is not as it was when the run was trained.

    Training rows were not compared with such a file then; nor were, with any file, those of the model that a run
    goes on from. Runs of earlier versions have no record.
    """
    known = (run.manifest.get("evaluation_data") or {}).get("files")
    if known is None:
        return {}
    found = {}
    for split, file in files.items():
        if hashes[split] in known.values():
            if parent := run.manifest.get("init_from"):
                found[split] = f"{file} was not compared with the training rows of {parent['name']}"
            continue
        how = "has changed since" if split in known and _was_there(run, file) else "was not there when"
        found[split] = f"{file} {how} run {run.id} was trained"
    return found


def trained_on_scored_rows(result: Mapping[str, Any], splits: Iterable[str] | None = None) -> str:
    """A sentence if rows of an evaluation are among the training rows of its run; else empty.

    Args:
        result: the content of metrics.json.
        splits: those that count; None: all.
    """
    overlaps: Mapping[str, Any] = result.get("contamination") or {}
    chosen = [name for name in overlaps if splits is None or name in splits]
    sure = {name: overlaps[name].get("exact", 0) + overlaps[name].get("normalised", 0) for name in chosen}
    parts = [f"{count(number, 'row')} of {name}" for name, number in sure.items() if number]
    if not parts:
        return ""
    are = "is" if sum(sure.values()) == 1 else "are"
    return f"{' and '.join(parts)} {are} among the training rows, so the scores are not valid"


def trained_on_evaluation_data(run: Run) -> str:
    """A sentence if rows that occur in the run's evaluation data were trained on; else empty."""
    path = run.path / "data_report.json"
    found = read_object(path, ["contamination"]).get("contamination", {}) if path.is_file() else {}
    counts = {kind: found[kind] for kind in KINDS if found.get(kind)}
    if not counts or run.settings.get("on_contamination") != "keep":
        return ""
    total = sum(counts.values())
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in counts.items())
    occur, were = ("occurs", "was") if total == 1 else ("occur", "were")
    return (
        f"{count(total, 'training row')} {occur} in the evaluation files ({kinds}) and {were} trained on "
        "(on_contamination=keep), so the scores are not valid"
    )


def _was_there(run: Run, file: Path) -> bool:
    """Whether a file is where the run had its evaluation data: its folder, its file, or its held-out rows."""
    recorded = _recorded(run)
    places = {Path(recorded)} if recorded else set()
    return bool({file, file.parent} & places) or file == held_out_file(run)
