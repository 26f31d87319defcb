"""Evaluation files: where the evaluation data of a training run is, and which file holds which split.

The default of `eval_path` is the folder `eval/` inside `dataset_path` or beside it. Such a folder may hold a file
belongs_to.json, `{"training_files": {name: sha256}, "files": {name: sha256}}`. As long as it holds no other
evaluation files than these, it is the default for these training files only.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from os.path import isfile  # false, unlike Path.is_file, for a name that no file can have
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from ..schema import Dataset, TrainConfig, TrainDataArgs
from ..utils.files import sha256
from .readers import BELONGS_TO, is_data_file
from .readers.stream import ARCHIVES

NO_DATA = "none"  # value of eval_path: no evaluation data, although there is a folder
FOLDER = "eval"
ONLY_SPLIT = "test"  # the split of an eval_path that is a file, and of the rows that a run holds out


class TrainingFiles(NamedTuple):
    """The training files of one local data set: a file, or those of a folder that match `pattern` (None: all)."""

    path: Path
    pattern: str | None = None


def find_eval_path(
    eval_path: str | None, dataset_path: str, datasets: Sequence[Dataset] = (), pattern: str | None = None
) -> Path | None:
    """`eval_path`, or where it is not set the evaluation folder of the training data; None if there is none.

    Args:
        datasets: several data sets instead of `dataset_path`. The first one that has an evaluation folder counts.
        pattern: glob of the training files in `dataset_path`; None: any.
    """
    if eval_path is not None:
        return Path(eval_path)
    return next((folder for place in _places(dataset_path, datasets, pattern) for folder in _folders(place)), None)


def eval_path_of(args: TrainDataArgs, eval_path: str | None) -> str | None:
    """`find_eval_path` for the data of a training run. Only local data sets have a default."""
    from .sources import parse_train_data_config  # which imports the clients of remote sources

    if eval_path is not None:
        return eval_path
    datasets = list(args.datasets)
    if args.trainDataConfig and not datasets:
        datasets = parse_train_data_config(args.trainDataConfig)
    if args.data_source.type != "local" and not datasets:
        return None
    found = find_eval_path(None, args.dataset_path, datasets, args.dataset_pattern)
    return None if found is None else str(found)


def held_out_split(eval_path: str | None) -> str:
    """The split of the rows that `eval_split` holds out: test, or held_out where there is a file for test."""
    return "held_out" if ONLY_SPLIT in split_files(eval_path) else ONLY_SPLIT


def why_no_eval_loss(cfg: TrainConfig) -> str:
    """Why a training run has no evaluation loss, as the end of a sentence with the remedy; empty if it has one."""
    path = eval_path_of(cfg, cfg.eval_path)
    splits = [*split_files(path), *([held_out_split(path)] if cfg.eval_split else [])]
    if cfg.dev_split in splits:
        return ""
    if not splits and path not in (None, NO_DATA):
        return f"{path} holds no data file; set eval_path to a folder with {cfg.dev_split}.jsonl"
    if not splits:
        return f"there is no evaluation data; eval_split=0.1 with dev_split={ONLY_SPLIT} holds rows out for it"
    chosen = ONLY_SPLIT if ONLY_SPLIT in splits else splits[0]
    known = ", ".join(splits)
    setting = f"dev_split={shlex.quote(chosen)}"
    return f"there is no split {cfg.dev_split} (there is {known}); {setting} computes it on {chosen}"


def foreign_eval_path(dataset_path: str, datasets: Sequence[Dataset] = ()) -> Path | None:
    """An evaluation folder beside the training data that belongs to other training files, for a message."""
    folders = (folder for place in _places(dataset_path, datasets, None) for folder in _candidates(place.path))
    return next((folder for folder in folders if (folder / BELONGS_TO).is_file()), None)


def mixed_files(eval_path: str | None, args: TrainDataArgs) -> list[Path]:
    """The evaluation files that belong to other training files, in a folder that holds the user's own too."""
    folder = Path(eval_path or "")
    if eval_path is None or not (folder / BELONGS_TO).is_file():
        return []
    record = _read_record(folder)
    theirs = _recorded_files(folder, record)
    places = _places(args.dataset_path, args.datasets, args.dataset_pattern)
    is_mixed = len(theirs) < len(split_files(folder))
    mixed = is_mixed and not any(_trains_on(record.training_files, place) for place in places)
    return theirs if mixed else []


