"""Pushing a real project to a real server: which files are sent, and what the server never loses."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from src.errors import RemoteError
from src.remote import push as pushing
from src.remote import transfer
from src.remote.agent import snapshots
from src.remote.connection import Connection
from src.remote.target import RemoteTarget
from tests.fixtures import tree
from tests.remote.client import GIT
from tests.remote.proxy import Proxy
from tests.remote.server import Server, needs_own_mounts, needs_ssh
from tests.remote.sync import environment_of

pytest_plugins = ["tests.remote.server", "tests.remote.sync"]
pytestmark = needs_ssh

PROJECT = {
    "src/main.py": "main\n",
    "src/model.py": "model\n",
    "configs/train.yaml": "lr: 1\n",
    "README.md": "read\n",
}
IGNORED = "/outputs/\n/models/\n.env\n__pycache__/\n"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def git(*words: str) -> None:
    subprocess.run([*GIT, *words], check=True, capture_output=True)


@pytest.fixture
def local_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project, the current folder of the test."""
    project = tmp_path / "my project"
    write(project, PROJECT | {".gitignore": IGNORED})
    monkeypatch.chdir(project)
    git("init", "-q")
    return project


@pytest.fixture
def server_dir(sshd: Server, tmp_path: Path) -> Path:
    """REMOTE_DIR, which does not exist yet."""
    return sshd.home / f"{tmp_path.name} ünd more"


def pushed(server_dir: Path) -> dict[str, bytes]:
    """The files on the server, without its records."""
    return {path: data for path, data in tree(server_dir).items() if not path.startswith("outputs/")}


def own(project: Path) -> dict[str, bytes]:
    return {p: d for p, d in tree(project).items() if not p.startswith((".git/", "outputs/", "models/"))}


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def left_over(server_dir: Path) -> list[str]:
    return [path for path in tree(server_dir) if "incoming" in path or path.endswith(".tmp")]


# Which files are pushed


def test_the_server_has_the_files_that_git_tracks_or_would_add(
    sync_connection: Connection, local_dir: Path, server_dir: Path, sync_way: str
) -> None:
    write(local_dir, {"models/big.bin": "x", "src/__pycache__/a.pyc": "x", "outputs/runs/1/manifest.json": "{}"})
    write(local_dir, {"new and untracked.txt": "new"})
    pushing.push(sync_connection)
    assert pushed(server_dir) == {
        name: text.encode()
        for name, text in {**PROJECT, ".gitignore": IGNORED, "new and untracked.txt": "new"}.items()
    }
    assert left_over(server_dir) == []


def test_secrets_outputs_and_environments_are_never_pushed(
    sync_connection: Connection, local_dir: Path, server_dir: Path
) -> None:
    secret = {name: "TOKEN=1" for name in (".env", ".env.local", "sub/.env", "sub/.env.prod/x")}
    places = {name: "x" for name in ("outputs/a", "artifacts/models/m", ".venv/lib/x", ".cache/x")}
    venv = {"env two/pyvenv.cfg": "", "env two/lib/python/x.py": "x"}
    write(local_dir, {**secret, **places, **venv, ".env.example": "TOKEN=", "sub/outputs/kept": "k"})
    git("add", "--force", ".")
    pushing.push(sync_connection)
    assert set(pushed(server_dir)) == {*PROJECT, ".gitignore", ".env.example", "sub/outputs/kept"}


NAMES = [
    "a b.txt",
    "ünïcödé 漢字.txt",
    "two\nlines",
    "-rf",
    "--delete",
    "it's",
    'quo"te',
    "$HOME",
    "a\\b",
    "*",
    ":x",
    "#",
]


def test_file_names_are_kept(
    sync_connection: Connection, local_dir: Path, server_dir: Path, sync_way: str
) -> None:
    write(local_dir, {name: name for name in NAMES} | {f"src/{name}/{name}": "deep" for name in NAMES})
    (local_dir / os.fsdecode(b"latin-\xe9")).write_text("bytes")
    pushing.push(sync_connection)
    assert pushed(server_dir) == own(local_dir)


