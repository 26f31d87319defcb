"""data-push: a folder becomes one commit, or nothing is committed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from src.errors import ConfigError, DataError, UserError
from tests.data.lake import Lake
from tests.data.lakefs_server import Answer, Request

pytest_plugins = ["tests.data.lake"]

ROOT = Path(__file__).resolve().parents[2]
JSON = {"Content-Type": "application/json"}
DATA = {"a.jsonl": b'{"x":1}\n' * 1000, "deep/ünï code.jsonl": b'{"x":2}\n', "empty.jsonl": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path / "data", DATA)


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The log; reset, since an earlier test may have started logging by the command line."""
    log = logging.getLogger("assay")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "propagate", False)
    caplog.set_level(logging.INFO, "assay")
    return caplog


def filled(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def refused(lake: Lake, folder: Path, kind: type[UserError] = DataError, **keys: Any) -> UserError:
    """The error of a push, after a check that the branch is unchanged."""
    before = lake.branch().get_commit().id
    with pytest.raises(kind) as caught:
        lake.push(folder, **keys)
    assert lake.branch().get_commit().id == before
    assert not [s for s in (*lake.secrets, "X-Amz-Signature") if s in str(caught.value)]
    assert caught.value.hint
    return caught.value


def uploads(lake: Lake) -> int:
    ends = ("/objects", "/staging/backing") if lake.own.kind == "s3" else ("/objects",)
    return len([r for r in lake.own.requests if r.path.endswith(ends) and r.method in {"POST", "PUT"}])


# What is committed


def test_a_folder_becomes_a_commit_that_can_be_fetched(
    lake: Lake, folder: Path, tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    assert lake.push(folder, path="train/v1/", message="the first") == 0
    head = lake.branch().get_commit()
    assert head.message == "the first"
    assert heard.messages[-1] == f"data_source.commit={head.id}"
    assert f"{lake.name}: 3 files uploaded, 0 unchanged, committed to branch main" in heard.messages
    found = lake.fetch(tmp_path / "cache", commit=head.id, path="train/v1")
    assert {p.relative_to(found.folder).as_posix(): p.read_bytes() for p in found.folder.rglob("*.jsonl")} == DATA


def test_only_what_changed_is_uploaded(lake: Lake, folder: Path, heard: pytest.LogCaptureFixture) -> None:
    lake.push(folder)
    (folder / "a.jsonl").write_bytes(DATA["a.jsonl"].replace(b"1", b"3"))  # of the same size
    if lake.server:
        lake.own.requests.clear()
    lake.push(folder)
    assert f"{lake.name}: 1 file uploaded, 2 unchanged, committed to branch main" in heard.messages
    assert lake.committed()["a.jsonl"] == (folder / "a.jsonl").read_bytes()
    assert not lake.server or uploads(lake) == 1


def test_an_unchanged_folder_makes_no_commit(lake: Lake, folder: Path, heard: pytest.LogCaptureFixture) -> None:
    lake.push(folder)
    before = lake.branch().get_commit().id
    assert lake.push(folder) == 0
    assert lake.branch().get_commit().id == before
    assert heard.messages[-1] == f"{lake.name}: 0 files uploaded, 3 unchanged, nothing to commit to branch main"


def test_what_the_folder_does_not_have_stays_on_the_branch(lake: Lake, folder: Path) -> None:
    lake.commit({"older.jsonl": b"x", "data/older.jsonl": b"x"})
    lake.push(folder, path="data")
    assert {"older.jsonl", "data/older.jsonl", "data/a.jsonl"} <= lake.committed().keys()


def test_a_pattern_and_a_branch_choose(lake: Lake, folder: Path) -> None:
    lake.branch("exp").create("main")
    lake.push(folder, pattern="*.jsonl", branch="exp")
    assert lake.committed("exp").keys() == {"a.jsonl", "empty.jsonl"}
    assert lake.content("main") == {}


def test_one_file_is_committed_under_its_name(lake: Lake, folder: Path) -> None:
    lake.push(folder / "a.jsonl", path="train")
    assert lake.committed() == {"train/a.jsonl": DATA["a.jsonl"]}


def test_many_files_are_uploaded_several_at_a_time(own: Lake, tmp_path: Path) -> None:
    many = {f"{i:03}": b"%d" % i for i in range(60)}
    now: list[int] = [0, 0]

    def slow(request: Request) -> None:
        if request.method in {"POST", "PUT"} and not request.path.endswith("/commits"):
            now[0] += 1
            now[1] = max(now)
            time.sleep(0.01)
            now[0] -= 1

    own.own.before = slow  # type: ignore[assignment]
    own.push(filled(tmp_path, many))
    assert own.committed() == many
    assert now[1] > 2


def test_files_are_uploaded_by_presigned_urls_if_the_server_issues_them(own: Lake, folder: Path) -> None:
    own.push(folder)
    stored = [r for r in own.own.requests if r.path.startswith("/lake/")]
    assert len(stored) == (3 if own.own.kind == "s3" else 0)
    assert not [r for r in stored if r.authorized]


def test_hidden_files_are_left_out_and_named(lake: Lake, folder: Path, heard: pytest.LogCaptureFixture) -> None:
    filled(folder, {".env": b"secret", ".git/config": b"x", "deep/.cache/x": b"x"})
    os.mkfifo(folder / "pipe")
    lake.push(folder)
    assert lake.committed().keys() == DATA.keys()
    assert "skipped, hidden or not a regular file: .env, .git/config, deep/.cache/x, pipe" in heard.messages


def test_a_link_inside_the_folder_is_the_file_that_it_leads_to(lake: Lake, folder: Path) -> None:
    (folder / "b.jsonl").symlink_to(folder / "a.jsonl")
    lake.push(folder)
    assert lake.committed()["b.jsonl"] == DATA["a.jsonl"]


# What is refused before anything is uploaded


def test_links_that_lead_out_of_the_folder_are_all_named(own: Lake, folder: Path, tmp_path: Path) -> None:
    filled(tmp_path, {"secret.txt": b"x", "elsewhere/x": b"x"})
    for name, target in {"file": "secret.txt", "folder": "elsewhere", "nowhere": "none"}.items():
        (folder / name).symlink_to(tmp_path / target)
    error = refused(own, folder)
    assert [p.split()[0] for p in error.problems] == [str(folder / n) for n in ("file", "folder", "nowhere")]
    assert own.content() == {}
    assert "is a link out of" in str(refused(own, folder, pattern="folder/*"))
    assert "is a link out of" in str(refused(own, folder, pattern="../*.txt"))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["A", "a"], "'A' and 'a' would be one file"),
        (["a\\b"], "an object named 'a\\\\b'"),
        ([os.fsdecode(b"\xff")], "is not UTF-8"),
    ],
)
def test_names_that_could_not_be_fetched_again_are_refused(
    own: Lake, tmp_path: Path, files: list[str], told: str
) -> None:
    assert told in str(refused(own, filled(tmp_path, dict.fromkeys(files, b"x"))))
    assert own.content() == {}