class _Record(NamedTuple):
    """The content of belongs_to.json: the sha256 of each file by its name. files: None if it names none."""

    training_files: Mapping[str, str]
    files: Mapping[str, str] | None


def _read_record(folder: Path) -> _Record:
    """Raises: DataError if the file is not of this form."""
    path = folder / BELONGS_TO
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error})", hint="mend it, or remove it") from None
    record = _Record(found.get("training_files", {}), found.get("files")) if isinstance(found, dict) else None
    if record is None or not all(_are_hashes(names) for names in record if names is not None):
        form = '{"training_files": {"NAME": "SHA256"}, "files": {"NAME": "SHA256"}}'
        raise DataError(f"{path} is not of the form {form}", hint="mend it, or remove it")
    return record


def _are_hashes(names: object) -> bool:
    return isinstance(names, dict) and all(isinstance(value, str) for value in names.values())


def _recorded_files(folder: Path, record: _Record) -> list[Path]:
    """The evaluation files that belongs_to.json names, unless they have changed; all of them if it names none."""
    files, known = list(split_files(folder).values()), record.files
    return [f for f in files if known is None or (f.name in known and sha256(f) == known[f.name].lower())]


def split_files(eval_path: str | Path | None, held_out: Path | None = None) -> dict[str, Path]:
    """The file of each split, by the name of the split, sorted.

    A folder has one split for each of its data files, named by the file without its suffixes. A file is the split
    `test`. Empty if nothing is there.

    Args:
        held_out: file of the rows that a run held out of its training data: one more split, named likewise.
    Raises: DataError if two files have the name of the same split.
    """
    found = [held_out] if held_out else []
    folder = Path(eval_path) if eval_path not in (None, NO_DATA) else None
    if folder and folder.is_file():
        return _by_split([(ONLY_SPLIT, folder), *((_split_name(file), file) for file in found)])
    if folder and folder.is_dir():
        found += [file for file in folder.iterdir() if _is_split(file)]
    return _by_split([(_split_name(file), file) for file in found])


def _by_split(files: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, file in sorted(files):
        if name in found:
            raise DataError(f"{found[name]} and {file} both are the split {name}", hint="rename one of them")
        found[name] = file
    return found


def _is_split(file: Path) -> bool:
    return file.is_file() and is_data_file(file) and not file.name.startswith(".")


def _split_name(file: Path) -> str:
    return Path(file.stem).stem if file.suffix.lower() in ARCHIVES else file.stem


def _places(dataset_path: str, datasets: Sequence[Dataset], pattern: str | None) -> list[TrainingFiles]:
    if not datasets:
        return [TrainingFiles(Path(dataset_path), pattern)]
    return [TrainingFiles(Path(d.path), d.pattern) for d in datasets if d.data_source.type == "local"]


def _candidates(path: Path) -> Iterator[Path]:
    """The folders that may be the evaluation folder of the training data at `path`."""
    folders = [path / FOLDER] if path.is_dir() else []
    yield from (folder for folder in (*folders, path.parent / FOLDER) if folder.is_dir() and split_files(folder))


def _folders(place: TrainingFiles) -> Iterator[Path]:
    return (folder for folder in _candidates(place.path) if _belongs(folder, place))


def _belongs(folder: Path, place: TrainingFiles) -> bool:
    """Whether a folder is the evaluation folder of these training files."""
    if not (folder / BELONGS_TO).is_file():
        return True
    record = _read_record(folder)
    is_mixed = len(_recorded_files(folder, record)) < len(split_files(folder))
    return is_mixed or _trains_on(record.training_files, place)


def _trains_on(known: Mapping[str, str], place: TrainingFiles) -> bool:
    """Whether one of the training files is among the `known` ones, by name and hash."""
    if place.path.is_file():
        return place.path.name in known and sha256(place.path) == known[place.path.name].lower()
    files = [(place.path.absolute() / name, digest) for name, digest in known.items()]
    trained = [(f, digest) for f, digest in files if isfile(f) and f.match(place.pattern or "*")]
    return any(sha256(file) == digest.lower() for file, digest in trained)
