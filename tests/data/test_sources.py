"""Data sources: exactly the selected files, or an error that names the existing ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from src.config import load
from src.data.sources import SOURCES, DataPart, data_cache, fetch_parts
from src.errors import DataError
from src.schema import TrainConfig


def config(folder: Path, pattern: str = "*.jsonl", **more: Any) -> TrainConfig:
    found: TrainConfig = load("train", {"dataset_path": str(folder), "dataset_pattern": pattern, **more})
    return found


def fetched(cfg: TrainConfig) -> list[DataPart]:
    return fetch_parts(cfg, data_cache(cfg.cache_dir, cfg.output_dir))


def names(cfg: TrainConfig) -> list[str]:
    return [path.name for part in fetched(cfg) for path in part.files]


def test_the_files_that_match_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.jsonl").mkdir()
    assert names(config(tmp_path)) == ["a.jsonl", "b.jsonl"]
    assert [part.version for part in fetched(config(tmp_path))] == [{"type": "local"}]


def test_a_pattern_with_two_stars_includes_subfolders(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.jsonl").touch()
    assert names(config(tmp_path, "**/*.jsonl")) == ["a.jsonl"]
    with pytest.raises(DataError):
        fetched(config(tmp_path, "*.jsonl"))


def test_a_path_may_be_one_file_whatever_the_pattern(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).touch()
    assert names(config(tmp_path / "a.csv")) == ["a.csv"]


def test_a_file_of_unknown_kind_is_refused_also_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "a.xls").touch()
    with pytest.raises(DataError, match=r"a\.xls has an unsupported extension"):
        fetched(config(tmp_path / "a.xls"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=re.escape(f"dataset_path {tmp_path / 'nowhere'} is not a folder or a file")
    ):
        fetched(config(tmp_path / "nowhere"))


def test_a_missing_folder_of_a_data_set_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"datasets\.1\.path \S+nowhere is not a folder.*; set datasets\.1\.path"):
        fetched(config(tmp_path, datasets=[{"path": str(tmp_path)}, {"path": str(tmp_path / "nowhere")}]))


def test_a_train_data_config_that_trains_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no entry with exp_type: train"):
        fetched(config(tmp_path, trainDataConfig={"a": {"data_path": "a.csv", "exp_type": "eval"}}))


def test_an_empty_folder_is_called_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is empty"):
        fetched(config(tmp_path))


def test_a_pattern_without_match_names_the_files_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.json").touch()
    with pytest.raises(DataError, match=r"matches \*\.jsonl: it holds rows\.json") as caught:
        fetched(config(tmp_path))
    assert "set dataset_pattern" in str(caught.value)


@pytest.mark.parametrize("count", [8, 9])
def test_the_first_eight_files_of_a_folder_are_named(tmp_path: Path, count: int) -> None:
    for number in range(count):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(DataError, match=f"{', '.join(f'{n}.txt' for n in range(8))}{' ...' * (count > 8)}; set"):
        fetched(config(tmp_path))


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("/etc/*.jsonl", "is not a valid pattern in"),
        ("a**b", "is not a valid pattern in|no file in"),
        ("../*.jsonl", r"pattern \.\./\*\.jsonl leaves"),
        ("*/../../*.jsonl", r"pattern \*/\.\./\.\./\*\.jsonl leaves"),
    ],
)
def test_an_invalid_pattern_or_one_that_leaves_the_folder_is_refused(
    tmp_path: Path, pattern: str, told: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.jsonl").touch()
    with pytest.raises(DataError, match=f"({told}).*; set dataset_pa"):
        fetched(config(tmp_path / "in", pattern))


def test_a_file_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xls").touch()
    with pytest.raises(DataError, match=r"a\.xls has an unsupported extension; supported are \.jsonl"):
        fetched(config(tmp_path, "*.xls"))


def test_a_link_may_lead_anywhere_inside_its_folder_only(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.jsonl").touch()
    (tmp_path / "in" / "a.jsonl").touch()
    (tmp_path / "in" / "b.jsonl").symlink_to("a.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert names(config(tmp_path / "link")) == ["a.jsonl", "b.jsonl"]
    (tmp_path / "in" / "c.jsonl").symlink_to(tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=r"c\.jsonl is a symbolic link to a file outside"):
        fetched(config(tmp_path / "in"))


def test_a_data_set_without_a_pattern_is_every_data_file_of_its_folder(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv.gz", "deep/c.parquet", "notes.txt", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names(config(tmp_path, datasets=[{"path": str(tmp_path)}])) == ["a.jsonl", "b.csv.gz", "c.parquet"]
    assert names(config(tmp_path, datasets=[{"path": str(tmp_path), "pattern": "*.jsonl"}])) == [
        ".hidden.jsonl",
        "a.jsonl",
    ]


def test_the_pattern_selects_fetched_files_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.data.download import FetchedData

    for name in ("train/a.jsonl", "b.jsonl", "c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    version = {"type": "hub", "commit": "1"}
    monkeypatch.setitem(SOURCES, "hub", lambda source, cache: FetchedData(tmp_path, version))
    cfg = config(tmp_path / "nowhere", data_source={"type": "hub", "repo": "a/b"})
    assert names(cfg) == ["b.jsonl", "a.jsonl"]
    assert fetched(cfg)[0].version == version


def test_every_fetched_data_file_is_read_without_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.data.download import FetchedData

    caches = []

    def fetched(_: Any, cache: Path) -> FetchedData:
        caches.append(cache)
        return FetchedData(tmp_path, {"type": "url"})

    for name in ("deep/a.csv", "b.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setitem(SOURCES, "url", fetched)
    source = {"type": "url", "url": "https://example.org/a.zip"}
    assert names(config(tmp_path, data_source=source, cache_dir=str(tmp_path / "kept"))) == ["b.jsonl", "a.csv"]
    assert names(config(tmp_path, data_source=source, output_dir=str(tmp_path / "out"))) == ["b.jsonl", "a.csv"]
    assert caches == [tmp_path / "kept" / "sources", tmp_path / "out" / "cache" / "sources"]
