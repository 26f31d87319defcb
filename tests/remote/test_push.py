"""A push: what is taken, what the server has afterwards, and what it never loses. Project and server are real."""

from __future__ import annotations

import hashlib
import os
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
from src.remote.connection import Connection
from src.remote.target import RemoteTarget
from tests.fixtures import tree
from tests.remote.client import GIT
from tests.remote.proxy import Proxy
from tests.remote.server import Server, needs_own_mounts, needs_ssh
from tests.remote.sync import environment_of

pytest_plugins = ["tests.remote.server", "tests.remote.sync"]
pytestmark = needs_ssh

HOUSE = {
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
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project, in which the test is."""
    project = tmp_path / "my project"
    write(project, HOUSE | {".gitignore": IGNORED})
    monkeypatch.chdir(project)
    git("init", "-q")
    return project


@pytest.fixture
def there(sshd: Server, tmp_path: Path) -> Path:
    """REMOTE_DIR, not made yet."""
    return sshd.home / f"{tmp_path.name} ünd more"


def pushed(there: Path) -> dict[str, bytes]:
    """What is on the server, besides its own records."""
    return {path: data for path, data in tree(there).items() if not path.startswith("outputs/")}


def own(project: Path) -> dict[str, bytes]:
    return {p: d for p, d in tree(project).items() if not p.startswith((".git/", "outputs/", "models/"))}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def left_over(there: Path) -> list[str]:
    return [path for path in tree(there) if "incoming" in path or path.endswith(".tmp")]


# What is taken


def test_the_server_has_what_git_would_take(
    sync_connection: Connection, here: Path, there: Path, sync_way: str
) -> None:
    write(here, {"models/big.bin": "x", "src/__pycache__/a.pyc": "x", "outputs/runs/1/manifest.json": "{}"})
    write(here, {"new and untracked.txt": "new"})
    pushing.push(sync_connection)
    assert pushed(there) == {
        name: text.encode()
        for name, text in {**HOUSE, ".gitignore": IGNORED, "new and untracked.txt": "new"}.items()
    }
    assert left_over(there) == []


def test_secrets_outputs_and_environments_stay_here_even_where_git_has_them(
    sync_connection: Connection, here: Path, there: Path
) -> None:
    secret = {name: "TOKEN=1" for name in (".env", ".env.local", "sub/.env", "sub/.env.prod/x")}
    places = {name: "x" for name in ("outputs/a", "artifacts/models/m", ".venv/lib/x", ".cache/x")}
    venv = {"env two/pyvenv.cfg": "", "env two/lib/python/x.py": "x"}
    write(here, {**secret, **places, **venv, ".env.example": "TOKEN=", "sub/outputs/kept": "k"})
    git("add", "--force", ".")
    pushing.push(sync_connection)
    assert set(pushed(there)) == {*HOUSE, ".gitignore", ".env.example", "sub/outputs/kept"}


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


def test_names_arrive_as_they_are(sync_connection: Connection, here: Path, there: Path, sync_way: str) -> None:
    write(here, {name: name for name in NAMES} | {f"src/{name}/{name}": "deep" for name in NAMES})
    (here / os.fsdecode(b"latin-\xe9")).write_text("bytes")
    pushing.push(sync_connection)
    assert pushed(there) == own(here)


def test_names_arrive_as_they_are_whatever_the_locale(
    sshd: Server, sync_connection: Connection, here: Path, there: Path
) -> None:
    with sshd.session(LC_ALL="C", LANG="de_DE.ISO-8859-1", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"):
        write(here, {"ünïcödé 漢字.txt": "x"})
        pushing.push(sync_connection)
    assert (there / "ünïcödé 漢字.txt").read_text() == "x"


def test_what_is_executable_stays_so_and_what_is_private(
    sync_connection: Connection, here: Path, there: Path, sync_way: str
) -> None:
    write(here, {"run.sh": "#!/bin/sh\n", "private.txt": "p"})
    (here / "run.sh").chmod(0o755)
    (here / "private.txt").chmod(0o600)
    pushing.push(sync_connection)
    assert os.access(there / "run.sh", os.X_OK) and not os.access(there / "README.md", os.X_OK)
    assert (there / "private.txt").stat().st_mode & 0o777 == 0o600
    (here / "run.sh").chmod(0o644)
    (here / "README.md").chmod(0o755)
    pushing.push(sync_connection)
    assert not (there / "run.sh").stat().st_mode & 0o111 and os.access(there / "README.md", os.X_OK)


def test_links_that_stay_inside_are_links_there_and_others_are_told(
    sync_connection: Connection, here: Path, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, target in (("inside", "README.md"), ("src/up", "../configs"), ("broken", "nowhere")):
        (here / name).symlink_to(target)
    write(here, {"outputs/x": "x", ".env": "TOKEN=1"})
    for name, target in (("away", "../.."), ("abs", "/etc/passwd"), ("out", "outputs/x"), ("env", ".env")):
        (here / name).symlink_to(target)
    pushing.push(sync_connection)
    found = said(capsys)
    assert os.readlink(there / "inside") == "README.md" and os.readlink(there / "src/up") == "../configs"
    assert os.readlink(there / "broken") == "nowhere"
    for name in ("away", "abs", "out", "env"):
        assert not os.path.lexists(there / name) and f"{name} is a link to" in found
    (here / "inside").unlink()
    (here / "inside").symlink_to("src")
    pushing.push(sync_connection)
    assert os.readlink(there / "inside") == "src" and "replaced" not in said(capsys)


def test_a_repository_inside_is_told(
    sync_connection: Connection, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here, {"other/x": "x"})
    subprocess.run([*GIT, "init", "-q"], cwd=here / "other", check=True)
    pushing.push(sync_connection)
    assert "other is a separate git repository: it is not pushed; ALSO=other sends it" in said(capsys)


def test_a_folder_that_is_no_project_is_refused(
    sync_connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RemoteError, match=r"has no src/main.py"):
        pushing.push(sync_connection)


def test_a_project_that_git_ignores_is_refused(sync_connection: Connection, here: Path) -> None:
    write(here, {".gitignore": "/src/\n"})
    with pytest.raises(RemoteError, match=r"git ignores src/main.py"):
        pushing.push(sync_connection)


def test_a_folder_without_a_git_repository_is_refused_until_git_init(
    sync_connection: Connection, here: Path, there: Path
) -> None:
    shutil.rmtree(here / ".git")
    with pytest.raises(RemoteError) as error:
        pushing.push(sync_connection)
    assert error.value.exit_code == 2
    assert str(error.value) == (
        f"{here} is not a git checkout, and a push sends the files that git tracks or would add; "
        "run git init in it; no commit is needed"
    )
    assert not there.exists()
    git("init", "-q")
    pushing.push(sync_connection)
    assert pushed(there) == own(here)


def test_without_git_a_push_is_refused(
    sync_connection: Connection, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RemoteError, match=r"git is not installed, and a push .*; install git$") as error:
        pushing.push(sync_connection)
    assert error.value.exit_code == 2 and not there.exists()


def test_what_git_reports_of_a_damaged_repository_is_shown(sync_connection: Connection, here: Path) -> None:
    (here / ".git/config").write_text("[core\n")
    with pytest.raises(RemoteError, match=r"git does not list the files of .*bad config line 1"):
        pushing.push(sync_connection)


# What is sent besides


def test_what_is_asked_for_besides_is_sent_and_never_taken_away(
    sync_connection: Connection, here: Path, there: Path, sync_way: str, tmp_path: Path
) -> None:
    write(here, {"models/m/config.json": "{}", "models/other": "x", "models/m/.env": "TOKEN=1"})
    write(tmp_path / "cache", {"blob": "weights"})
    (here / "models/m/weights").symlink_to(tmp_path / "cache/blob")
    pushing.push(sync_connection, also=["models/m"])
    assert (there / "models/m/weights").read_text() == "weights" and not (there / "models/m/weights").is_symlink()
    assert sorted(p.name for p in (there / "models").rglob("*")) == ["config.json", "m", "weights"]
    shutil.rmtree(here / "models")
    pushing.push(sync_connection)
    assert (there / "models/m/config.json").read_text() == "{}"


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
def test_some_things_are_not_sent_even_when_asked_for(
    sync_connection: Connection, here: Path, path: str, reason: str
) -> None:
    write(here, {".env": "", "outputs/runs/1/x": "", "env/pyvenv.cfg": ""})
    with pytest.raises(RemoteError, match=f"ALSO={path} {reason}"):
        pushing.push(sync_connection, also=[path])


def test_a_large_file_is_looked_at_once_while_its_times_stay(
    sync_connection: Connection, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here, {"models/w": "weights"})
    os.utime(here / "models/w", (1, 1))
    monkeypatch.setattr(pushing, "RECENT_NS", 0)
    pushing.push(sync_connection, also=["models/w"])
    looked: list[str] = []
    real = pushing.sha256
    monkeypatch.setattr(pushing, "sha256", lambda path: (looked.append(str(path)), real(path))[1])
    pushing.push(sync_connection, also=["models/w"])
    assert "models/w" not in looked and "src/main.py" in looked
    (here / "models/w").write_text("WEIGHTS")
    os.utime(here / "models/w", (1, 1))  # as long as before, of the same time
    pushing.push(sync_connection, also=["models/w"])
    assert (there / "models/w").read_text() == "WEIGHTS"


# What the server had


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
    here: Path,
    there: Path,
    sync_way: str,
    capsys: pytest.CaptureFixture[str],
    sent: list[str],
) -> None:
    where = f"{sync_connection.target}:{sync_connection.target.dir}"
    pushing.push(sync_connection)
    assert f"pushed to {where}: 5 new (" in said(capsys)
    sent.clear()
    pushing.push(sync_connection)
    assert said(capsys) == f"nothing to push: {where} is up to date\n" and sent == []
    write(here, {"src/model.py": "better\n", "src/new.py": "new\n"})
    (here / "README.md").unlink()
    pushing.push(sync_connection)
    assert sorted(sent) == ["src/model.py", "src/new.py"]
    text = said(capsys)
    assert "1 changed, 1 new, 1 removed (11 bytes)" in text
    assert "  changed  src/model.py\n  new      src/new.py\n  removed  README.md\n" in text
    assert pushed(there) == own(here)


def test_of_many_names_the_first_are_shown(
    sync_connection: Connection, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here, {f"data/{n}": str(n) for n in range(30)})
    pushing.push(sync_connection)
    lines = said(capsys).splitlines()
    assert len(lines) == 22 and lines[-1] == "  and 15 more"


def test_only_what_a_push_has_put_there_is_removed(
    sync_connection: Connection, here: Path, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here, {"gone/a.txt": "a", "gone/deep/b.txt": "b", "edited.txt": "e", "stays/c.txt": "c"})
    pushing.push(sync_connection)
    write(there, {"stays/mine.txt": "mine", "notes.txt": "notes", "outputs/runs/1/manifest.json": "{}"})
    write(there, {"edited.txt": "edited there"})
    shutil.rmtree(here / "gone")
    shutil.rmtree(here / "stays")
    (here / "edited.txt").unlink()
    capsys.readouterr()
    pushing.push(sync_connection)
    assert "edited.txt was deleted here and changed on the server: it is kept there" in said(capsys)
    mine = {"stays/mine.txt": b"mine", "notes.txt": b"notes", "edited.txt": b"edited there"}
    assert pushed(there) == own(here) | mine
    assert not (there / "gone").exists()
    assert (there / "outputs/runs/1/manifest.json").exists()
    pushing.push(sync_connection)
    assert "edited.txt" not in said(capsys) and (there / "edited.txt").exists()


def test_what_was_changed_on_the_server_is_kept_beside(
    sync_connection: Connection, here: Path, there: Path, sync_way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(there, {"README.md": "by hand, before any push"})
    pushing.push(sync_connection)
    write(there, {"src/model.py": "edited there"})
    pushing.push(sync_connection)
    text = said(capsys)
    assert text.count("changed on the server and replaced") == 2
    kept = sorted((there / "outputs/remote/replaced").glob("*/**/*.*"))
    assert sorted(p.read_text() for p in kept if p.is_file()) == ["by hand, before any push", "edited there"]
    assert pushed(there) == own(here)


def test_a_file_becomes_a_folder_and_a_folder_a_file(
    sync_connection: Connection, here: Path, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here, {"one": "file", "two/x": "x"})
    pushing.push(sync_connection)
    write(there, {"two/mine": "mine"})
    (here / "one").unlink()
    shutil.rmtree(here / "two")
    write(here, {"one/x": "x", "two": "file"})
    pushing.push(sync_connection)
    assert pushed(there) == own(here)
    (kept,) = (there / "outputs/remote/replaced").glob("*/two/mine")
    assert kept.read_text() == "mine"
    assert "replaced: two;" in said(capsys)


def test_what_was_a_link_to_a_folder_may_become_one(sync_connection: Connection, here: Path, there: Path) -> None:
    (here / "data").symlink_to("configs")
    pushing.push(sync_connection)
    (here / "data").unlink()
    write(here, {"data/train.yaml": "rows"})
    pushing.push(sync_connection)
    assert (there / "configs/train.yaml").read_text() == "lr: 1\n" and (
        there / "data/train.yaml"
    ).read_text() == "rows"


def test_a_push_never_writes_where_it_may_not_whatever_it_is_told(sync_connection: Connection, here: Path) -> None:
    for path in ("../up", "/tmp/abs", "outputs/runs/x", ".env", ".venv/bin/python", "a/../../b"):
        wanted = {path: {"identity": "0" * 64, "size": 0, "mode": 0o644, "also": False}}
        with pytest.raises(RemoteError, match="no push may write to "):
            sync_connection.call(
                "apply_push:apply",
                folder=sync_connection.target.dir,
                push={"id": "x", "sender": "y"},
                wanted=wanted,
                named=[],
            )


# On the way


@pytest.fixture
def large(here: Path) -> Path:
    """A file that does not arrive in one piece."""
    (here / "large.bin").write_bytes(os.urandom(3_000_000))
    return here / "large.bin"


def test_a_push_that_is_cut_again_and_again_goes_on_where_it_was(
    bad_connection: tuple[Connection, Proxy], here: Path, there: Path, large: Path, sync_way: str
) -> None:
    connection, between = bad_connection
    between.delay, between.room = 0.001, 1_200_000  # no connection carries the whole file
    pushing.push(connection)
    assert pushed(there) == own(here) and left_over(there) == []
    assert between.count < 15


def test_a_push_that_was_killed_has_changed_nothing_and_the_next_goes_on_with_it(
    bad_connection: tuple[Connection, Proxy],
    here: Path,
    there: Path,
    large: Path,
    sync_way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection, between = bad_connection
    pushing.push(connection)
    before = pushed(there)
    large.write_bytes(os.urandom(3_000_000))
    write(here, {"README.md": "new", "src/more.py": "more"})
    between.delay = 0.01
    other = subprocess.Popen(
        [sys.executable, "-m", "src.main", "push"],
        env=environment_of(connection),
        start_new_session=True,
    )
    incoming = there / "outputs/remote/incoming"
    until(lambda: sum(p.stat().st_size for p in incoming.rglob("*") if p.is_file()) > 500_000)
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    assert pushed(there) == before
    between.delay = 0
    sizes: list[int] = []
    real = transfer.send
    monkeypatch.setattr(transfer, "send", lambda *given: (sizes.append(given[-1]), real(*given)))
    pushing.push(connection)
    assert pushed(there) == own(here) and left_over(there) == []
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


def wrapper(folder: Path, there: Path, once: bool) -> str:
    """A PATH with an rsync that damages what it has received, `once` or each time."""
    flag = folder / "damaged"
    text = WRAPPER.format(
        rsync=shutil.which("rsync"),
        folder=shlex.quote(str(there)),
        flag=shlex.quote(str(flag)),
        once=f"touch {shlex.quote(str(flag))}" if once else "",
    )
    (folder / "bin").mkdir()
    (folder / "bin/rsync").write_text(text)
    (folder / "bin/rsync").chmod(0o755)
    return f"{folder}/bin:{os.environ['PATH']}"


def test_what_is_damaged_on_its_way_is_sent_again(
    sshd: Server, sync_connection: Connection, here: Path, there: Path, large: Path, tmp_path: Path
) -> None:
    with sshd.session(PATH=wrapper(tmp_path, there, once=True)):
        pushing.push(sync_connection)
    assert (tmp_path / "damaged").exists()
    assert pushed(there) == own(here)


def test_what_is_there_in_part_is_not_sent_again_and_not_trusted(
    sync_connection: Connection, here: Path, there: Path, large: Path, sync_way: str, sent: list[str]
) -> None:
    incoming = there / "outputs/remote/incoming" / pushing._sender_id()
    incoming.mkdir(parents=True)
    (incoming / hashlib.sha256(large.read_bytes()).hexdigest()).write_bytes(os.urandom(1_000_000))
    pushing.push(sync_connection)
    assert pushed(there) == own(here)
    assert sent.count("large.bin") == 2  # the rest of it, and then all of it


def test_what_arrives_damaged_each_time_takes_no_place(
    sshd: Server, sync_connection: Connection, here: Path, there: Path, tmp_path: Path
) -> None:
    pushing.push(sync_connection)
    before = pushed(there)
    write(here, {"README.md": "new", "src/more.py": "more"})
    sync_connection.close()
    with (
        sshd.session(PATH=wrapper(tmp_path, there, once=False)),
        pytest.raises(RemoteError, match=r"README.md, src/more.py: what arrives is not what was sent, 3 times"),
    ):
        pushing.push(sync_connection)
    assert pushed(there) == before


def test_a_file_that_changes_while_it_is_sent_arrives_as_it_is_then(
    sync_connection: Connection, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, times = transfer.send, []

    def changing(*given: Any) -> None:
        if not times:
            write(here, {"README.md": "changed meanwhile"})
        times.append(1)
        real(*given)

    monkeypatch.setattr(transfer, "send", changing)
    code = pushing.push(sync_connection)
    assert (there / "README.md").read_text() == "changed meanwhile" and len(times) == 2
    assert set(code["files"]) == {"src/main.py", "src/model.py", "configs/train.yaml"}


def test_an_rsync_that_does_not_work_is_told_and_done_without(
    sshd: Server,
    sync_connection: Connection,
    here: Path,
    there: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path, {"bin/rsync": "#!/bin/sh\necho hello\nexit 1\n"})
    (tmp_path / "bin/rsync").chmod(0o755)
    with sshd.session(PATH=f"{tmp_path}/bin:{os.environ['PATH']}"):
        pushing.push(sync_connection)
    assert "rsync does not work (" in said(capsys) and pushed(there) == own(here)


def test_an_answer_that_was_lost_is_asked_for_again(sync_connection: Connection, here: Path, there: Path) -> None:
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


def test_a_folder_below_the_home_is_made_with_all_above_it(sshd: Server, here: Path, tmp_path: Path) -> None:
    variables = sshd.client(tmp_path / "person", f"~/{tmp_path.name}/a/b")
    with Connection(RemoteTarget.from_env(variables)) as connection:
        pushing.push(connection)
    assert (sshd.home / tmp_path.name / "a/b/src/main.py").is_file()


def test_a_folder_elsewhere_is_made_only_in_one_that_is_there(sshd: Server, here: Path, tmp_path: Path) -> None:
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


def test_a_folder_that_is_a_file_is_refused(sync_connection: Connection, here: Path, there: Path) -> None:
    there.write_text("a file")
    with pytest.raises(RemoteError, match="is a file on the server; REMOTE_DIR should be a folder"):
        pushing.push(sync_connection)


@needs_own_mounts
def test_a_folder_that_nobody_may_write_to_is_refused(
    sshd: Server, sync_connection: Connection, here: Path, there: Path
) -> None:
    there.mkdir()
    sshd.inside(f"mount -t tmpfs -o ro tmpfs '{there}'")
    try:
        with pytest.raises(RemoteError, match="read-only file system; REMOTE_DIR must be a folder"):
            pushing.push(sync_connection)
    finally:
        sshd.inside(f"umount '{there}'")


@needs_own_mounts
def test_a_full_disk_is_told_before_anything_is_sent(
    sshd: Server, sync_connection: Connection, here: Path, there: Path, large: Path
) -> None:
    there.mkdir()
    sshd.inside(f"mount -t tmpfs -o size=1m tmpfs '{there}'")
    try:
        with pytest.raises(RemoteError, match=r"has .* left, and 3.0 MB are to be sent; free some space there"):
            pushing.push(sync_connection)
    finally:
        sshd.inside(f"umount '{there}'")


@needs_own_mounts
def test_a_disk_that_is_full_in_the_middle_is_told(
    sshd: Server,
    sync_connection: Connection,
    here: Path,
    there: Path,
    large: Path,
    sync_way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there.mkdir()
    sshd.inside(f"mount -t tmpfs -o size=2m tmpfs '{there}'")
    try:
        monkeypatch.setattr(pushing, "_check_space", lambda *_: None)
        with pytest.raises(RemoteError, match=r"no space is left|is its disk full"):
            pushing.push(sync_connection)
        assert sshd.inside(f"ls '{there}'").stdout == "outputs\n"
    finally:
        sshd.inside(f"umount '{there}'")


# At once


def test_two_pushes_of_one_folder_take_turns(sshd: Server, here: Path, there: Path, tmp_path: Path) -> None:
    variables = sshd.client(tmp_path / "person", f"~/{there.name}")
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
    assert errors == [] and pushed(there) == own(here)


# For a command that runs there


def test_a_run_is_made_of_the_code_that_was_pushed(sync_connection: Connection, here: Path, there: Path) -> None:
    (here / "src/same.py").symlink_to("model.py")
    code = pushing.push(sync_connection)
    snapshot = Path(sync_connection.call("snapshots:create", folder=sync_connection.target.dir, code=code))
    assert (snapshot / "src/same.py").read_text() == (snapshot / "src/model.py").read_text() == "model\n"
    write(here, {"README.md": "no code"})
    assert pushing.push(sync_connection)["digest"] == code["digest"]
    write(here, {"src/model.py": "better\n"})
    other = pushing.push(sync_connection)
    assert other["digest"] != code["digest"]
    assert (there / "src/model.py").read_text() == "better\n"
    assert (snapshot / "src/model.py").read_text() == "model\n"  # a run that is under way keeps its own


def test_a_setting_that_names_what_is_only_here_is_told(
    sync_connection: Connection, here: Path, there: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write(here, {"models/x/w": "w", "models/y/w": "w", "outputs/runs/1/m": "m", "data/rows.jsonl": "{}"})
    write(there, {"models/y/w": "w"})
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
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "models/x is not on the server: git ignores it; ALSO=models/x sends it",
        "outputs/runs/1 is not on the server: it is never pushed",
    ]
    pushing.push(sync_connection, also=["models/x"], words=words)
    assert "models/x" not in capsys.readouterr().err


def test_damaged_records_of_a_push_lose_nothing(sync_connection: Connection, here: Path, there: Path) -> None:
    pushing.push(sync_connection)
    for name, text in (("pushed", '{"src/main'), ("also", "[1]"), ("push", "")):
        (there / f"outputs/remote/{name}.json").write_text(text)
    write(there, {"src/model.py": "changed there\n"})
    (here / "README.md").unlink()
    pushing.push(sync_connection)
    assert (there / "README.md").exists()  # it may be somebody's
    assert (there / "src/model.py").read_text() == "model\n"
    (kept,) = (there / "outputs/remote/replaced").glob("*/src/model.py")
    assert kept.read_text() == "changed there\n"
