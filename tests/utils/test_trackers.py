"""Trackers that cannot be used are named before a training run starts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from src.utils import trackers


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working directory, without variables of W&B."""
    for name in (*trackers.WANDB_VARIABLES, "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def installed(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package wandb."""
    (home / "site/wandb").mkdir(parents=True)
    (home / "site/wandb/__init__.py").touch()
    monkeypatch.syspath_prepend(home / "site")
    return home


def test_the_folder_that_wandb_writes_is_not_taken_for_the_package(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("wandb"):
        pytest.skip("wandb is installed")
    (home / "wandb").mkdir()
    monkeypatch.syspath_prepend(home)
    assert trackers.problems(["tensorboard", "wandb"]) == [
        "report_to=wandb: wandb is not installed; pip install wandb"
    ]


def test_wandb_without_a_login_is_a_problem(installed: Path) -> None:
    (problem,) = trackers.problems(["wandb"])
    assert problem.startswith("report_to=wandb: there is no login to W&B; run wandb login, or set WANDB_API_KEY")
    (installed / ".netrc").write_text("machine example.org login me password secret\n")
    assert trackers.problems(["wandb"]) == [problem]


@pytest.mark.parametrize(
    ("variables", "files"),
    [
        ({"WANDB_API_KEY": "x"}, {}),
        ({"WANDB_MODE": "offline"}, {}),
        ({}, {".netrc": "machine api.wandb.ai login user password x\n"}),
        ({"WANDB_BASE_URL": "https://w.example.org:80"}, {".netrc": "machine w.example.org login u password x"}),
        ({}, {"wandb/settings": "[default]\nmode = offline\n"}),
    ],
)  # fmt: skip
def test_every_way_to_log_in_to_wandb_is_accepted(
    installed: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], files: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (installed / name).parent.mkdir(exist_ok=True)
        (installed / name).write_text(text)
    (installed / ".netrc").chmod(0o600) if (installed / ".netrc").exists() else None
    assert trackers.problems(["wandb"]) == []
