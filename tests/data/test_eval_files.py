"""Where the evaluation data of a training run is, and which file holds which split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from src.data.eval_files import BELONGS_TO, eval_path_of, find_eval_path, mixed_files, split_files
from src.errors import DataError
from src.schema import DataArgs, Dataset, DataSource, TrainDataArgs
from src.utils.files import sha256
from tests.fixtures import ROOT, jsonl


def splits(folder: Path, *names: str) -> Path:
    for name in names or ("test.jsonl",):
        jsonl(folder / name, [{"prompt": "a", "completion": "b"}])
    return folder


def of_files(folder: Path, *files: Path, evaluation: Sequence[Path] = ()) -> None:
    record = {"training_files": {file.name: sha256(file) for file in files}}
    if evaluation:
        record["files"] = {file.name: sha256(file) for file in evaluation}
    (folder / BELONGS_TO).write_text(json.dumps(record), encoding="utf-8")


def test_the_evaluation_folder_is_inside_the_training_data_or_beside_it(tmp_path: Path) -> None:
    data = splits(tmp_path / "mine", "train.jsonl")
    assert find_eval_path(None, str(data)) is None
    (tmp_path / "eval").mkdir()
    assert find_eval_path(None, str(data)) is None  # it holds no data file
    beside = splits(tmp_path / "eval")
    assert find_eval_path(None, str(data)) == beside
    assert find_eval_path(None, str(data / "train.jsonl")) is None  # beside a file is its own folder
    inside = splits(data / "eval")
    assert find_eval_path(None, str(data)) == inside == find_eval_path(None, str(data / "train.jsonl"))
    assert find_eval_path("typed", str(data)) == Path("typed")


def test_an_evaluation_folder_that_belongs_to_other_files_is_not_taken(tmp_path: Path) -> None:
    (own,) = splits(tmp_path, "own.jsonl").glob("*.jsonl")
    folder = splits(tmp_path / "eval")
    of_files(folder, own)
    other = jsonl(tmp_path / "other.jsonl", [{"prompt": "x", "completion": "y"}])
    assert find_eval_path(None, str(own)) == find_eval_path(None, str(tmp_path), pattern="*.jsonl") == folder
    assert find_eval_path(None, str(other)) is None
    assert find_eval_path(None, str(tmp_path), pattern="other*") is None
    assert find_eval_path(None, ".", [Dataset(path=str(other)), Dataset(path=str(own))]) == folder
    own.write_text("changed", encoding="utf-8")
    assert find_eval_path(None, str(own)) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '"x"', '{"training_files": []}', '{"files": {"test.jsonl": 1}}', "[" * 10_000]
)
def test_a_record_of_another_form_is_one_sentence(tmp_path: Path, text: str) -> None:
    mine = jsonl(tmp_path / "mine.jsonl", [{"prompt": "x", "completion": "y"}])
    record = splits(tmp_path / "eval") / BELONGS_TO
    record.write_text(text, encoding="utf-8")
    for read in (
        lambda: find_eval_path(None, str(mine)),
        lambda: mixed_files(str(record.parent), TrainDataArgs(dataset_path=str(mine))),
    ):
        with pytest.raises(DataError, match=rf"{BELONGS_TO} is not (JSON|of the form) .*mend it, or remove it"):
            read()
    record.write_text(json.dumps({"training_files": {"x" * 300: "", "\0": ""}}), encoding="utf-8")
    assert find_eval_path(None, str(tmp_path)) is None


def test_files_that_the_user_adds_to_such_a_folder_make_it_the_users(tmp_path: Path) -> None:
    theirs = splits(tmp_path, "theirs.jsonl") / "theirs.jsonl"
    mine = jsonl(tmp_path / "mine.jsonl", [{"prompt": "x", "completion": "y"}])
    folder = splits(tmp_path / "eval", "test.jsonl", "dev.jsonl")
    of_files(folder, theirs, evaluation=[folder / "test.jsonl", folder / "dev.jsonl"])
    assert find_eval_path(None, str(mine)) is None
    jsonl(folder / "test.jsonl", [{"prompt": "my question", "completion": "y"}])
    assert find_eval_path(None, str(mine)) == folder
    args = TrainDataArgs(dataset_path=str(mine))
    assert mixed_files(str(folder), args) == [folder / "dev.jsonl"]
    assert mixed_files(str(folder), TrainDataArgs(dataset_path=str(theirs))) == []
    (folder / "dev.jsonl").unlink()
    assert mixed_files(str(folder), args) == mixed_files(None, args) == []


def test_only_local_data_has_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    splits(Path("data/eval"))
    hub = DataSource(type="hub", repo="user/name")
    assert eval_path_of(TrainDataArgs(), None) == "data/eval"
    assert eval_path_of(TrainDataArgs(data_source=hub), None) is None
    assert eval_path_of(TrainDataArgs(datasets=[Dataset(data_source=hub)]), None) is None
    assert eval_path_of(TrainDataArgs(trainDataConfig={"a": {"data_path": "./data"}}), None) == "data/eval"


def test_the_demo_has_its_own_questions_and_no_other_data_gets_them() -> None:
    assert DataArgs.dataset_path == "./data"
    for folder, file in (("data", "ingot.jsonl"), ("data/labels", "train.jsonl")):
        assert find_eval_path(None, str(ROOT / folder / file)) == ROOT / folder / "eval"
        assert find_eval_path(None, str(ROOT / folder)) == ROOT / folder / "eval"
        assert find_eval_path(None, str(ROOT / folder / "mine.jsonl")) is None
    assert find_eval_path(None, str(ROOT / "data"), pattern="mine.jsonl") is None


def test_each_data_file_of_a_folder_is_a_split(tmp_path: Path) -> None:
    folder = splits(tmp_path / "eval", "hard.jsonl", "test.jsonl", ".hidden.jsonl")
    of_files(folder)
    (folder / "notes.md").touch()
    (folder / "more.csv.gz").touch()
    held_out = tmp_path / "held_out" / "kept.jsonl"
    assert list(split_files(folder)) == ["hard", "more", "test"]
    assert split_files(folder, held_out)["kept"] == held_out
    assert split_files(folder / "hard.jsonl") == {"test": folder / "hard.jsonl"}
    assert split_files(None) == split_files(tmp_path / "none") == {}
    (folder / "test.csv").touch()
    with pytest.raises(DataError, match=r"test\.csv and .*test\.jsonl both are the split test"):
        split_files(folder)
