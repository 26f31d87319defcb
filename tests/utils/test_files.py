"""Files and folders are complete or absent, also after a kill and on a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from src.errors import RunError
from src.utils.files import (
    atomic_dir,
    code_hash,
    read_json,
    sha256,
    switch_link,
    write_json,
    write_jsonl,
    write_text,
)

ROOT = Path(__file__).resolve().parents[2]
SECRET = "correct-horse-battery"
KILLS = 12
SIZE = 3_000_000
FULL = r"could not be written: no space left on the device; the previous version is intact"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# Writing


def test_text_is_written_as_it_is_into_folders_that_it_makes(tmp_path: Path) -> None:
    write_text(tmp_path / "a/b/c.txt", "é\n\r\n\ud800")
    assert (tmp_path / "a/b/c.txt").read_bytes() == b"\xc3\xa9\n\r\n\xed\xa0\x80"
    assert names(tmp_path / "a/b") == ["c.txt"]


def test_json_is_readable_for_people_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    write_json(tmp_path / "x.json", {"b": [1, "é"], "a": f"{SECRET}!", SECRET: None})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert SECRET not in text and "é" in text and text.endswith("}\n")
    assert json.loads(text) == {"b": [1, "é"], "a": "${oc.env:MY_TOKEN}!", "${oc.env:MY_TOKEN}": None}
    assert list(json.loads(text)) == ["b", "a", "${oc.env:MY_TOKEN}"]
    assert names(tmp_path) == ["x.json"]


def test_a_secret_in_a_path_is_no_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    write_json(tmp_path / "x.json", {"path": Path("/mnt") / SECRET})
    assert SECRET not in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_rows_are_one_line_each_and_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    write_jsonl(tmp_path / "x.jsonl", [{"a": "two\nlines"}, {"a": SECRET}])
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["a"] for line in lines] == ["two\nlines", "${oc.env:MY_TOKEN}"]


def test_what_cannot_be_written_leaves_the_file_before_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", 1)
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises((ValueError, RecursionError)):
        write_json(tmp_path / "x.json", circle)
    with pytest.raises(TypeError):
        write_text(tmp_path / "x.json", 3)  # type: ignore[arg-type]
    assert read_json(tmp_path / "x.json") == 1
    assert names(tmp_path) == ["x.json"]


WRITER = """
import sys
from pathlib import Path
from src.utils.files import write_text
path, size = Path(sys.argv[1]), int(sys.argv[2])
write_text(path, "a" * size)
print("ready", flush=True)
while True:
    for letter in "ba":
        write_text(path, letter * size)
"""


def test_a_file_is_a_complete_version_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    path, versions = tmp_path / "x", {"a" * SIZE, "b" * SIZE}
    for attempt in range(KILLS):
        words = [sys.executable, "-c", WRITER, str(path), str(SIZE)]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as writer:
            assert writer.stdout and writer.stdout.readline()
            sizes = {path.stat().st_size for _ in range(random.Random(attempt).randint(1, 20_000))}
            writer.kill()
        assert sizes == {SIZE}
        assert path.read_text() in versions


# Reading


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nope\.json does not exist"):
        read_json(tmp_path / "nope.json")
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(RunError, match=r"torn\.json is not JSON"):
        read_json(tmp_path / "torn.json")


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    content = os.urandom(9_000_001)  # more than two blocks
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


# Folders


def fill(target: Path, text: str) -> None:
    with atomic_dir(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep/file").write_text(text)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "a/model") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a/model").exists()
    assert names(tmp_path / "a") == ["model"]
    assert (tmp_path / "a/model/file").read_text() == "x"


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_weights_have_the_mode_that_the_umask_gives_new_files(tmp_path: Path, umask: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    (tmp_path / "shared.txt").touch(0o600)
    before = os.umask(umask)
    try:
        with atomic_dir(tmp_path / "model") as folder:
            (folder / "part").mkdir()
            save_file({"a": np.zeros(2)}, folder / "part" / "model.safetensors")
            (folder / "link").symlink_to(tmp_path / "shared.txt")
        assert os.umask(umask) == umask  # as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model/part/model.safetensors").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "shared.txt").stat().st_mode) == 0o600


def test_a_folder_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    fill(tmp_path / "model", "one")
    (tmp_path / "model/old").write_text("")
    fill(tmp_path / "model", "two")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["deep"]
    assert (tmp_path / "model/deep/file").read_text() == "two"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_the_one_before_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    fill(tmp_path / "model", "one")
    with pytest.raises(error), atomic_dir(tmp_path / "model") as folder:
        (folder / "half").write_text("x")
        raise error
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model/deep/file").read_text() == "one"


# Links

SWITCHER = """
import sys
from pathlib import Path
from src.utils.files import switch_link
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(600):
    switch_link(folder / "latest", folder / "ab"[number % 2])
