"""The Hub source: the real client against a Hub-shaped server, and local folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.config import load
from src.data.from_hub import fetch_hub
from src.data.readers import READERS
from src.data.readers.stream import ARCHIVES
from src.data.sources import fetch_parts
from src.errors import DataError
from src.schema import DataSource
from tests.data.hub_server import Handler, Hub, closed_port, hub_serving, serving, tree

ROOT = Path(__file__).resolve().parents[2]
FILES: dict[str, Any] = {
    "train__a.jsonl": "a",
    "train__deep__b.csv.gz": b"\x1f\x8b",
    "training__c.jsonl": "c",
    "README.md": "#",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub_serving() as server:
        yield server


def source(server: Hub, path: str = "", **keys: Any) -> DataSource:
    return DataSource("hub", endpoint=server.endpoint, repo=server.repo, path=path, **keys)


def refused(source: DataSource, cache: Path) -> str:
    """The error message, after a check that the cache is empty."""
    with pytest.raises(DataError) as caught:
        fetch_hub(source, cache)
    assert not cache.exists() or tree(cache) == {}
    assert len(caught.value.problems) == 1 and caught.value.hint and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_data_files_below_a_path_come_at_one_commit(server: Hub, tmp_path: Path) -> None:
    commit = server.commit(**FILES)
    found = fetch_hub(source(server, "train"), tmp_path / "cache")
    assert tree(found.folder) == {"a.jsonl": b"a", "deep/b.csv.gz": b"\x1f\x8b"}
    assert set(tree(tmp_path / "cache")) == {f"hub/{found.folder.name}/{name}" for name in tree(found.folder)}
    assert found.version == {
        "type": "hub", "repo": "user/rows", "revision": None, "commit": commit, "path": "train",
    }  # fmt: skip


def test_a_listing_of_several_pages_is_read_to_its_end(server: Hub, tmp_path: Path) -> None:
    server.commit(**{f"{i}.jsonl": str(i) for i in range(8)})
    assert len(tree(fetch_hub(source(server), tmp_path).folder)) == 8


def test_hidden_files_and_other_kinds_are_not_fetched(server: Hub, tmp_path: Path) -> None:
    server.commit(**{".cache__x.json": "x", "a.jsonl": "a", "b.PARQUET.zst": "b", "c.py": "c", "d.jsonl.bak": "d"})
    assert set(tree(fetch_hub(source(server), tmp_path).folder)) == {"a.jsonl", "b.PARQUET.zst"}


def test_the_training_files_that_the_card_of_a_dataset_lists_are_trained_on(server: Hub, tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/a.csv}\n---\n"
    server.commit(**{"README.md": card, "data__a.csv": "text\nx\n", "data__b.csv": "text\ny\n"})
    where = {"type": "hub", "endpoint": server.endpoint, "repo": server.repo}
    for pattern, names in {"*.jsonl": ["a.csv"], "*": ["a.csv", "b.csv"]}.items():
        cfg = load("train", {"data_source": where, "dataset_pattern": pattern})
        (part,) = fetch_parts(cfg, tmp_path / "cache")
        assert [file.name for file in part.files] == names


@pytest.mark.parametrize("name", [f"a{kind}" for kind in READERS] + [f"a.jsonl{archive}" for archive in ARCHIVES])
def test_every_kind_of_file_that_has_a_reader_is_fetched(server: Hub, tmp_path: Path, name: str) -> None:
    server.commit(**{name: "a"})
    assert set(tree(fetch_hub(source(server), tmp_path).folder)) == {name}


def test_a_branch_that_moves_meanwhile_is_read_at_the_commit_it_had(server: Hub, tmp_path: Path) -> None:
    new = server.commit(**{"a.jsonl": "new", "b.jsonl": "only in the new one"})
    old = server.commit(**{"a.jsonl": "old"})
    server.moves_to = new
    found = fetch_hub(source(server), tmp_path)
    assert tree(found.folder) == {"a.jsonl": b"old"} and found.version["commit"] == old
    assert server.branches["main"] == new
    assert tree(fetch_hub(source(server), tmp_path).folder)["a.jsonl"] == b"new"


@pytest.mark.parametrize("revision", ["other", "refs/pr/1"])
def test_another_revision_can_be_selected(server: Hub, tmp_path: Path, revision: str) -> None:
    commit = server.commit(revision, **{"a.jsonl": "other"})
    server.commit(**{"a.jsonl": "main"})
    found = fetch_hub(source(server, revision=revision), tmp_path)
    assert tree(found.folder) == {"a.jsonl": b"other"}
    assert (found.version["revision"], found.version["commit"]) == (revision, commit)


def test_a_commit_in_the_cache_needs_no_server(server: Hub, tmp_path: Path) -> None:
    commit = server.commit(**{"a.jsonl": "a"})
    first = fetch_hub(source(server, revision=commit), tmp_path)
    server.requests.clear()
    assert fetch_hub(source(server, revision=commit), tmp_path) == first
    assert server.requests == []


def test_a_branch_that_has_not_moved_is_not_read_again(server: Hub, tmp_path: Path) -> None:
    server.commit(**{"a.jsonl": "a"})
    first = fetch_hub(source(server), tmp_path)
    server.requests.clear()
    assert fetch_hub(source(server), tmp_path) == first
    assert server.requests == ["GET /api/datasets/user/rows"]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("served", [b"corrupt", b"short", b"much longer"])
def test_bytes_that_are_not_those_of_the_commit_are_refused(
    server: Hub, tmp_path: Path, large: bool, served: bytes
) -> None:
    server.commit(**{"a.jsonl": "as it is"[:7]})
    server.large = {"a.jsonl"} if large else set()
    server.served["a.jsonl"] = served
    assert "a.jsonl differs from its commit on the Hub" in refused(source(server), tmp_path / "cache")


def test_a_file_that_grows_over_its_listed_size_is_stopped(server: Hub, tmp_path: Path) -> None:
    server.commit(**{"a.jsonl": "a"})
    server.endless = {"a.jsonl"}
    assert "a.jsonl differs from its commit on the Hub" in refused(source(server), tmp_path)
    assert server.sent < 40


def test_a_large_object_is_checked_by_its_sha256(server: Hub, tmp_path: Path) -> None:
    server.commit(**{"a.jsonl": "large"})
    server.large = {"a.jsonl"}
    assert tree(fetch_hub(source(server), tmp_path).folder) == {"a.jsonl": b"large"}


@pytest.mark.parametrize("name", ["../../x.jsonl", "/etc/x.jsonl", "a/../../x.jsonl", "a\\b.jsonl"])
def test_a_name_that_leaves_the_folder_is_refused(server: Hub, tmp_path: Path, name: str) -> None:
    server.commit(**{"a.jsonl": "a", name: "evil"})
    assert "would be written outside its folder" in refused(source(server), tmp_path / "deep" / "cache")
    assert [path.name for path in tmp_path.rglob("x.jsonl")] == []
    assert not [request for request in server.requests if "resolve" in request]


def test_more_than_max_gb_is_refused_before_anything_is_read(server: Hub, tmp_path: Path) -> None:
    server.commit(**{"a.jsonl": "x" * 600, "b.jsonl": "x" * 600})
    assert "user/rows is larger than data_source.max_gb=1e-06" in refused(source(server, max_gb=1e-6), tmp_path)
    assert not [request for request in server.requests if "resolve" in request]


def test_a_token_comes_from_the_environment_only(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.commit(**{"a.jsonl": "a"})
    server.token = "hf_secret"
    told = refused(source(server), tmp_path / "cache")
    assert f"{server.endpoint} refuses access to the dataset user/rows, and HF_TOKEN is not set" in told
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    told = refused(source(server), tmp_path / "cache")
    assert "HF_TOKEN gives no access to it" in told and "hf_other" not in told
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = fetch_hub(source(server), tmp_path / "cache")
    assert tree(found.folder) == {"a.jsonl": b"a"} and "hf_secret" not in str(found)


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (403, "GatedRepo", "the dataset user/rows is gated, and HF_TOKEN is not set"),
        (401, "RepoNotFound", "there is no dataset user/rows"),
        (404, "RepoNotFound", "or it is private and HF_TOKEN is not set"),
        (404, "RevisionNotFound", "the dataset user/rows has no revision v9"),
        (403, "", "refuses access to the dataset user/rows"),
        (500, "", "answered with HTTP status 500 for the dataset user/rows"),
    ],
)
def test_a_refusal_is_one_sentence(server: Hub, tmp_path: Path, status: int, code: str, told: str) -> None:
    server.error = (status, code)
    assert told in refused(source(server, revision="v9"), tmp_path)


def test_a_path_without_data_files_is_named(server: Hub, tmp_path: Path) -> None:
    server.commit(**FILES)
    assert "user/rows holds no data files below nothing" in refused(source(server, "nothing"), tmp_path)


def test_a_dead_server_is_reported_within_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    endpoint = f"http://127.0.0.1:{closed_port()}"
    told = refused(DataSource("hub", endpoint=endpoint, repo="user/rows"), tmp_path)
    assert f"{endpoint} does not respond as a Hub (ConnectError)" in told
    assert time.monotonic() - began < 10


def test_a_server_that_is_not_a_hub_is_reported(tmp_path: Path) -> None:
    class Page(Handler):
        def do_GET(self) -> None:
            self.answer(200, b"<html>")

    with serving(Page) as other:
        endpoint = f"http://127.0.0.1:{other.server_port}"
        told = refused(DataSource("hub", endpoint=endpoint, repo="user/rows"), tmp_path)
    assert "does not respond as a Hub" in told


@pytest.mark.parametrize("repo", [None, "no such/dataset id", "a/b/c"])
def test_an_invalid_repo_is_refused(server: Hub, tmp_path: Path, repo: str | None) -> None:
    told = refused(DataSource("hub", endpoint=server.endpoint, repo=repo), tmp_path)
    assert "data_source.repo is not set" in told or "neither a local folder nor a dataset id" in told


OFFLINE = """
import sys
from pathlib import Path
from src.schema import DataSource
from src.data.from_hub import fetch_hub
from src.data.readers import READERS
from src.data.readers.stream import ARCHIVES
from src.errors import DataError
assert not {"huggingface_hub", "boto3", "urllib3"} & set(sys.modules)
endpoint, commit = sys.argv[1:]
pinned = DataSource("hub", endpoint=endpoint, repo="user/rows", revision=commit)
print(fetch_hub(pinned, Path("cache")).version["commit"])
assert "huggingface_hub" not in sys.modules
try:
    fetch_hub(DataSource("hub", endpoint=endpoint, repo="user/rows"), Path("cache"))
