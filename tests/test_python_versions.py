"""Python 3.10 to 3.13: the code needs nothing newer, the pins can be installed; an older Python is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures import ROOT

SUPPORTED = ("3.10", "3.13")  # the oldest and the newest whose pins are tried; those between have wheels for both
CODE = ("assay", "src", "scripts")
PLACES = (*os.environ["PATH"].split(":"), *map(str, Path.home().glob(".pyenv/versions/*/bin")))
TIMEOUT_S = 240


def interpreters() -> dict[tuple[int, int], Path]:
    """The other versions of Python 3 on this machine."""
    found = {}
    for minor in range(8, 20):
        paths = [Path(place) / f"python3.{minor}" for place in PLACES]
        for path in (p for p in paths if p.is_file() and (3, minor) != sys.version_info[:2]):
            if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:  # not a shim without one
                found.setdefault((3, minor), path)
    return found


OTHERS = interpreters()
NO_OLDER = "NO OLDER PYTHON ON THIS MACHINE: its refusal is NOT tested"
NONE = "NO OTHER PYTHON ON THIS MACHINE: the command line is NOT started in one"


def run(python: Path, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([python, *words], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not [v for v in OTHERS if v >= (3, 10)], reason=NONE)
def test_another_python_compiles_the_code_and_says_which_library_it_lacks() -> None:
    script = "import sys\nfor name in sys.argv[1:]: compile(open(name, encoding='utf-8').read(), name, 'exec')"
    files = [str(path) for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    for python in (path for version, path in OTHERS.items() if version >= (3, 10)):
        done = run(python, "-W", "ignore", "-c", script, *files)
        assert done.returncode == 0, done.stderr
        done = run(python, "-m", "src.main", "--help")
        assert done.returncode == 0 and "usage: python -m src.main" in done.stdout, done.stderr
        done = run(python, "-S", "-m", "src.main", "train")
        assert f"is not installed for {python}" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(not [v for v in OTHERS if v < (3, 10)], reason=NO_OLDER)
def test_an_older_python_is_refused_in_one_sentence() -> None:
    for version, python in OTHERS.items():
        if version >= (3, 10):
            continue
        named = f"{python} is Python 3.{version[1]}"
        done = run(python, "-m", "src.main", "train")
        assert (done.returncode, done.stderr) == (2, f"{named}; Assay needs 3.10 or newer\n")
        done = run(python, "scripts/target.py", "train", "train", str(python))
        assert done.returncode == 2 and done.stderr.startswith(f"{named}, and Assay needs 3.10"), done.stderr


def test_the_code_needs_no_newer_python() -> None:
    pytest.importorskip("vermin", reason="VERMIN IS NOT INSTALLED: uses of a newer Python are NOT looked for")
    options = ["-t=3.10-", "--no-tips", "--violations", "--eval-annotations"]
    command = [sys.executable, "-c", "from vermin import main; main()", *options, *CODE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pins_can_be_installed(tmp_path: Path) -> None:
    """Every pin has a version for each Python. Their own requirements are not looked at: that takes minutes."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    probe = [*pip, "download", "-q", "--no-deps", "-d", str(tmp_path), "annotated-types==0.8.0"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("NO PACKAGE INDEX IS REACHABLE: the pins are NOT resolved")
    options = ["-q", "--dry-run", "--no-deps", "--only-binary=:all:", "--no-binary=rouge-score"]
    started = {
        version: subprocess.Popen(
            [*pip, "install", *options, "--python-version", version, "-t", tmp_path, *pins(version)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for version in SUPPORTED
    }  # fmt: skip
    try:
        said = {version: process.communicate(timeout=TIMEOUT_S)[1] for version, process in started.items()}
    except subprocess.TimeoutExpired:
        for process in started.values():
            process.kill()
        pytest.skip("THE PACKAGE INDEX IS TOO SLOW: the pins are NOT resolved")
    assert {version: said[version] for version, process in started.items() if process.returncode} == {}


def pins(version: str) -> list[str]:
    """The lines of requirements.txt that count in a version of Python."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
    is_new = tuple(map(int, version.split("."))) >= (3, 11)
    return [line.partition(";")[0] for line in lines if ";" not in line or is_new == (">=" in line)]
