"""The lakeFS source: exactly one commit, complete or not at all, from the cache if possible."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from src.data import from_lakefs, lakefs_client
from src.data.from_lakefs import fetch_lakefs
from src.errors import DataError
from src.schema import DataSource
from tests.data.lake import Lake
from tests.data.lakefs_server import Answer, Request

pytest_plugins = ["tests.data.lake"]

ROOT = Path(__file__).resolve().parents[2]
DATA = {"train/a.jsonl": b'{"x":1}\n' * 1000, "train/deep/ünï code.jsonl": b'{"x":2}\n', "train/empty": b""}
FILES = {key.removeprefix("train/"): data for key, data in DATA.items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(lake: Lake, cache: Path, **keys: Any) -> DataError:
    """What a fetch is refused with, after which nothing is left in the cache."""
    before = tree(cache)
    with pytest.raises(DataError) as caught:
        lake.fetch(cache, **keys)
    assert tree(cache) == before
    assert caught.value.hint
    told = f"{caught.value} {caught.value.__cause__}"
    assert not [s for s in (*lake.secrets, "X-Amz-Signature") if s in told]
    return caught.value


# What is fetched


def test_a_folder_of_a_branch_arrives_with_the_commit_that_it_was(lake: Lake, tmp_path: Path) -> None:
    commit = lake.commit({**DATA, "train2/b.jsonl": b"other", "c.jsonl": b"other"})
    found = lake.fetch(tmp_path, path="train")
    assert tree(found.folder) == FILES
    assert found.version == {
        "type": "lakefs", "endpoint": lake.endpoint, "repo": lake.name, "ref": "branch main", "commit": commit,
        "path": "train",
    }  # fmt: skip


def test_without_a_path_it_is_the_complete_repository(lake: Lake, tmp_path: Path) -> None:
    lake.commit({**DATA, "c.jsonl": b"other", ".git/x.jsonl": b"hidden", "train/._a.jsonl": b"hidden"})
    assert tree(lake.fetch(tmp_path).folder) == {**DATA, "c.jsonl": b"other"}


def test_a_path_may_be_one_object(lake: Lake, tmp_path: Path) -> None:
    lake.commit({**DATA, "train/a.jsonl.old": b"other"})
    assert tree(lake.fetch(tmp_path, path="train/a.jsonl").folder) == {"a.jsonl": DATA["train/a.jsonl"]}


def test_a_tag_a_commit_and_its_first_digits_are_the_same_commit(lake: Lake, tmp_path: Path) -> None:
    commit = lake.commit(DATA)
    lake.tag("v1", commit)
    lake.commit({"train/a.jsonl": b"newer"})
    for ref in ({"tag": "v1"}, {"commit": commit}, {"commit": commit[:8]}):
        found = lake.fetch(tmp_path, path="train/", **ref)
        assert tree(found.folder) == FILES
        assert found.version["commit"] == commit
        assert found.version["ref"] == " ".join(next(iter(ref.items())))


def test_another_branch_is_another_version(lake: Lake, tmp_path: Path) -> None:
    first = lake.commit({"a.jsonl": b"1"})
    lake.branch("exp").create("main")
    second = lake.commit({"a.jsonl": b"2"}, "exp")
    found = [lake.fetch(tmp_path, branch=branch) for branch in ("main", "exp")]
    assert [tree(f.folder)["a.jsonl"] for f in found] == [b"1", b"2"]
    assert [f.version["commit"] for f in found] == [first, second]


def test_what_is_not_committed_is_not_read(lake: Lake, tmp_path: Path) -> None:
    lake.commit({"a.jsonl": b"1"})
    lake.put({"a.jsonl": b"2", "b.jsonl": b"2"})
    assert tree(lake.fetch(tmp_path).folder) == {"a.jsonl": b"1"}


def test_a_branch_that_moves_is_read_again_and_the_older_commit_stays(lake: Lake, tmp_path: Path) -> None:
    older = lake.commit({"a.jsonl": b"1"})
    first = lake.fetch(tmp_path)
    lake.commit({"a.jsonl": b"2"})
    assert tree(lake.fetch(tmp_path).folder) == {"a.jsonl": b"2"}
    assert lake.fetch(tmp_path, commit=older).folder == first.folder
    assert tree(first.folder) == {"a.jsonl": b"1"}


def test_the_address_may_come_from_the_environment(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake.commit(DATA)
    monkeypatch.setenv("LAKEFS_ENDPOINT", lake.endpoint + "/")
    found = lake.fetch(tmp_path, endpoint=None, path="train")
    assert found.folder == lake.fetch(tmp_path, endpoint=f"{lake.endpoint}/api/v1", path="train").folder
    assert lake.endpoint not in "".join(p.read_text() for p in tmp_path.rglob("*.json"))


def test_a_large_object_is_read_in_pieces(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_lakefs, "BLOCK", 999)
    lake.commit(DATA)
    sizes = []
    if lake.server:
        lake.own.damage = lambda _key, answer: sizes.append(len(answer.body)) or answer  # type: ignore[func-returns-value]
    assert tree(lake.fetch(tmp_path, path="train").folder) == FILES
    assert not lake.server or sorted(sizes) == [8, 8] + 8 * [999]


def test_more_objects_than_a_page_holds_all_arrive_several_at_a_time(own: Lake, tmp_path: Path) -> None:
    many = {f"many/{i:04}.jsonl": b"%d\n" % i for i in range(2005)}
    own.own.put(own.name, many)
    own.commit({"few/a": b"1"})

    def slow(key: str, answer: Answer) -> Answer:
        time.sleep(0.005)
        return answer

    own.own.damage = slow
    found = own.fetch(tmp_path, path="many")
    assert tree(found.folder) == {key.removeprefix("many/"): data for key, data in many.items()}
    assert own.own.most_at_once > 2
    assert len([r for r in own.own.requests if r.path.endswith("/ls")]) == 3


def test_empty_objects_that_stand_for_a_folder_are_none(own: Lake, tmp_path: Path) -> None:
    own.commit({"train/": b"", "train/deep/": b"", "train/deep/a.jsonl": b"1"})
    assert tree(own.fetch(tmp_path, path="train").folder) == {"deep/a.jsonl": b"1"}


def test_a_branch_that_moves_meanwhile_does_not_mix_versions(own: Lake, tmp_path: Path) -> None:
    commit = own.commit({f"{i}.jsonl": b"old" for i in range(30)})
    own.own.put(own.name, {f"{i}.jsonl": b"new" for i in range(30)})
    moved: list[str] = []

    def move(request: Request) -> None:
        if request.object and not moved:
            moved.append("")
            moved[0] = str(own.branch().commit("meanwhile").get_commit().id)

    own.own.before = move  # type: ignore[assignment]
    found = own.fetch(tmp_path)
    assert moved != [commit]
    assert found.version["commit"] == commit
    assert set(tree(found.folder).values()) == {b"old"}


def test_objects_are_read_by_presigned_urls_if_the_server_issues_them(own: Lake, tmp_path: Path) -> None:
    own.commit(DATA)
    own.own.requests.clear()
    own.fetch(tmp_path, path="train")
    stored = [r for r in own.own.requests if r.path.startswith("/lake/")]
    assert len(stored) == (2 if own.own.kind == "s3" else 0)  # the third object is empty
    assert not [r for r in stored if r.authorized]
    assert len([r for r in own.own.requests if r.path == "/config"]) == 1


# The cache


def test_a_cached_commit_needs_neither_server_nor_keys(
    own: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = own.commit(DATA)
    first = own.fetch(tmp_path, path="train")
    own.own.requests.clear()
    own.own.stop()
    for key in lakefs_client.KEYS:
        monkeypatch.delenv(key)
    again = own.fetch(tmp_path, path="train", commit=commit)
    assert again.folder == first.folder
    assert again.version == {**first.version, "ref": f"commit {commit}"}
    assert own.own.requests == []


def test_a_branch_whose_commit_is_cached_is_not_fetched_again(own: Lake, tmp_path: Path) -> None:
    own.commit(DATA)
    first = own.fetch(tmp_path, path="train")
    own.own.requests.clear()
    assert own.fetch(tmp_path, path="train") == first
    assert [r.path for r in own.own.requests] == [f"/repositories/{own.name}/commits/main"]


def test_two_paths_of_a_commit_do_not_share_a_folder(own: Lake, tmp_path: Path) -> None:
    own.commit(DATA)
    assert tree(own.fetch(tmp_path, path="train/deep").folder) != tree(own.fetch(tmp_path, path="train").folder)


def test_a_commit_of_another_server_is_not_mistaken_for_one_of_this(own: Lake, tmp_path: Path) -> None:
    commit = own.commit(DATA)
    own.fetch(tmp_path, path="train")
    refused(own, tmp_path, path="train", commit=commit, endpoint="http://127.0.0.1:9")


def test_a_branch_of_a_dead_server_names_which_commits_are_cached(own: Lake, tmp_path: Path) -> None:
    commit = own.commit(DATA)
    own.fetch(tmp_path, path="train")
    own.own.stop()
    started = time.monotonic()
    error = refused(own, tmp_path, path="train")
    assert time.monotonic() - started < 5
    assert f"lakeFS at {own.endpoint} cannot be reached: connection refused" in error.problems
    assert error.hint == f"the cache holds data_source.commit={commit}, which needs no server"
    assert "set data_source.endpoint" in refused(own, tmp_path, path="other").hint


@pytest.mark.parametrize("harm", ["shorter", "missing", "unlisted"])
def test_a_cached_file_that_changed_is_not_read(own: Lake, tmp_path: Path, harm: str) -> None:
    commit = own.commit(DATA)
    folder = own.fetch(tmp_path, path="train").folder
    if harm == "shorter":
        (folder / "a.jsonl").write_bytes(b"{}")
    else:
        (folder / "a.jsonl" if harm == "missing" else folder.parent / "objects.json").unlink()
    assert "was modified after the fetch" in str(refused(own, tmp_path, path="train", commit=commit))


KILLED = """
import sys
from pathlib import Path
from src.schema import DataSource
from src.data.from_lakefs import fetch_lakefs
fetch_lakefs(DataSource(type="lakefs", endpoint=sys.argv[1], repo=sys.argv[2]), Path(sys.argv[3]))
"""


def test_a_fetch_that_is_killed_leaves_nothing_that_is_read(own: Lake, tmp_path: Path) -> None:
    commit = own.commit({f"{i}.jsonl": b"data" for i in range(20)})
    stuck = threading.Event()

    def hang(key: str, answer: Answer) -> Answer:
        if key == "9.jsonl":
            stuck.set()
            time.sleep(1)
        return answer

    own.own.damage = hang
    words = [sys.executable, "-c", KILLED, own.endpoint, own.name, str(tmp_path)]
    child = subprocess.Popen(words, cwd=ROOT)
    assert stuck.wait(30)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert tree(tmp_path)  # it was in the midst of it
    assert [p for p in tmp_path.rglob(commit) if any(p.glob("all"))] == []
    own.own.damage = lambda _key, answer: answer
    assert len(tree(own.fetch(tmp_path, commit=commit).folder)) == 20


def test_the_keys_are_never_written(own: Lake, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    own.commit(DATA)
    version = own.fetch(tmp_path, path="train").version
    written = json.dumps(version) + "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert not [s for s in (*own.secrets, "X-Amz-Signature") if s in written]
    assert not [r for r in caplog.records if r.name == "assay" and any(s in r.getMessage() for s in own.secrets)]


# Damage


def harmed(own: Lake, harm: Any, times: int = 99) -> None:
    left = [times]

    def damage(key: str, answer: Answer) -> Answer:
        if key != "train/a.jsonl" or not left[0]:
            return answer
        left[0] -= 1
        return harm(answer)

    own.own.damage = damage


HARMS = {
    "cut short": lambda a: a._replace(body=a.body[:-100], length=len(a.body)),
    "cut short in silence": lambda a: a._replace(body=a.body[:-100]),
    "longer": lambda a: a._replace(body=a.body + b"x"),
    "altered": lambda a: a._replace(body=a.body[:-1] + b" "),
    "gone": lambda a: Answer(404, b'{"message":"not found"}', {"Content-Type": "application/json"}),
    "forbidden": lambda a: Answer(403, b"<Error>X-Amz-Signature</Error>", {"Content-Type": "application/xml"}),
    "broken": lambda a: Answer(500, b'{"message":"oops"}', {"Content-Type": "application/json"}),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_damaged_object_is_never_kept(own: Lake, tmp_path: Path, name: str) -> None:
    own.commit(DATA)
    harmed(own, HARMS[name])
    assert "train/a.jsonl " in str(refused(own, tmp_path, path="train"))


@pytest.mark.parametrize("name", ["cut short", "cut short in silence", "altered"])
def test_an_object_that_arrives_damaged_once_is_read_again(own: Lake, tmp_path: Path, name: str) -> None:
    own.commit(DATA)
    harmed(own, HARMS[name], times=1)
    assert tree(own.fetch(tmp_path, path="train").folder) == FILES


def test_a_request_to_a_busy_server_is_retried(own: Lake, tmp_path: Path) -> None:
    own.commit(DATA)
    busy = iter([Answer(503, b"busy"), Answer(429, b"busy")])
    own.own.before = lambda _request: next(busy, None)
    assert tree(own.fetch(tmp_path, path="train").folder) == FILES


def test_without_an_md5_the_size_is_checked_and_the_manifest_says_so(own: Lake, tmp_path: Path) -> None:
    own.own.put(own.name, {"train/a.jsonl": DATA["train/a.jsonl"]}, checksum="0123456789abcdef0123456789abcdef-3")
    commit = own.commit({"train/b.jsonl": b"1"})
    found = own.fetch(tmp_path, path="train")
    assert found.version["checked_by_size_only"] == 1
    assert own.fetch(tmp_path, path="train", commit=commit).version["checked_by_size_only"] == 1
    harmed(own, HARMS["cut short in silence"])
    assert "7,900 bytes instead of 8,000" in str(refused(own, tmp_path / "other", path="train"))


# What is refused before anything is fetched


def test_all_names_that_lead_out_of_the_folder_are_reported(lake: Lake, tmp_path: Path) -> None:
    lake.commit({"../../etc/x": b"x", "/etc/x": b"x", "good.jsonl": b"x", "a/../../b": b"x"})
    error = refused(lake, tmp_path / "in" / "cache")
    assert len(error.problems) == 3
    assert "'../../etc/x'" in str(error) and "'/etc/x'" in str(error) and "'a/../../b'" in str(error)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["A.jsonl", "a.jsonl"], "'A.jsonl' and 'a.jsonl' would be one file"),
        (["é.jsonl", "e\u0301.jsonl"], "would be one file"),
        (["a//b.jsonl", "a/b.jsonl"], "would be one file"),
        (["a", "a/b.jsonl"], "'a' is a file and, for 'a/b.jsonl', a folder"),
        (["A", "a/b.jsonl"], "'A' is a file and, for 'a/b.jsonl', a folder"),
    ],
)
def test_names_that_cannot_be_files_side_by_side_are_refused(
    own: Lake, tmp_path: Path, keys: list[str], told: str
) -> None:
    own.commit({f"train/{key}": b"x" for key in keys})
    assert told in str(refused(own, tmp_path, path="train"))


def test_a_path_that_is_a_file_and_a_folder_is_refused(own: Lake, tmp_path: Path) -> None:
    own.commit({"train": b"x", "train/a": b"x"})
    assert "train of branch main is both a file and a folder" in str(refused(own, tmp_path, path="train"))
    assert tree(own.fetch(tmp_path, path="train/").folder) == {"a": b"x"}


def test_many_bad_names_do_not_fill_the_screen(own: Lake, tmp_path: Path) -> None:
    own.own.put(own.name, {f"/etc/{i}": b"x" for i in range(50)})
    own.commit({"a": b"x"})
    problems = refused(own, tmp_path).problems
    assert len(problems) == 21 and problems[-1] == "... and 30 more"


def test_more_than_max_gb_is_refused_before_it_is_fetched(lake: Lake, tmp_path: Path) -> None:
    lake.commit(DATA)
    size = sum(len(data) for data in DATA.values())
    told = str(refused(lake, tmp_path, path="train", max_gb=(size - 1) / 1e9))
    assert "3 objects of 8,008 bytes, more than data_source.max_gb=" in told
    assert not lake.server or not [
        r for r in lake.own.requests if r.object and r.path.endswith("/objects") and r.method == "GET"
    ]
    assert lake.fetch(tmp_path, path="train", max_gb=size / 1e9)


def test_an_empty_path_names_what_the_repository_holds(lake: Lake, tmp_path: Path) -> None:
    lake.commit({"train/a": b"x", "b": b"x"})
    error = refused(lake, tmp_path, path="tra")
    assert str(error) == (
        f"branch main of repository {lake.name} holds nothing under tra; "
        "set data_source.path; the repository holds b, train/"
    )


def test_a_repository_without_data_reports_it(lake: Lake, tmp_path: Path) -> None:
    assert "holds nothing under /; push data first" in str(refused(lake, tmp_path))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"repo": "no-such-repository"}, "has no repository no-such-repository"),
        ({"branch": "nope"}, "has no branch nope"),
        ({"tag": "nope"}, "has no tag nope"),
        ({"commit": "0" * 64}, f"has no commit {'0' * 64}"),
    ],
)
def test_what_the_server_does_not_have_is_named(
    lake: Lake, tmp_path: Path, keys: dict[str, str], told: str
) -> None:
    assert told in str(refused(lake, tmp_path, **keys))


def test_wrong_keys_are_reported_by_their_variables(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKEFS_SECRET_KEY", "wrong-and-secret")
    error = refused(lake, tmp_path)
    assert "does not accept the keys in LAKEFS_ACCESS_KEY and LAKEFS_SECRET_KEY" in str(error)
    assert "wrong-and-secret" not in str(error)


def test_a_branch_named_like_a_commit_is_not_mistaken_for_one(own: Lake, tmp_path: Path) -> None:
    own.commit(DATA)
    own.branch("abcdef12").create("main")
    assert "abcdef12 is a branch or tag" in str(refused(own, tmp_path, commit="abcdef12"))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"branch": "main", "tag": "v1"}, "names more than one version: branch main, tag v1"),
        ({"branch": "main", "commit": "a" * 64}, "names more than one version"),
        ({"commit": "HEAD"}, "data_source.commit=HEAD is not a commit id"),
        ({"commit": "../../x"}, "is not a commit id"),
        ({"repo": None}, "names no repository"),
        ({"repo": "../../etc"}, "is not a valid name of a lakeFS repository"),
        ({"endpoint": None}, "names no server"),
        ({"endpoint": "localhost:8000"}, "localhost:8000 is not the address of a lakeFS server"),
        ({"endpoint": "ftp://x"}, "is not the address of a lakeFS server"),
        ({"endpoint": "http://[::1"}, "is not the address of a lakeFS server"),
        ({"endpoint": "http://me:word@host"}, "the address of the lakeFS server holds credentials"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_without_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], told: str
) -> None:
    monkeypatch.delenv("LAKEFS_ENDPOINT", raising=False)
    monkeypatch.setattr(from_lakefs, "connect", lambda _source: pytest.fail("asked"))
    source = DataSource(**{"type": "lakefs", "endpoint": "http://localhost:1", "repo": "nl-sql", **keys})
    with pytest.raises(DataError, match=re.escape(told)) as caught:
        fetch_lakefs(source, tmp_path)
    assert caught.value.hint and "word" not in str(caught.value)


@pytest.mark.parametrize("missing", [["LAKEFS_ACCESS_KEY"], ["LAKEFS_SECRET_KEY"], list(lakefs_client.KEYS)])
def test_missing_keys_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]) -> None:
    for key in lakefs_client.KEYS:
        monkeypatch.setenv(key, "" if key in missing else "something")
    with pytest.raises(DataError, match=f"^{' and '.join(missing)} not set in the environment"):
        fetch_lakefs(DataSource(type="lakefs", endpoint="http://localhost:1", repo="nl-sql"), tmp_path)


# Servers that are none


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """A web server that answers everything with a page; `status` and `page` may be set."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(server.status)  # type: ignore[attr-defined]
            self.end_headers()
            self.wfile.write(server.page)  # type: ignore[attr-defined]

        def log_message(self, *_: Any) -> None:
            pass

    for key in lakefs_client.KEYS:
        monkeypatch.setenv(key, "something")
    server = HTTPServer(("127.0.0.1", 0), Page)
    server.status, server.page = 200, b"<!DOCTYPE html>"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [200, 403, 404])
