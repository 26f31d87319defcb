"""Data sources: each gives a local folder, and says exactly which version of it was fetched.

To add a source, enter a function in SOURCES; schema.DataSource.type names it, and schema.SOURCE_KEYS says
which of its keys it reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from src.data.column_mapping import STRATEGIES
from src.data.download import FetchedData
from src.data.from_hub import fetch_hub
from src.data.from_lakefs import fetch_lakefs
from src.data.from_s3 import fetch_s3
from src.data.from_url import fetch_url
from src.data.readers import file_kind, is_data_file
from src.errors import ConfigError, DataError
from src.schema import ColumnArgs, DataFormat, Dataset, DataSource, TrainConfig

SOURCES: dict[str, Callable[[DataSource, Path], FetchedData]] = {
    "local": lambda _source, _cache: FetchedData(Path(), {"type": "local"}),  # dataset_path, where it is
    "lakefs": fetch_lakefs,
    "hub": fetch_hub,
    "url": fetch_url,
    "s3": fetch_s3,
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class DataPart:
    """The files of one data set at one version, and how their rows are to be taken."""

    files: list[Path]
    version: dict[str, Any]
    data_format: DataFormat
    columns: ColumnArgs
    weight: float = 1


def cache_of(cfg: TrainConfig) -> Path:
    """The folder of fetched and tokenised data."""
    return Path(cfg.cache_dir or Path(cfg.output_dir) / "cache")


def fetch_parts(cfg: TrainConfig) -> list[DataPart]:
    """The files of every data set of `cfg`, fetched where they are not on this machine.

    Raises: ConfigError if data sets are named in two ways; DataError if there are no files, or they cannot
    be had.
    """
    several = list(cfg.datasets)
    if cfg.trainDataConfig:
        if several:
            raise ConfigError("datasets and trainDataConfig both name the data sets", hint="keep one of them")
        several = parse_train_data_config(cfg.trainDataConfig)
        if not several:
            raise DataError("trainDataConfig has no entry with exp_type: train", hint="add one to train on")
    if not several:
        found = _files(cfg.dataset_path, cfg.dataset_pattern, cfg.data_source, cache_of(cfg), "dataset_path")
        return [DataPart(*found, cfg.data_format, _columns(cfg))]
    return [
        DataPart(
            *_files(d.path, d.pattern, d.data_source, cache_of(cfg), f"datasets.{i}.path"),
            d.format, _columns(d), d.weight,
        )
        for i, d in enumerate(several)
    ]  # fmt: skip


def parse_train_data_config(config: str | Mapping[str, Any]) -> list[Dataset]:
    """The data sets of a trainDataConfig: `{name: {data_path, strategy, question_key, ...}}` or that as YAML.

    Raises: ConfigError if it is neither, or has keys of its own.
    """
    try:
        found = yaml.safe_load(config) if isinstance(config, str) else config
    except yaml.YAMLError as error:
        raise ConfigError(f"trainDataConfig is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping) or not all(isinstance(entry, Mapping) for entry in found.values()):
        raise ConfigError("trainDataConfig should be {name: {data_path: ..., strategy: QA, ...}}")
    known = {"data_path", "exp_type", *(ColumnArgs.__dataclass_fields__)}
    strange = [f"trainDataConfig.{n}.{k} is not a setting" for n, e in found.items() for k in e if k not in known]
    strange += [f"trainDataConfig.{n} has no data_path" for n, e in found.items() if not e.get("data_path")]
    strange += [
        f"trainDataConfig.{n}.exp_type={e['exp_type']}: should be one of train, eval, inference"
        for n, e in found.items()
        if e.get("exp_type", "train") not in ("train", "eval", "inference")
    ]
    strange += [
        f"trainDataConfig.{n}.strategy={e['strategy']}: should be one of {', '.join(STRATEGIES)}"
        for n, e in found.items()
        if e.get("strategy") not in (None, *STRATEGIES)
    ]
    if strange:
        raise ConfigError(*strange)
    return [_dataset(entry) for entry in found.values() if entry.get("exp_type", "train") == "train"]


def _dataset(entry: Mapping[str, Any]) -> Dataset:
    """`data_path` is a local path, or else the id of a data set on the Hub."""
    path = str(entry["data_path"])
    on_the_hub = not Path(path).exists() and HUB_ID.fullmatch(path)
    source = DataSource(type="hub", repo=path) if on_the_hub else DataSource()
    columns = {k: v for k, v in entry.items() if k not in ("data_path", "exp_type")}
    return Dataset(path=path, data_source=source, **columns)


def _columns(settings: ColumnArgs) -> ColumnArgs:
    """Those of the settings that decide how a row is taken, and no others."""
    return ColumnArgs(**{key: getattr(settings, key) for key in ColumnArgs.__dataclass_fields__})


def _files(
    path: str, pattern: str | None, source: DataSource, cache: Path, key: str
) -> tuple[list[Path], dict[str, Any]]:
    """The data files, in the order of their names, and the version that they have."""
    fetched = SOURCES[source.type](source, cache / "sources")
    folder = Path(path) if source.type == "local" else fetched.folder
    if folder.is_file():
        file_kind(folder)
        return [folder], fetched.version
    if not folder.is_dir():
        raise DataError(f"{key} {folder} is not a folder or a file", hint=f"set {key} to your data")
    if source.type != "local":  # which of the fetched files, wherever they lay in the repository
        pattern = f"**/{pattern}" if pattern and source.type != "url" else None
    files = _matching(folder, pattern)
    away = [f for f in files if not f.resolve().is_relative_to(folder.resolve())]
    if away:
        raise DataError(
            *(f"{f} is a symbolic link that leaves {folder}" for f in away),
            hint=f"set {key} to where it leads, or copy the file",
        )
    for file in files:
        file_kind(file)
    return files, fetched.version


def _matching(folder: Path, pattern: str | None) -> list[Path]:
    try:
        files = sorted(p for p in folder.glob(pattern or "**/*") if p.is_file())
    except (ValueError, NotImplementedError) as error:
        said = f"dataset_pattern {pattern} is not a pattern inside {folder}: {error}"
        raise DataError(said, hint="set dataset_pattern to one such as *.jsonl") from None
    if ".." in Path(pattern or "").parts:
        raise DataError(
            f"dataset_pattern {pattern} leaves {folder}", hint="set dataset_path to where the files are"
        )
    if pattern is None:
        files = [f for f in files if is_data_file(f) and not f.name.startswith(".")]
    if not files:
        there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        held = f"it holds {', '.join(there[:8])}{' ...' if len(there) > 8 else ''}" if there else "it is empty"
        asked = f"matches {pattern}" if pattern else "is a data file"
        raise DataError(f"no file in {folder} {asked}: {held}", hint="set dataset_pattern")
    return files
