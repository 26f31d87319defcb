"""Data sources: each provides a local folder and the exact version that it holds.

To add a source, write a function `(source, cache folder) -> FetchedData` and enter it in SOURCES, and in RECORDED
one that gives the folder of a version that a manifest records. Add its name to schema.DataSource.type, and to
schema.SOURCE_KEYS the keys that it reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import MAX_LISTED, ConfigError, DataError
from ..schema import ColumnArgs, DataArgs, DataFormat, Dataset, DataSource, TrainDataArgs
from ..utils.logs import log
from ..utils.units import count
from . import layouts
from .column_mapping import STRATEGIES
from .download import FetchedData
from .from_hub import CARD, fetch_hub, recorded_hub
from .from_lakefs import fetch_lakefs, recorded_lakefs
from .from_s3 import fetch_s3, recorded_s3
from .from_url import fetch_url, recorded_url, refuse_other_url
from .layouts import TRAIN, is_hidden, split_of
from .readers import NO_DATA, READERS, file_kind, is_data_file, read_options

SOURCES: dict[str, Callable[[DataSource, Path], FetchedData]] = {
    "local": lambda _source, _cache: FetchedData(Path(), {"type": "local"}),  # read in place, from dataset_path
    "lakefs": fetch_lakefs,
    "hub": fetch_hub,
    "url": fetch_url,
    "s3": fetch_s3,
}
Version = Mapping[str, Any]  # of a source, as the manifest of a run records it
# The folder of a recorded version: from the cache, else from the server, whatever its newest version is.
RECORDED: dict[str, Callable[[DataSource, Path, Version], Path]] = {
    "lakefs": recorded_lakefs,
    "hub": recorded_hub,
    "url": recorded_url,
    "s3": recorded_s3,
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class DataPart:
    """The files of one data set at one version, and how to read their rows."""

    files: list[Path]
    version: dict[str, Any]
    data_format: DataFormat
    columns: ColumnArgs
    weight: float = 1
    like_held_out: tuple[Path, ...] = ()  # the files of a glob that are named like a held-out split
    not_matched: tuple[Path, ...] = ()  # data files of the folder that its default pattern leaves out


class _Found(NamedTuple):
    """The files of a data set, sorted by name or in the order of their layout, and their version."""

    files: list[Path]
    version: dict[str, Any]
    like_held_out: tuple[Path, ...] = ()
    not_matched: tuple[Path, ...] = ()


def data_cache(cache_dir: str | None, output_dir: str) -> Path:
    """The folder that caches fetched and tokenized data."""
    return Path(cache_dir or Path(output_dir) / "cache")


def fetch_parts(args: TrainDataArgs, cache: Path, versions: Sequence[Version] = ()) -> list[DataPart]:
    """The files of every data set, fetched into `cache` unless they are local.

    Args:
        versions: recorded versions to read instead of the newest ones, one for each data set, or none at all.
    Raises: ConfigError if both `datasets` and `trainDataConfig` are set; DataError if a data set has no files or
        cannot be fetched.
    """
    datasets = _data_sets(args)
    wanted = _one_each(versions, len(datasets or [args]))
    if not datasets:
        fetched = _fetch(args.data_source, cache, wanted[0])
        found = _files(args.dataset_path, args.dataset_pattern, args.data_source, fetched, "dataset_path")
        return [_part(found, args.data_format, args)]
    parts = []
    for i, d in enumerate(datasets):
        fetched = _fetch(d.data_source, cache, wanted[i])
        found = _files(d.path, d.pattern, d.data_source, fetched, f"datasets.{i}.path")
        parts.append(_part(found, d.format, d, d.weight))
    return parts


def fetch_recorded(
    args: TrainDataArgs, cache: Path, versions: Sequence[Version], same_url: bool = False
) -> list[str]:
    """Fetch the recorded `versions` of the data sets. Returns: what they are, in words; empty if all are local.

    Args:
        same_url: refuse a url with hidden parts that has not held its version, though records show it as equal.
    Raises: DataError if one is neither in the cache nor at its source any more.
    """
    sources = [d.data_source for d in _data_sets(args)] or [args.data_source]
    pairs = zip(sources, _one_each(versions, len(sources)), strict=True)
    remote = [(source, version) for source, version in pairs if _is_pinned(source, version)]
    for source, version in remote:
        if same_url and source.type == "url":
            refuse_other_url(source, cache / "sources", version)
        _fetch(source, cache, version)
    return [describe_version(version) for _, version in remote]


def describe_version(version: Version) -> str:
    """The source and the pin of a recorded version, in a few words.

    >>> describe_version({"type": "hub", "repo": "user/name", "revision": "main", "commit": "0123456789abcdef"})
    'hub user/name at commit 0123456789ab'
    """
    name = version.get("repo") or version.get("bucket") or version.get("url")
    pin = next((f"{key} {version[key][:12]}" for key in ("commit", "sha256") if version.get(key)), "")
    return f"{version['type']} {name} at {pin or 'its recorded objects'}"


def _data_sets(args: TrainDataArgs) -> list[Dataset]:
    """`datasets` or those of `trainDataConfig`; empty if neither is set."""
    if not args.trainDataConfig:
        return list(args.datasets)
    if args.datasets:
        raise ConfigError("datasets and trainDataConfig both name the data sets", hint="keep one of them")
    datasets = parse_train_data_config(args.trainDataConfig)
    if not datasets:
        raise DataError("trainDataConfig has no entry with exp_type: train", hint="add one to train on")
    return datasets


def _one_each(versions: Sequence[Version], number: int) -> Sequence[Version]:
    """`versions` if there is one for each of the data sets; else as many empty ones, which pin nothing."""
    return versions if len(versions) == number else [{}] * number


def _is_pinned(source: DataSource, version: Version) -> bool:
    """Whether `version` pins what `source` holds. Local data has no version but the present one."""
    keys = ("commit", "objects") if source.type != "url" else ("sha256",)
    return version.get("type") == source.type != "local" and any(version.get(key) for key in keys)


def _fetch(source: DataSource, cache: Path, version: Version) -> FetchedData:
    """The newest version of `source`, or the recorded `version` unless that is empty."""
    if not _is_pinned(source, version):
        return SOURCES[source.type](source, cache / "sources")
    recorded = {key: value for key, value in version.items() if key != "weight"}
    return FetchedData(RECORDED[source.type](source, cache / "sources", recorded), recorded)


def _part(found: _Found, data_format: DataFormat, settings: ColumnArgs, weight: float = 1) -> DataPart:
    columns = _columns(settings)
    return DataPart(
        found.files, found.version, data_format, columns, weight, found.like_held_out, found.not_matched
    )


def parse_train_data_config(config: str | Mapping[str, Any]) -> list[Dataset]:
    """The data sets to train on of a trainDataConfig: `{name: {data_path, strategy, ...}}`, or that as YAML text.

    Raises: ConfigError if it is neither, or has an unknown key or value.
    """
    try:
        found = yaml.safe_load(config) if isinstance(config, str) else config
    except yaml.YAMLError as error:
        raise ConfigError(f"trainDataConfig is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping) or not all(isinstance(entry, Mapping) for entry in found.values()):
        raise ConfigError("trainDataConfig should be {name: {data_path: ..., strategy: QA, ...}}")
    known = {"data_path", "exp_type", *(ColumnArgs.__dataclass_fields__)}
    problems = [f"trainDataConfig.{n}.{k} is not a setting" for n, e in found.items() for k in e if k not in known]
    problems += [f"trainDataConfig.{n} has no data_path" for n, e in found.items() if not e.get("data_path")]
    problems += [
        f"trainDataConfig.{n}.exp_type={e['exp_type']}: should be one of train, eval, inference"
        for n, e in found.items()
        if e.get("exp_type", "train") not in ("train", "eval", "inference")
    ]
    problems += [
        f"trainDataConfig.{n}.strategy={e['strategy']}: should be one of {', '.join(STRATEGIES)}"
        for n, e in found.items()
        if e.get("strategy") not in (None, *STRATEGIES)
    ]
    if problems:
        raise ConfigError(*problems)
    return [_dataset(entry) for entry in found.values() if entry.get("exp_type", "train") == "train"]


def _dataset(entry: Mapping[str, Any]) -> Dataset:
    """`data_path` is a local path; if that does not exist, the id of a data set on the Hub."""
    path = str(entry["data_path"])
    on_the_hub = not os.path.exists(path) and HUB_ID.fullmatch(path)
    source = DataSource(type="hub", repo=path) if on_the_hub else DataSource()
    columns = {k: v for k, v in entry.items() if k not in ("data_path", "exp_type")}
    return Dataset(path=path, data_source=source, **columns)


def _columns(settings: ColumnArgs) -> ColumnArgs:
    """The column settings alone, without the settings of a subclass."""
    read_options(settings.csv_delimiter, settings.encoding)  # refuses wrong ones before a file is read
    return ColumnArgs(**{key: getattr(settings, key) for key in ColumnArgs.__dataclass_fields__})


def _files(path: str, pattern: str | None, source: DataSource, fetched: FetchedData, key: str) -> _Found:
    """The data files, and their version. `key` is the setting that an error names."""
    folder = Path(path) if source.type == "local" else fetched.folder
    if folder.is_file():
        file_kind(folder)
        return _Found([folder], fetched.version)
    if not folder.is_dir():
        raise DataError(f"{key} {folder} is not a folder or a file", hint=f"set {key} to your data")
    if source.type == "url":  # one file, whatever its name
        pattern = None
    files = _only_file(folder, fetched.version) if source.type == "url" else []
    files = files or _chosen_files(folder, pattern, recursive=source.type != "local")
    outside = [f for f in files if not f.resolve().is_relative_to(folder.resolve())]
    if outside:
        raise DataError(
            *(f"{f} is a symbolic link to a file outside {folder}" for f in outside),
            hint=f"set {key} to the folder of its target, or copy the file",
        )
    for file in files:
        file_kind(file)
    named = pattern is not None and not set(pattern) & set("*?[")
    held_out = [] if named else [file for file in files if split_of(file, folder) not in ("", TRAIN)]
    beside = pattern == DataArgs.dataset_pattern and files[0].parent == folder and files[0].match(pattern)
    return _Found(files, fetched.version, tuple(held_out), _not_matched(folder, files) if beside else ())


def _only_file(folder: Path, version: Version) -> list[Path]:
    """The file of a url, if it is one. Raises: DataError if it is of no kind that can be read."""
    files = list(folder.iterdir())
    if len(files) != 1:
        return []
    try:
        file_kind(files[0])
    except DataError:
        raise DataError(
            f"{version.get('url')} is not a data file: neither its name nor its content is of a known kind",
            hint=f"data files are {', '.join(READERS)}; fetch it by hand, name it, and set data_source.type=local",
        ) from None
    return files


def _not_matched(folder: Path, files: list[Path]) -> tuple[Path, ...]:
    """The data files of a folder that are neither chosen nor named like a held-out split. Says those below it."""
    found = sorted(f for pattern in ("*", "*/*") for f in folder.glob(pattern) if is_data_file(f) and f.is_file())
    others = [
        f for f in found if f not in files and not is_hidden(f, folder) and split_of(f, folder) in ("", TRAIN)
    ]
    if below := [str(file.relative_to(folder)) for file in others if file.parent != folder]:
        shown = ", ".join(below[:MAX_LISTED]) + (" ..." if len(below) > MAX_LISTED else "")
        fact = f"{count(len(below), 'data file')} in subfolders not trained on: {shown}"
        log.info("%s: %s; dataset_pattern chooses the files", folder, fact)
    return tuple(f for f in others if f.parent == folder)


def _chosen_files(folder: Path, pattern: str | None, *, recursive: bool) -> list[Path]:
    """The files that match the pattern or, if that is not set or matches nothing, those of the folder's layout.

    Args:
        recursive: the pattern selects files in whichever folder they are.
    """
    default = pattern in (None, DataArgs.dataset_pattern)
    if default and (layouts.is_saved(folder) or (pattern is None and layouts.is_split(folder))):
        return layouts.training_files(folder) or []
    try:
        found = _matching(folder, f"**/{pattern}" if pattern and recursive else pattern)
        return [file for file in found if not (recursive and file.name == CARD)]  # was fetched to say the splits
    except DataError:
        files = layouts.training_files(folder) if default else None
        if not files:
            raise
        return files


def _matching(folder: Path, pattern: str | None) -> list[Path]:
    try:
        files = sorted(p for p in folder.glob(pattern or "**/*") if p.is_file())
    except (ValueError, NotImplementedError) as error:
        fact = f"dataset_pattern {pattern} is not a valid pattern in {folder}: {error}"
        raise DataError(fact, hint="set dataset_pattern, for example to *.jsonl") from None
    if ".." in Path(pattern or "").parts:
        raise DataError(
            f"dataset_pattern {pattern} leaves {folder}", hint="set dataset_path to the folder of the files"
        )
    if pattern is None:
        files = [f for f in files if is_data_file(f)]
    if pattern is None or set(pattern) & set(
        "*?["
    ):  # a glob takes neither hidden files nor those that describe data
        dotted = any(part.startswith(".") for part in Path(pattern or "").parts)
        files = [f for f in files if f.name not in NO_DATA and (dotted or not is_hidden(f, folder))]
    if not files:
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        held = f"it holds {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "it is empty"
        wanted = f"matches {pattern}" if pattern else "is a data file"
        kinds = {p.suffix.lower(): f"dataset_pattern=**/*{p.suffix}" for p in map(Path, names) if is_data_file(p)}
        hint = f"set {' or '.join(kinds.values())}" if kinds else "set dataset_pattern"
        raise DataError(f"no file in {folder} {wanted}: {held}", hint=hint)
    return files