"""


def test_a_link_that_is_switched_is_never_missing(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    switch_link(tmp_path / "latest", tmp_path / "a")
    seen = set()
    with subprocess.Popen(
        [sys.executable, "-c", SWITCHER, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as switcher:
        assert switcher.stdin and switcher.stdout
        switcher.stdout.readline()
        switcher.stdin.write(b"go\n")
        switcher.stdin.flush()
        while switcher.poll() is None:
            seen.add(os.readlink(tmp_path / "latest"))
    assert switcher.returncode == 0
    assert seen == {"a", "b"}
    assert names(tmp_path) == ["a", "b", "latest"]


# Disks that take nothing more

Mount = Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Mount]]:
    """A disk of one megabyte, and a way to mount it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"NOT TESTED: a full disk needs the right to mount one ({done.stderr.strip()})")

    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("NOT TESTED: a full disk needs Linux and root")
    mount("size=1m")
    yield folder, mount
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_file_before(disk: tuple[Path, Mount]) -> None:
    folder, _ = disk
    write_text(folder / "x", "one")
    with pytest.raises(RunError, match=FULL):
        write_text(folder / "x", "two" * 1_000_000)
    assert (folder / "x").read_text() == "one"
    assert names(folder) == ["x"]
    write_text(folder / "x", "three")
    assert (folder / "x").read_text() == "three"


def test_a_full_disk_leaves_the_folder_before(disk: tuple[Path, Mount]) -> None:
    folder, _ = disk
    fill(folder / "model", "one")
    with pytest.raises(RunError, match=FULL):
        fill(folder / "model", "two" * 1_000_000)
    assert names(folder) == ["model"]
    assert (folder / "model/deep/file").read_text() == "one"


def test_a_full_disk_error_of_a_library_gives_the_same_message(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=FULL), atomic_dir(tmp_path / "model"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert names(tmp_path) == []


def test_a_folder_in_the_place_of_a_file_or_a_pointer_is_one_sentence(tmp_path: Path) -> None:
    latest, run = tmp_path / "latest", tmp_path / "run"
    latest.mkdir()
    fill(run, "one")
    for write in (lambda: write_text(latest, "x"), lambda: switch_link(latest, run)):
        with pytest.raises(RunError, match="latest could not be written: is a directory"):
            write()
    assert names(tmp_path) == ["latest", "run"]
    assert (run / "deep/file").read_text() == "one"


def test_a_file_in_place_of_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"x could not be written: not a directory; make .*file a folder"):
        write_text(tmp_path / "file" / "x", "one")


def test_a_disk_that_is_mounted_read_only_is_one_sentence(disk: tuple[Path, Mount]) -> None:
    folder, mount = disk
    write_text(folder / "x", "one")
    mount("remount,ro")
    with pytest.raises(RunError, match="x could not be written"):
        write_text(folder / "x", "two")
    assert (folder / "x").read_text() == "one"


OF_SOMEBODY_ELSE = """
import os, sys
from pathlib import Path
from src import outcome
from src.errors import RunError
from src.utils.files import write_text, atomic_dir
if os.geteuid() == 0:  # root may write everywhere
    os.setuid(65534)
def fill():
    with atomic_dir(Path(sys.argv[1]) / "model"):
        pass
for folders in {}, {"artifacts_dir": "/", "output_dir": sys.argv[1]}:
    outcome.report(folders=folders)
    for write in (lambda: write_text(Path(sys.argv[1]) / "x", "one"), fill):
        try:
            write()
        except RunError as error:
            print(error)
"""


@pytest.mark.parametrize(
    "mode",
    [
        0o555,
        0o000,
    ],
)
def test_a_folder_of_another_user_is_one_message(mode: int) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", OF_SOMEBODY_ELSE, name], cwd=ROOT, capture_output=True, text=True
        )
        folder.chmod(0o700)
    said = "could not be written: permission denied"
    hints = f"make {folder} a folder that this user may write to", "choose another output_dir"
    assert done.stdout.splitlines() == [
        f"{folder / name} {said}; {hint}" for hint in hints for name in ("x", "model")
    ]
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", ["content", "name", "subfolder", "new file"])
def test_the_hash_of_code_changes_with_every_file_below_the_package(tmp_path: Path, change: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "sub/b.py").write_text("y = 1")
    before = code_hash.__wrapped__(tmp_path)
    if change == "content":
        (tmp_path / "a.py").write_text("x = 2")
    elif change == "name":
        (tmp_path / "a.py").rename(tmp_path / "c.py")
    elif change == "subfolder":
        (tmp_path / "sub/b.py").write_text("y = 2")
    else:
        (tmp_path / "sub/c.py").write_text("")
    assert code_hash.__wrapped__(tmp_path) != before