@pytest.mark.parametrize(
    ("path", "pattern", "told"),
    [
        ("nowhere", "*", "nowhere does not exist"),
        ("data", "*.txt", "no file to commit in"),
        ("data", "/etc/*", "dataset_pattern=/etc/*"),
        ("data", "", "dataset_pattern="),
        ("data/.env", "*", "no file to commit in"),
    ],
)
def test_a_folder_without_such_files_is_reported(
    own: Lake, folder: Path, path: str, pattern: str, told: str
) -> None:
    filled(folder, {".env": b"secret"})
    assert told in str(refused(own, folder.parent / path, pattern=pattern))


def test_every_setting_that_is_wrong_is_reported_at_once(own: Lake, folder: Path) -> None:
    error = refused(own, folder, ConfigError, message=" ", type="s3", tag="v1", commit="a" * 64)
    assert error.problems == (
        "data_source.type=s3: data-push commits to lakefs only",
        "data_source.tag is not supported by data-push, which commits to data_source.branch",
        "data_source.commit is not supported by data-push, which commits to data_source.branch",
        "message is not set: a commit needs one",
    )
    assert refused(own, folder, ConfigError, message=None).problems == error.problems[-1:]


@pytest.mark.parametrize(
    ("keys", "told"),
    [({"branch": "nope"}, "has no branch nope"), ({"repo": "no-such"}, "has no repository no-such")],
)
def test_a_missing_branch_or_repository_is_not_created(
    lake: Lake, folder: Path, keys: dict[str, str], told: str
) -> None:
    assert told in str(refused(lake, folder, **keys))


def test_a_tag_is_no_branch(lake: Lake, folder: Path) -> None:
    lake.tag("v1", lake.commit({"a": b"x"}))
    assert "branch v1" in str(refused(lake, folder, branch="v1"))


def test_foreign_uncommitted_changes_are_refused(lake: Lake, folder: Path) -> None:
    lake.put({"theirs.jsonl": b"x"})
    error = refused(lake, folder)
    assert "holds uncommitted changes that are not part of this push: theirs.jsonl" in str(error)
    assert error.hint.endswith(f"lakectl branch reset lakefs://{lake.name}/main")
    assert lake.content().keys() == {"theirs.jsonl"}


