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
    (tmp_path / "a.abc").touch()
    with pytest.raises(DataError, match=r"a\.abc has an unsupported extension"):
        fetched(config(tmp_path / "a.abc"))


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
    (tmp_path / "a.abc").touch()
    with pytest.raises(DataError, match=r"a\.abc has an unsupported extension; supported are \.jsonl"):
        fetched(config(tmp_path, "*.abc"))


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
    assert names(config(tmp_path, datasets=[{"path": str(tmp_path), "pattern": "*.jsonl"}])) == ["a.jsonl"]
    assert names(config(tmp_path, ".*.jsonl")) == [".hidden.jsonl"]


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


def test_a_folder_that_datasets_saved_is_read_in_its_order(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": "2+2?", "completion": "4"}] * 3)
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    assert names(config(tmp_path / "one")) == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for part in (
        fetched(config(tmp_path / "splits")),
        fetched(config(tmp_path, datasets=[{"path": str(tmp_path / "splits")}])),
    ):
        assert [str(file.relative_to(tmp_path)) for file in part[0].files] == [
            "splits/train/data-00000-of-00001.arrow"
        ]
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(DataError, match="has no split train: it has test; set dataset_path to a file of it"):
        fetched(config(tmp_path / "splits"))


README = """---
configs:
- config_name: short
  data_files: [{split: train, path: [short/a-*, short/b-*]}, {split: test, path: short/test-*}]
- config_name: long
  data_files: {train: long/*}
---
# About the data
"""


def test_of_a_folder_laid_out_as_on_the_hub_the_training_split_is_read(tmp_path: Path) -> None:
    for name in (
        "data/train-0-of-2.parquet",
        "data/train-1-of-2.parquet",
        "data/test-0-of-1.parquet",
        "data/info.json",
    ):
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / name).touch()
    assert names(config(tmp_path / "plain")) == ["train-0-of-2.parquet", "train-1-of-2.parquet"]
    for name in ("short/a-0.csv", "short/b-0.csv", "short/test-0.csv", "long/x.csv", "short/.a-1.csv"):
        (tmp_path / "listed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "listed" / name).touch()
    readme = tmp_path / "listed" / "README.md"
    readme.write_text(README)
    wanted = "lists the configurations short, long; set dataset_pattern=short/a-* or dataset_pattern=short/b-* or"
    with pytest.raises(DataError, match=re.escape(wanted)):
        fetched(config(tmp_path / "listed"))
    readme.write_text(README.replace("short\n", "default\n").replace("short/a-*", "short/*a-*"))
    assert names(config(tmp_path / "listed")) == ["a-0.csv", "b-0.csv"]


def test_a_data_set_without_a_pattern_is_its_training_split_if_all_files_belong_to_splits(tmp_path: Path) -> None:
    for name in ("train.csv", "valid/x.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names(config(tmp_path, datasets=[{"path": str(tmp_path)}])) == ["train.csv"]
    (tmp_path / "more.csv").touch()
    assert names(config(tmp_path, datasets=[{"path": str(tmp_path)}])) == ["more.csv", "train.csv", "x.csv"]


def test_files_of_a_glob_that_are_named_like_a_held_out_split_are_known(tmp_path: Path) -> None:
    for name in (
        "train.jsonl",
        "test.jsonl",
        "my-dev_set.jsonl",
        "latest.jsonl",
        "eval/rows.jsonl",
        "train/test.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (part,) = fetched(config(tmp_path, "**/*.jsonl"))
    like = [str(file.relative_to(tmp_path)) for file in part.like_held_out]
    assert like == ["eval/rows.jsonl", "my-dev_set.jsonl", "test.jsonl"]
    assert fetched(config(tmp_path, "test.jsonl"))[0].like_held_out == ()  # is named
    assert fetched(config(tmp_path / "test.jsonl"))[0].like_held_out == ()


def test_data_files_beside_those_of_the_default_pattern_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.data import sources

    said: list[str] = []
    monkeypatch.setattr(sources.log, "info", lambda text, *values: said.append(text % values))
    others = ("B.JSONL", "b.csv", "b.jsonl.gz")
    for name in ("a.jsonl", "test.csv", "._a.jsonl", "dataset_info.json", "notes.txt", "sub/b.jsonl", *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (part,) = fetched(config(tmp_path))
    assert [file.name for file in part.files] == ["a.jsonl"]
    assert [str(file.relative_to(tmp_path)) for file in part.not_matched] == list(others)
    what = "1 data file in subfolders not trained on: sub/b.jsonl"
    assert said[0] == f"{tmp_path}: {what}; dataset_pattern chooses the files"
    assert fetched(config(tmp_path, "a*.jsonl"))[0].not_matched == ()  # was chosen
    assert fetched(config(tmp_path / "a.jsonl"))[0].not_matched == ()


def test_a_glob_takes_no_file_that_describes_data(tmp_path: Path) -> None:
    for name in ("a.json", "dataset_info.json"):
        (tmp_path / name).touch()
    assert names(config(tmp_path, "**/*.json")) == ["a.json"]
    assert names(config(tmp_path, "dataset_info.json")) == ["dataset_info.json"]
