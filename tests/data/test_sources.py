"""Where training files come from: exactly those asked for, or a sentence that says what is there instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from src.config import DataArgs, DataSource
from src.data.sources import SOURCES, fetch
from src.errors import DataError, NotYetError


def args(folder: Path, pattern: str = "*.jsonl") -> DataArgs:
    return DataArgs(dataset_path=str(folder), dataset_pattern=pattern)


def test_the_files_that_match_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.jsonl").mkdir()
    found = fetch(args(tmp_path))
    assert [p.name for p in found.files] == ["a.jsonl", "b.jsonl"]
    assert found.version == {"type": "local"}


def test_a_pattern_reaches_into_subfolders_where_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.jsonl").touch()
    assert [p.name for p in fetch(args(tmp_path, "**/*.jsonl")).files] == ["a.jsonl"]
    with pytest.raises(DataError):
        fetch(args(tmp_path, "*.jsonl"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(f"dataset_path {tmp_path / 'nowhere'} is not a folder")):
        fetch(args(tmp_path / "nowhere"))


def test_an_empty_folder_is_called_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is empty"):
        fetch(args(tmp_path))


def test_a_pattern_that_matches_nothing_tells_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "rows.json").touch()
    with pytest.raises(DataError, match=r"matches \*\.jsonl: it holds rows\.json") as caught:
        fetch(args(tmp_path))
    assert "set dataset_pattern" in str(caught.value)


@pytest.mark.parametrize("pattern", ["/etc/*.jsonl", "a**b"])
def test_a_pattern_that_is_none_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(DataError, match="set dataset_pattern"):
        fetch(args(tmp_path, pattern))


def test_a_source_that_is_not_available_yet_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotYetError, match="lakefs is not available in this version"):
        fetch(DataArgs(dataset_path=str(tmp_path), data_source=DataSource("lakefs")))


def test_each_source_can_be_asked_for() -> None:
    from typing import get_args, get_type_hints

    assert set(get_args(get_type_hints(DataSource)["type"])) == set(SOURCES)