# Failures


def failing(own: Lake, answer: Answer, key: str = "deep/ünï code.jsonl") -> None:
    own.own.before = lambda r: answer if r.method in {"POST", "PUT"} and r.object == key else None


def test_an_upload_that_fails_commits_nothing_and_can_be_continued(
    own: Lake, folder: Path, heard: pytest.LogCaptureFixture
) -> None:
    failing(own, Answer(500, b'{"message":"disk full"}', JSON))
    error = refused(own, folder)
    assert error.problems[0] == "deep/ünï code.jsonl cannot be uploaded: disk full"
    assert error.problems[1].startswith("nothing was committed; branch main has ")
    assert error.problems[1].endswith(" of 3")
    assert error.hint.endswith(f"lakectl branch reset lakefs://{own.name}/main")
    own.own.before = lambda _request: None
    own.push(folder)
    assert own.committed() == DATA


def test_an_interrupted_connection_is_reported(own: Lake, folder: Path) -> None:
    before = own.branch().get_commit().id

    def die(request: Request) -> Answer | None:
        return Answer(200, b"", length=10) if request.object else None

    own.own.before = die
    with pytest.raises(DataError, match="cannot be uploaded: the connection was interrupted") as caught:
        own.push(folder)
    assert "nothing was committed; branch main has 0 uncommitted files of 3" in str(caught.value)
    assert own.branch().get_commit().id == before


def test_an_upload_that_arrives_damaged_is_not_committed(own: Lake, folder: Path) -> None:
    def damage(request: Request) -> None:
        if request.path.endswith("/ls"):
            for stored in own.own.repositories[own.name].staged.get("main", {}).values():
                stored.data, stored.checksum = stored.data[:-1], "0" * 32

    own.own.before = damage  # type: ignore[assignment]
    assert "on the branch differs from the local file" in str(refused(own, folder))


@pytest.mark.parametrize("status", [400, 403])
def test_a_refused_commit_is_reported_with_the_servers_message(own: Lake, folder: Path, status: int) -> None:
    said = Answer(status, b'{"message":"cannot write to protected branch"}', JSON)
    own.own.before = lambda r: said if r.method == "POST" and r.path.endswith("/commits") else None
    assert "cannot write to protected branch" in str(refused(own, folder))


def test_a_commit_without_an_answer_is_not_sent_twice(own: Lake, folder: Path) -> None:
    sent: list[Request] = []

    def silent(request: Request) -> Answer | None:
        if request.method != "POST" or not request.path.endswith("/commits"):
            return None
        sent.append(request)
        return Answer(201, b"", length=10)

    own.own.before = silent
    assert "it is unknown whether" in str(refused(own, folder))
    assert len(sent) == 1


# By the command line


def run_command(lake: Lake, *words: str, make: bool = False) -> subprocess.CompletedProcess[str]:
    command = (
        ["make", f"PY={sys.executable}", "data-push"] if make else [sys.executable, "-m", "src.main", "data-push"]
    )
    keys = [f"data_source.endpoint={lake.endpoint}", f"data_source.repo={lake.name}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run([*command, *keys, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


MESSAGES = [
    'it\'s "new" = better, a=1 # 50% (x) [y] {z}',
    "ünï 漢字 $HOME $(id) `id` ${oc.env:HOME} \\'\\",
    "a\n\nb",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_make_hands_a_message_on_as_it_was_typed(own: Lake, folder: Path, message: str) -> None:
    done = run_command(own, f"MESSAGE={message}", f"dataset_path={folder}", make=True)
    assert done.returncode == 0, done.stderr
    head = own.branch().get_commit()
    assert head.message == message
    assert f"data_source.commit={head.id}" in done.stdout.splitlines()[-2:]
    assert done.stdout.splitlines()[-1].startswith("next: make check-data ")


def test_without_a_message_make_shows_an_example(own: Lake, folder: Path) -> None:
    done = run_command(own, f"dataset_path={folder}", make=True)
    assert done.returncode == 2
    assert 'message is not set: a commit needs one; write make data-push MESSAGE="what is new"' in done.stderr
    assert "Traceback" not in done.stderr


def test_the_stage_accepts_a_message_and_shows_no_keys(own: Lake, folder: Path) -> None:
    done = run_command(own, "message=two words", f"dataset_path={folder}")
    assert done.returncode == 0, done.stderr
    assert own.branch().get_commit().message == "two words"
    assert not [s for s in own.secrets if s in done.stdout + done.stderr]