def test_file_names_are_kept_whatever_the_locale(
    sshd: Server, sync_connection: Connection, local_dir: Path, server_dir: Path
) -> None:
    with sshd.session(LC_ALL="C", LANG="de_DE.ISO-8859-1", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"):
        write(local_dir, {"ünïcödé 漢字.txt": "x"})
        pushing.push(sync_connection)
    assert (server_dir / "ünïcödé 漢字.txt").read_text() == "x"


def test_executable_and_private_modes_are_kept(
    sync_connection: Connection, local_dir: Path, server_dir: Path, sync_way: str
) -> None:
    write(local_dir, {"run.sh": "#!/bin/sh\n", "private.txt": "p"})
    (local_dir / "run.sh").chmod(0o755)
    (local_dir / "private.txt").chmod(0o600)
    pushing.push(sync_connection)
    assert os.access(server_dir / "run.sh", os.X_OK) and not os.access(server_dir / "README.md", os.X_OK)
    assert (server_dir / "private.txt").stat().st_mode & 0o777 == 0o600
    (local_dir / "run.sh").chmod(0o644)
    (local_dir / "README.md").chmod(0o755)
    pushing.push(sync_connection)
    assert not (server_dir / "run.sh").stat().st_mode & 0o111 and os.access(server_dir / "README.md", os.X_OK)


def test_internal_links_are_pushed_and_others_reported(
    sync_connection: Connection, local_dir: Path, server_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, target in (("inside", "README.md"), ("src/up", "../configs"), ("broken", "nowhere")):
        (local_dir / name).symlink_to(target)
    write(local_dir, {"outputs/x": "x", ".env": "TOKEN=1"})
    for name, target in (("away", "../.."), ("abs", "/etc/passwd"), ("out", "outputs/x"), ("env", ".env")):
        (local_dir / name).symlink_to(target)
    pushing.push(sync_connection)
    found = printed(capsys)
    assert os.readlink(server_dir / "inside") == "README.md" and os.readlink(server_dir / "src/up") == "../configs"
    assert os.readlink(server_dir / "broken") == "nowhere"
    for name in ("away", "abs", "out", "env"):
        assert not os.path.lexists(server_dir / name) and f"{name} is not pushed: the link leads to" in found
    (local_dir / "inside").unlink()
    (local_dir / "inside").symlink_to("src")
    pushing.push(sync_connection)
    assert os.readlink(server_dir / "inside") == "src" and "replaced" not in printed(capsys)


def test_a_nested_repository_is_reported(
    sync_connection: Connection, local_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(local_dir, {"other/x": "x"})
    subprocess.run([*GIT, "init", "-q"], cwd=local_dir / "other", check=True)
    pushing.push(sync_connection)
    assert "other is not pushed, because it is a separate git repository; ALSO=other pushes it" in printed(capsys)


def test_a_folder_without_the_project_is_refused(
    sync_connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RemoteError, match=r"no src/main.py"):
        pushing.push(sync_connection)


def test_a_project_that_git_ignores_is_refused(sync_connection: Connection, local_dir: Path) -> None:
    write(local_dir, {".gitignore": "/src/\n"})
    with pytest.raises(RemoteError, match=r"git ignores src/main.py"):
        pushing.push(sync_connection)


def test_a_folder_without_a_git_repository_is_refused_until_git_init(
    sync_connection: Connection, local_dir: Path, server_dir: Path
) -> None:
    shutil.rmtree(local_dir / ".git")
    with pytest.raises(RemoteError) as error:
        pushing.push(sync_connection)
    assert error.value.exit_code == 2
    assert str(error.value) == (
        f"{local_dir} is not a git checkout, but a push needs git to list the files; "
        "run git init in this folder; no commit is needed"
    )
    assert not server_dir.exists()
    git("init", "-q")
    pushing.push(sync_connection)
    assert pushed(server_dir) == own(local_dir)


def test_without_git_a_push_is_refused(
    sync_connection: Connection, local_dir: Path, server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RemoteError, match=r"git is not installed, but a push .*; install git$") as error:
        pushing.push(sync_connection)
    assert error.value.exit_code == 2 and not server_dir.exists()


def test_what_git_reports_of_a_damaged_repository_is_shown(sync_connection: Connection, local_dir: Path) -> None:
    (local_dir / ".git/config").write_text("[core\n")
    with pytest.raises(RemoteError, match=r"git does not list the files of .*bad config line 1"):
        pushing.push(sync_connection)


# ALSO


def test_files_of_also_are_sent_and_never_removed(
    sync_connection: Connection, local_dir: Path, server_dir: Path, sync_way: str, tmp_path: Path
) -> None:
    write(local_dir, {"models/m/config.json": "{}", "models/other": "x", "models/m/.env": "TOKEN=1"})
    write(tmp_path / "cache", {"blob": "weights"})
    (local_dir / "models/m/weights").symlink_to(tmp_path / "cache/blob")
    pushing.push(sync_connection, also=["models/m"])
    assert (server_dir / "models/m/weights").read_text() == "weights" and not (
        server_dir / "models/m/weights"
    ).is_symlink()
    assert sorted(p.name for p in (server_dir / "models").rglob("*")) == ["config.json", "m", "weights"]
    shutil.rmtree(local_dir / "models")
    pushing.push(sync_connection)
    assert (server_dir / "models/m/config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (".env", "is never pushed"),
        ("outputs/runs/1", "is never pushed"),
        ("../elsewhere", "is outside"),
        ("/etc", "is outside"),
        ("none", "does not exist"),
        (".", "is the entire folder"),
        ("env", "is never pushed"),
    ],
)
def test_some_paths_are_refused_as_also(
    sync_connection: Connection, local_dir: Path, path: str, reason: str
) -> None:
    write(local_dir, {".env": "", "outputs/runs/1/x": "", "env/pyvenv.cfg": ""})
    with pytest.raises(RemoteError, match=f"ALSO={path} {reason}"):
        pushing.push(sync_connection, also=[path])


def test_a_large_file_is_hashed_once_while_its_times_stay(
    sync_connection: Connection, local_dir: Path, server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(local_dir, {"models/w": "weights"})
    os.utime(local_dir / "models/w", (1, 1))
    monkeypatch.setattr(pushing, "RECENT_NS", 0)
    pushing.push(sync_connection, also=["models/w"])
    looked: list[str] = []
    real = pushing.sha256
    monkeypatch.setattr(pushing, "sha256", lambda path: (looked.append(str(path)), real(path))[1])
    pushing.push(sync_connection, also=["models/w"])
    assert "models/w" not in looked and "src/main.py" in looked
    (local_dir / "models/w").write_text("WEIGHTS")
    os.utime(local_dir / "models/w", (1, 1))  # same size and time as before
    pushing.push(sync_connection, also=["models/w"])
    assert (server_dir / "models/w").read_text() == "WEIGHTS"


# Files on the server


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are sent from now on."""
    paths: list[str] = []
    real = transfer.send

    def send(connection: Connection, files: Mapping[str, Path], *more: Any) -> None:
        paths.extend(map(str, files.values()))
        real(connection, files, *more)

    monkeypatch.setattr(transfer, "send", send)
    return paths


def test_only_what_differs_is_sent(
    sync_connection: Connection,
    local_dir: Path,
    server_dir: Path,
    sync_way: str,
    capsys: pytest.CaptureFixture[str],
    sent: list[str],
) -> None:
    where = f"{sync_connection.target}:{sync_connection.target.dir}"
    pushing.push(sync_connection)
    assert f"pushed to {where}: 5 new (" in printed(capsys)
    sent.clear()
    pushing.push(sync_connection)
    assert printed(capsys) == f"nothing to push: {where} is up to date\n" and sent == []
    write(local_dir, {"src/model.py": "better\n", "src/new.py": "new\n"})
    (local_dir / "README.md").unlink()
    pushing.push(sync_connection)
    assert sorted(sent) == ["src/model.py", "src/new.py"]
    text = printed(capsys)
    assert "1 changed, 1 new, 1 removed (11 bytes)" in text
    assert "  changed  src/model.py\n  new      src/new.py\n  removed  README.md\n" in text
    assert pushed(server_dir) == own(local_dir)


def test_the_first_of_many_names_are_printed(
    sync_connection: Connection, local_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(local_dir, {f"data/{n}": str(n) for n in range(30)})
    pushing.push(sync_connection)
    lines = printed(capsys).splitlines()
    assert len(lines) == 22 and lines[-1] == "  and 15 more"


def test_only_pushed_files_are_removed(
    sync_connection: Connection, local_dir: Path, server_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(local_dir, {"gone/a.txt": "a", "gone/deep/b.txt": "b", "edited.txt": "e", "stays/c.txt": "c"})
    pushing.push(sync_connection)
    write(server_dir, {"stays/mine.txt": "mine", "notes.txt": "notes", "outputs/runs/1/manifest.json": "{}"})
    write(server_dir, {"edited.txt": "edited there"})
    shutil.rmtree(local_dir / "gone")
    shutil.rmtree(local_dir / "stays")
    (local_dir / "edited.txt").unlink()
    capsys.readouterr()
    pushing.push(sync_connection)
    assert "edited.txt was deleted locally but modified on the server: not removed" in printed(capsys)
    mine = {"stays/mine.txt": b"mine", "notes.txt": b"notes", "edited.txt": b"edited there"}
    assert pushed(server_dir) == own(local_dir) | mine
    assert not (server_dir / "gone").exists()
    assert (server_dir / "outputs/runs/1/manifest.json").exists()
    pushing.push(sync_connection)
    assert "edited.txt" not in printed(capsys) and (server_dir / "edited.txt").exists()


def test_files_changed_on_the_server_are_backed_up(
    sync_connection: Connection,
    local_dir: Path,
    server_dir: Path,
    sync_way: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(server_dir, {"README.md": "by hand, before any push"})
    pushing.push(sync_connection)
    write(server_dir, {"src/model.py": "edited there"})
    pushing.push(sync_connection)
    text = printed(capsys)
    assert text.count("replaced although modified on the server") == 2
    kept = sorted((server_dir / "outputs/remote/replaced").glob("*/**/*.*"))
    assert sorted(p.read_text() for p in kept if p.is_file()) == ["by hand, before any push", "edited there"]
    assert pushed(server_dir) == own(local_dir)


def test_a_file_becomes_a_folder_and_a_folder_a_file(
    sync_connection: Connection, local_dir: Path, server_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(local_dir, {"one": "file", "two/x": "x"})
    pushing.push(sync_connection)
    write(server_dir, {"two/mine": "mine"})
    (local_dir / "one").unlink()
    shutil.rmtree(local_dir / "two")
    write(local_dir, {"one/x": "x", "two": "file"})
    pushing.push(sync_connection)
    assert pushed(server_dir) == own(local_dir)
    (kept,) = (server_dir / "outputs/remote/replaced").glob("*/two/mine")
    assert kept.read_text() == "mine"
    assert "replaced although modified on the server: two;" in printed(capsys)


def test_a_link_to_a_folder_may_become_a_folder(
    sync_connection: Connection, local_dir: Path, server_dir: Path
) -> None:
    (local_dir / "data").symlink_to("configs")
    pushing.push(sync_connection)
    (local_dir / "data").unlink()
    write(local_dir, {"data/train.yaml": "rows"})
    pushing.push(sync_connection)
    assert (server_dir / "configs/train.yaml").read_text() == "lr: 1\n" and (
        server_dir / "data/train.yaml"
    ).read_text() == "rows"


def test_nothing_is_pushed_through_a_link(sync_connection: Connection, local_dir: Path, server_dir: Path) -> None:
    """Git still tracks the files of a folder that is a link now; ALSO follows a link, and a folder arrives."""
    write(local_dir, {"data/train.yaml": "rows"})
    subprocess.run(["git", "add", "data"], cwd=local_dir, check=True)
    shutil.rmtree(local_dir / "data")
    (local_dir / "data").symlink_to("configs")
    pushing.push(sync_connection)
    assert os.readlink(server_dir / "data") == "configs"
    assert (server_dir / "configs/train.yaml").read_text() == "lr: 1\n"
    pushing.push(sync_connection, also=["data"])
    assert (server_dir / "data/train.yaml").read_text() == "lr: 1\n" and not (server_dir / "data").is_symlink()


def test_a_push_never_writes_to_protected_paths(sync_connection: Connection, local_dir: Path) -> None:
    for path in ("../up", "/tmp/abs", "outputs/runs/x", ".env", ".venv/bin/python", "a/../../b", "link/x"):
        file = {"identity": "0" * 64, "size": 0, "mode": 0o644, "also": False}
        wanted = {path: file, "link": file | {"identity": "-> sub/../.."}}
        with pytest.raises(RemoteError, match="a push must not write to "):
            sync_connection.call(
                "apply_push:apply",
                folder=sync_connection.target.dir,
                push={"id": "x", "sender": "y"},
                wanted=wanted,
                named=[],
            )


# Transfer


@pytest.fixture
def large(local_dir: Path) -> Path:
    """A file that is too large for one packet."""
    (local_dir / "large.bin").write_bytes(os.urandom(3_000_000))
    return local_dir / "large.bin"


def test_a_push_resumes_after_each_lost_connection(
    bad_connection: tuple[Connection, Proxy], local_dir: Path, server_dir: Path, large: Path, sync_way: str
) -> None:
    connection, between = bad_connection
    between.delay, between.room = 0.001, 1_200_000  # no connection lasts for all of the file
    pushing.push(connection)
    assert pushed(server_dir) == own(local_dir) and left_over(server_dir) == []
    assert between.count < 15


def test_a_killed_push_changes_nothing_and_the_next_one_resumes_it(
    bad_connection: tuple[Connection, Proxy],
    local_dir: Path,
    server_dir: Path,
    large: Path,
    sync_way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection, between = bad_connection
    pushing.push(connection)
    before = pushed(server_dir)
    large.write_bytes(os.urandom(3_000_000))
    write(local_dir, {"README.md": "new", "src/more.py": "more"})
    between.delay = 0.01
    other = subprocess.Popen(
        [sys.executable, "-m", "src.main", "push"],
        env=environment_of(connection),
        start_new_session=True,
    )
    incoming = server_dir / "outputs/remote/incoming"
    until(lambda: sum(p.stat().st_size for p in incoming.rglob("*") if p.is_file()) > 500_000)
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    assert pushed(server_dir) == before
    between.delay = 0
    sizes: list[int] = []
    real = transfer.send
    monkeypatch.setattr(transfer, "send", lambda *given: (sizes.append(given[-1]), real(*given)))
    pushing.push(connection)
    assert pushed(server_dir) == own(local_dir) and left_over(server_dir) == []
    assert len(sizes) == 1 and sizes[0] < 2_500_000


WRAPPER = """#!/bin/sh
{rsync} "$@"
code=$?
for file in {folder}/outputs/remote/incoming/*/*; do
    [ -e {flag} ] || printf X | dd of="$file" bs=1 conv=notrunc 2>/dev/null
done
{once}
exit $code
"""


def wrapper(folder: Path, server_dir: Path, once: bool) -> str:
    """A PATH with an rsync that corrupts received files, `once` or each time."""
    flag = folder / "damaged"
    text = WRAPPER.format(
        rsync=shutil.which("rsync"),
        folder=shlex.quote(str(server_dir)),
        flag=shlex.quote(str(flag)),
        once=f"touch {shlex.quote(str(flag))}" if once else "",
    )
    (folder / "bin").mkdir()
    (folder / "bin/rsync").write_text(text)
    (folder / "bin/rsync").chmod(0o755)
    return f"{folder}/bin:{os.environ['PATH']}"


def test_a_file_corrupted_in_transfer_is_sent_again(
    sshd: Server, sync_connection: Connection, local_dir: Path, server_dir: Path, large: Path, tmp_path: Path
) -> None:
    with sshd.session(PATH=wrapper(tmp_path, server_dir, once=True)):
        pushing.push(sync_connection)
    assert (tmp_path / "damaged").exists()
    assert pushed(server_dir) == own(local_dir)


def test_a_partial_file_on_the_server_is_resumed_and_verified(
    sync_connection: Connection, local_dir: Path, server_dir: Path, large: Path, sync_way: str, sent: list[str]
) -> None:
    incoming = server_dir / "outputs/remote/incoming" / pushing._sender_id()
    incoming.mkdir(parents=True)
    (incoming / hashlib.sha256(large.read_bytes()).hexdigest()).write_bytes(os.urandom(1_000_000))
    pushing.push(sync_connection)
    assert pushed(server_dir) == own(local_dir)
    assert sent.count("large.bin") == 2  # the rest of it, then all of it


def test_a_file_corrupted_each_time_replaces_nothing(
    sshd: Server, sync_connection: Connection, local_dir: Path, server_dir: Path, tmp_path: Path
) -> None:
    pushing.push(sync_connection)
    before = pushed(server_dir)
    write(local_dir, {"README.md": "new", "src/more.py": "more"})
    sync_connection.close()
    with (
        sshd.session(PATH=wrapper(tmp_path, server_dir, once=False)),
        pytest.raises(RemoteError, match=r"README.md, src/more.py: checksum mismatch after 3 attempts"),
    ):
        pushing.push(sync_connection)
    assert pushed(server_dir) == before


def test_a_file_that_changes_during_the_transfer_is_sent_again(
    sync_connection: Connection, local_dir: Path, server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, times = transfer.send, []

    def changing(*given: Any) -> None:
        if not times:
            write(local_dir, {"README.md": "changed meanwhile"})
        times.append(1)
        real(*given)

    monkeypatch.setattr(transfer, "send", changing)
    code = pushing.push(sync_connection)
    assert (server_dir / "README.md").read_text() == "changed meanwhile" and len(times) == 2
    assert set(code["files"]) == {"src/main.py", "src/model.py", "configs/train.yaml"}


@pytest.mark.parametrize(
    ("program", "reason"),
    [("echo hello; exit 1", ""), ("exec yes hello >&2", "its messages do not end); using SFTP")],
)
def test_a_broken_rsync_is_reported_and_sftp_used(
    sshd: Server,
    sync_connection: Connection,
    local_dir: Path,
    server_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    program: str,
    reason: str,
) -> None:
    write(tmp_path, {"bin/rsync": f"#!/bin/sh\n{program}\n"})
    (tmp_path / "bin/rsync").chmod(0o755)
    with sshd.session(PATH=f"{tmp_path}/bin:{os.environ['PATH']}"):
        pushing.push(sync_connection)
    assert f"rsync failed ({reason}" in printed(capsys) and pushed(server_dir) == own(local_dir)


def test_a_push_over_that_of_another_client_names_it(
    sync_connection: Connection, local_dir: Path, server_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pushing.push(sync_connection)
    assert "last push" not in printed(capsys)
    with pytest.MonkeyPatch.context() as other:
        other.setattr(pushing, "_sender_id", lambda: "another")
        other.setattr(pushing, "_sender_name", lambda: "ann@laptop:/home/ann/\x1b[31massay")
        pushing.push(sync_connection)
        assert "last push" not in printed(capsys)  # nothing is replaced
        write(local_dir, {"README.md": "Ann's"})
        pushing.push(sync_connection)
    assert re.search(
        r"\w+@.*my project made the last push to this folder, on 20.*: 1 file .* is replaced", printed(capsys)
    )
    write(local_dir, {"README.md": "ours again"})
    pushing.push(sync_connection)
    said = printed(capsys)
    assert "ann@laptop:/home/ann/" in said and "\x1b" not in said


def test_a_repeated_push_returns_the_same_report(
    sync_connection: Connection, local_dir: Path, server_dir: Path
) -> None:
    wanted = {"link": {"identity": "-> README.md", "size": 0, "mode": 0o777, "also": False}}
    given = {
        "folder": sync_connection.target.dir,
        "push": {"id": "one", "sender": "me"},
        "wanted": wanted,
        "named": [],
    }
    first = sync_connection.call("apply_push:apply", **given)
    assert first["new"] == ["link"] and sync_connection.call("apply_push:apply", **given)["new"] == ["link"]
    assert sync_connection.call("apply_push:apply", **given | {"push": {"id": "two", "sender": "me"}})["new"] == []


# Refusals


def test_a_folder_below_the_home_is_made_with_its_parents(sshd: Server, local_dir: Path, tmp_path: Path) -> None:
    variables = sshd.client(tmp_path / "person", f"~/{tmp_path.name}/a/b")
    with Connection(RemoteTarget.from_env(variables)) as connection:
        pushing.push(connection)
    assert (sshd.home / tmp_path.name / "a/b/src/main.py").is_file()


def test_a_folder_elsewhere_is_made_only_in_an_existing_one(sshd: Server, local_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    variables = sshd.client(tmp_path / "person", f"{tmp_path}/there/new")
    with Connection(RemoteTarget.from_env(variables)) as connection:
        pushing.push(connection)
    assert (tmp_path / "there/new/src/main.py").is_file()
    variables["REMOTE_DIR"] = f"{tmp_path}/none/new"
    with (
        Connection(RemoteTarget.from_env(variables)) as connection,
        pytest.raises(RemoteError, match="none does not exist on the server"),
    ):
        pushing.push(connection)
    assert not (tmp_path / "none").exists()


def test_a_folder_that_is_a_file_is_refused(
    sync_connection: Connection, local_dir: Path, server_dir: Path
) -> None:
    server_dir.write_text("a file")
    with pytest.raises(RemoteError, match="is a file on the server; REMOTE_DIR should be a folder"):
        pushing.push(sync_connection)


@needs_own_mounts
def test_a_read_only_folder_is_refused(
    sshd: Server, sync_connection: Connection, local_dir: Path, server_dir: Path
) -> None:
    server_dir.mkdir()
    sshd.inside(f"mount -t tmpfs -o ro tmpfs '{server_dir}'")
    try:
        with pytest.raises(RemoteError, match="read-only file system; REMOTE_DIR must be a folder"):
            pushing.push(sync_connection)
    finally:
        sshd.inside(f"umount '{server_dir}'")


@needs_own_mounts
def test_a_full_disk_is_reported_before_anything_is_sent(
    sshd: Server, sync_connection: Connection, local_dir: Path, server_dir: Path, large: Path
) -> None:
    server_dir.mkdir()
    sshd.inside(f"mount -t tmpfs -o size=1m tmpfs '{server_dir}'")
    try:
        with pytest.raises(
            RemoteError, match=r"has .* of free space, but the push needs 3.0 MB; free some space on the server"
        ):
            pushing.push(sync_connection)
    finally:
        sshd.inside(f"umount '{server_dir}'")


@needs_own_mounts
def test_a_disk_that_fills_up_is_reported(
    sshd: Server,
    sync_connection: Connection,
    local_dir: Path,
    server_dir: Path,
    large: Path,
    sync_way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server_dir.mkdir()
    sshd.inside(f"mount -t tmpfs -o size=2m tmpfs '{server_dir}'")
    try:
        monkeypatch.setattr(pushing, "_check_space", lambda *_: None)
        with pytest.raises(RemoteError, match=r"no space is left|server's disk is full"):
            pushing.push(sync_connection)
        assert sshd.inside(f"ls '{server_dir}'").stdout == "outputs\n"
    finally:
        sshd.inside(f"umount '{server_dir}'")


# Concurrent pushes


def test_two_pushes_of_one_folder_take_turns(
    sshd: Server, local_dir: Path, server_dir: Path, tmp_path: Path
) -> None:
    variables = sshd.client(tmp_path / "person", f"~/{server_dir.name}")
    errors: list[BaseException] = []

    def one() -> None:
        try:
            with Connection(RemoteTarget.from_env(variables)) as connection:
                pushing.push(connection)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and pushed(server_dir) == own(local_dir)


# For a command on the server


def test_a_snapshot_holds_the_pushed_code(sync_connection: Connection, local_dir: Path, server_dir: Path) -> None:
    (local_dir / "src/same.py").symlink_to("model.py")
    code = pushing.push(sync_connection)
    snapshot = Path(snapshots.create(str(server_dir), code))
    assert (snapshot / "src/same.py").read_text() == (snapshot / "src/model.py").read_text() == "model\n"
    write(local_dir, {"README.md": "no code"})
    assert pushing.push(sync_connection)["digest"] == code["digest"]
    write(local_dir, {"src/model.py": "better\n"})
    other = pushing.push(sync_connection)
    assert other["digest"] != code["digest"]
    assert (server_dir / "src/model.py").read_text() == "better\n"
    assert (snapshot / "src/model.py").read_text() == "model\n"  # a run in progress keeps its code


def test_a_setting_with_a_local_only_path_is_reported(
    sync_connection: Connection,
    local_dir: Path,
    server_dir: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    write(local_dir, {"models/x/w": "w", "models/y/w": "w", "outputs/runs/1/m": "m", "data/rows.jsonl": "{}"})
    write(server_dir, {"models/y/w": "w"})
    paths = "model_name=models/x,models/y", "dataset_path=[data/rows.jsonl]", "+model_path='outputs/runs/1'"
    words = [
        *paths,
        f"cache={tmp_path}",
        "output_dir=outputs",
        "lr=1",
        "models/x",
        "x=nothing",
        "y=",
        f"z={tmp_path}/no",
    ]
    pushing.push(sync_connection, words=words)
    message = capsys.readouterr().err.splitlines()
    assert message == [
        "models/x is not on the server: git ignores it; ALSO=models/x pushes it",
        "outputs/runs/1 is not on the server: such paths are never pushed",
    ]
    pushing.push(sync_connection, also=["models/x"], words=words)
    assert "models/x" not in capsys.readouterr().err


def test_corrupt_records_of_a_push_lose_nothing(
    sync_connection: Connection, local_dir: Path, server_dir: Path
) -> None:
    pushing.push(sync_connection)
    for name, text in (("pushed", '{"src/main'), ("also", "[1]"), ("push", "")):
        (server_dir / f"outputs/remote/{name}.json").write_text(text)
    write(server_dir, {"src/model.py": "changed there\n"})
    (local_dir / "README.md").unlink()
    pushing.push(sync_connection)
    assert (server_dir / "README.md").exists()  # a push may not have put it there
    assert (server_dir / "src/model.py").read_text() == "model\n"
    (kept,) = (server_dir / "outputs/remote/replaced").glob("*/src/model.py")
    assert kept.read_text() == "changed there\n"