except DataError as error:
    print(error)
from huggingface_hub import constants
assert constants.HF_HUB_DISABLE_XET
"""


def test_offline_the_cache_is_read_and_anything_else_is_an_error(server: Hub, tmp_path: Path) -> None:
    commit = server.commit(**{"a.jsonl": "a"})
    fetch_hub(source(server, revision=commit), tmp_path / "cache")
    server.requests.clear()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, server.endpoint, commit],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == commit
    assert second.startswith(
        "the dataset user/rows is not in the cache, and HF_HUB_OFFLINE prevents fetching it; "
    )
    assert server.requests == []


# Local folders


def folder(where: Path, **files: str) -> Path:
    for name, text in files.items():
        path = where / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return where


def test_a_local_folder_is_read_in_place_and_pinned_by_its_content(tmp_path: Path) -> None:
    repo = folder(tmp_path / "rows", **{"train__a.jsonl": "a", ".cache__x.json": "x", "README.md": "#"})
    found = fetch_hub(DataSource("hub", repo=str(repo), path="train"), tmp_path / "cache")
    assert found.folder == repo / "train" and not (tmp_path / "cache").exists()
    assert found.version | {"sha256": ""} == {
        "type": "hub", "repo": str(repo), "revision": None, "commit": None, "path": "train", "sha256": "",
    }  # fmt: skip
    copy = Path(shutil.copytree(repo, tmp_path / "copy"))
    again = fetch_hub(DataSource("hub", repo=str(copy), path="train"), tmp_path / "cache")
    assert again.version["sha256"] == found.version["sha256"]
    (copy / "train" / "a.jsonl").write_text("b")
    changed = fetch_hub(DataSource("hub", repo=str(copy), path="train"), tmp_path / "cache")
    assert changed.version["sha256"] != found.version["sha256"]


def test_a_renamed_file_is_another_version(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one", **{"a.jsonl": "a"}), folder(tmp_path / "other", **{"b.jsonl": "a"})
    pins = {fetch_hub(DataSource("hub", repo=str(repo)), tmp_path).version["sha256"] for repo in (one, other)}
    assert len(pins) == 2


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"path": "../other"}, "outside its folder"),
        ({"path": "link"}, "outside its folder"),
        ({"path": "empty"}, "holds no data files below empty"),
        ({"revision": "v1"}, "data_source.revision is not supported"),
    ],
)
def test_what_a_local_folder_cannot_give_is_refused(tmp_path: Path, keys: dict[str, str], told: str) -> None:
    folder(tmp_path / "other", **{"a.jsonl": "a"})
    repo = folder(tmp_path / "rows", **{"a.jsonl": "a"})
    (repo / "link").symlink_to(tmp_path / "other")
    assert told in refused(DataSource("hub", repo=str(repo), **keys), tmp_path / "cache")  # type: ignore[arg-type]