@pytest.mark.parametrize("page", [b"<!DOCTYPE html>", b"\xff\xfe", b"[1]", b'{"a": 1}', b""])
def test_another_web_server_is_reported(stranger: Any, tmp_path: Path, status: int, page: bytes) -> None:
    stranger.status, stranger.page = status, page
    endpoint = f"http://127.0.0.1:{stranger.server_port}"
    with pytest.raises(DataError, match=f"{endpoint} responds, but is not a lakeFS server"):
        fetch_lakefs(DataSource(type="lakefs", endpoint=endpoint, repo="nl-sql"), tmp_path)


def test_a_server_that_never_answers_is_given_up(
    stranger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lakefs_client, "TIMEOUT", (0.3, 0.3))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(DataError, match="cannot be reached: no response within the timeout"):
            fetch_lakefs(DataSource(type="lakefs", endpoint=endpoint, repo="nl-sql"), tmp_path)
    assert time.monotonic() - started < 5


def test_an_unknown_host_is_reported(stranger: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be reached: its name is not known"):
        fetch_lakefs(DataSource(type="lakefs", endpoint="http://lakefs.invalid", repo="nl-sql"), tmp_path)


def test_the_client_is_imported_only_when_it_is_used() -> None:
    script = (
        "import sys, src.data.from_lakefs, src.data.lakefs_push; print({'lakefs', 'lakefs_sdk'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
