"""`make clean` removes caches at once, and runs only after confirmation."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEPT = ["configs/train.yaml", "models/m/model.safetensors", "artifacts/models/x/config.json", "data/__pycache__/x"]
CACHES = [
    ".pytest_cache/x",
    ".ruff_cache/x",
    ".mypy_cache/x",
    ".cache/x",
    "site/x",
    "src/__pycache__/x",
    "tests/a/b/__pycache__/x",
]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with caches, two runs and files that must stay."""
    runs = [f"outputs/runs/{run}/{file}" for run in ("one", "two") for file in ("manifest.json", "model/weights")]
    for name in [*KEPT, *CACHES, *runs, "outputs/runs/torn/x"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1_000_000 if path.name == "weights" else b"")
    (tmp_path / "outputs/runs/latest").symlink_to("two")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/clean.py", tmp_path / "scripts")
    return tmp_path


def clean(repository: Path, *words: str, typed: str | None = None) -> str:
    """Run it, with a person at the terminal who types `typed`, or with none."""
    command = [sys.executable, str(repository / "scripts/clean.py"), *words]
    if typed is None:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    else:
        master, slave = os.openpty()
        os.write(master, f"{typed}\n".encode())
        done = subprocess.run(command, stdin=slave, capture_output=True, text=True)
        os.close(slave)
        os.close(master)
    assert done.returncode == 0, done.stderr
    return done.stdout


def there(repository: Path, names: list[str]) -> list[str]:
    return [name for name in names if (repository / name).exists()]


def test_caches_go_at_once_and_nothing_else(repository: Path) -> None:
    said = clean(repository)
    assert there(repository, CACHES) == []
    assert there(repository, KEPT) == KEPT
    assert (repository / "outputs/runs/one/model/weights").exists()
    assert "removed caches" in said
    assert "kept outputs/ (2 runs, 2 MB); make clean YES=1 removes it" in said


@pytest.mark.parametrize("answer", ["y", "yes", " Y "])
def test_runs_are_removed_after_confirmation(repository: Path, answer: str) -> None:
    said = clean(repository, typed=answer)
    assert "remove outputs/ (2 runs, 2 MB)? [y/N] " in said and "removed outputs/" in said
    assert not (repository / "outputs").exists()
    assert there(repository, KEPT) == KEPT


@pytest.mark.parametrize("answer", ["", "n", "no", "yesterday"])
def test_runs_stay_without_confirmation(repository: Path, answer: str) -> None:
    assert "kept outputs/" in clean(repository, typed=answer)
    assert (repository / "outputs/runs/two/model/weights").exists()


def test_runs_are_removed_without_a_question_with_yes(repository: Path) -> None:
    assert "removed outputs/ (2 runs, 2 MB)" in clean(repository, "--yes")
    assert not (repository / "outputs").exists()
    assert there(repository, KEPT) == KEPT


@pytest.mark.parametrize(
    "place", ["outputs", "outputs/a/b", "outputs/runs/two", "outputs/remote/code/1/src", "outputs/remote"]
)
def test_what_is_in_use_stays(repository: Path, place: str) -> None:
    """The folder that a stage uses, the run that it trains, the snapshot of a job on a server, a push."""
    (repository / place).mkdir(parents=True, exist_ok=True)
    program = {
        "outputs": "from src.utils.usage_lock import hold; hold('outputs')",
        "outputs/a/b": "from src.utils.usage_lock import hold; hold('outputs/a/b')",
        "outputs/runs/two": "from src.runs import Run; assert Run(Path('outputs/runs/two')).lock()",
        "outputs/remote/code/1/src": "Path('outputs/remote/code/1/src/code.json').touch();"
        "from src.remote.agent.snapshots import lock; lock('outputs/remote/code/1')",
        "outputs/remote": "from src.remote import push; lock = push._push_lock(); lock.__enter__()",
    }[place]
    held = f"from pathlib import Path; {program}; print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", held], cwd=repository, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as user:  # fmt: skip
        assert user.stdin and user.stdout
        user.stdout.readline()
        done = subprocess.run(
            [sys.executable, str(repository / "scripts/clean.py"), "--yes"], capture_output=True, text=True
        )
        user.stdin.close()
    assert done.returncode == 2
    named = "run two" if place.endswith("two") else f"process {user.pid}"
    assert f"kept outputs/, which is in use: {named}" in done.stderr
    assert there(repository, ["outputs/runs/one/model/weights", ".cache/x", ".mypy_cache/x"]) == [
        "outputs/runs/one/model/weights", ".cache/x"
    ]  # fmt: skip
    assert "removed outputs/" in clean(repository, "--yes")


def test_what_is_used_since_the_question_stays(repository: Path) -> None:
    master, slave = os.openpty()
    with subprocess.Popen(
        [sys.executable, str(repository / "scripts/clean.py")],
        stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as cleaning:  # fmt: skip
        assert cleaning.stdout and cleaning.stderr
        said = ""
        while not said.endswith("[y/N] "):
            said += cleaning.stdout.read(1)
        handle = os.open(repository / "outputs", os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_SH)
        os.write(master, b"y\n")
        assert "kept outputs/, which is in use: process" in cleaning.stderr.read()
    os.close(handle)
    os.close(slave)
    os.close(master)
    assert cleaning.returncode == 2
    assert (repository / "outputs/runs/two/model/weights").exists()


def test_a_clean_repository_is_no_error(repository: Path) -> None:
    clean(repository, "--yes")
    assert clean(repository, "--yes") == "removed caches\n"


def test_runs_behind_a_link_to_a_larger_disk_go_too(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    large = tmp_path_factory.mktemp("large") / "outputs"
    shutil.move(repository / "outputs", large)
    (repository / "outputs").symlink_to(large)
    assert "removed outputs/ (2 runs, 2 MB)" in clean(repository, "--yes")
    assert not (large / "runs/one").exists()


@pytest.mark.parametrize("words", [[], ["YES="]])
def test_make_asks(repository: Path, words: list[str]) -> None:
    make(repository, *words)
    assert (repository / "outputs/runs/one").exists()


def test_make_does_not_ask_with_yes(repository: Path) -> None:
    make(repository, "YES=1")
    assert not (repository / "outputs").exists()


def make(repository: Path, *words: str) -> None:
    """Run `make clean` with the files that it needs."""
    shutil.copytree(ROOT / "configs", repository / "configs", dirs_exist_ok=True)
    for name in ("Makefile", *(f"scripts/{n}.py" for n in ("target", "make_words")),
                 *(f"src/{n}.py" for n in ("__init__", "stages", "schema", "utils/commands"))):  # fmt: skip
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repository / name)
    subprocess.run(
        ["make", "clean", f"PYTHON={sys.executable}", *words],
        cwd=repository,
        env={"PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
