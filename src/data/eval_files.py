"""Evaluation files: where the evaluation data of a training run is, and which file holds which split.

The default of `eval_path` is the folder `eval/` inside `dataset_path` or beside it. Such a folder may hold a file
belongs_to.json, `{"training_files": {name: sha256}, "files": {name: sha256}}`. As long as it holds no other
evaluation files than these, it is the default for these training files only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from ..schema import Dataset, TrainConfig, TrainDataArgs
from ..utils.files import read_json, sha256
from .readers import is_data_file
from .readers.stream import ARCHIVES

NO_DATA = "none"  # value of eval_path: no evaluation data, although there is a folder
FOLDER = "eval"
BELONGS_TO = "belongs_to.json"
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
    return f"there is no split {cfg.dev_split} (there is {known}); dev_split={chosen} computes it on {chosen}"


def foreign_eval_path(dataset_path: str, datasets: Sequence[Dataset] = ()) -> Path | None:
    """An evaluation folder beside the training data that belongs to other training files, for a message."""
    folders = (folder for place in _places(dataset_path, datasets, None) for folder in _candidates(place.path))
    return next((folder for folder in folders if (folder / BELONGS_TO).is_file()), None)


def mixed_files(eval_path: str | None, args: TrainDataArgs) -> list[Path]:
    """The evaluation files that belong to other training files, in a folder that holds the user's own too."""
    folder = Path(eval_path or "")
    if eval_path is None or not (folder / BELONGS_TO).is_file():
        return []
    theirs = _recorded_files(folder)
    training = read_json(folder / BELONGS_TO).get("training_files", {})
    places = _places(args.dataset_path, args.datasets, args.dataset_pattern)
    mixed = len(theirs) < len(split_files(folder)) and not any(_trains_on(training, place) for place in places)
    return theirs if mixed else []


def _recorded_files(folder: Path) -> list[Path]:
    """The evaluation files that belongs_to.json names, unless they have changed; all of them if it names none."""
    files = list(split_files(folder).values())
    known = read_json(folder / BELONGS_TO).get("files")
    return [f for f in files if known is None or (f.name in known and sha256(f) == known[f.name])]


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
    return file.is_file() and is_data_file(file) and file.name != BELONGS_TO and not file.name.startswith(".")


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
    record = folder / BELONGS_TO
    if not record.is_file() or len(_recorded_files(folder)) < len(split_files(folder)):
        return True
    known = read_json(record).get("training_files", {})
    return _trains_on(known, place)


def _trains_on(known: dict[str, str], place: TrainingFiles) -> bool:
    """Whether one of the training files is among the `known` ones, by name and hash."""
    if place.path.is_file():
        return place.path.name in known and sha256(place.path) == known[place.path.name]
    files = [(place.path.absolute() / name, digest) for name, digest in known.items()]
    trained = [(file, digest) for file, digest in files if file.is_file() and file.match(place.pattern or "*")]
    return any(sha256(file) == digest for file, digest in trained)
