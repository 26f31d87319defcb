"""Which environment variables a run gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.errors import ConfigError
from src.remote.jobs import forwarded_env

HERE = {
    "HF_TOKEN": "hf_1",
    "LAKEFS_SECRET_KEY": "lake",
    "AWS_SESSION_TOKEN": "aws",
    "HOME": "/home/me",
    "PATH": "/bin",
    "HF_HOME": "/home/me/hf",
    "REMOTE_HOST": "box",
    "EDITOR": "vi",
    "AWS_PROFILE": "mine",
    "AWS_SHARED_CREDENTIALS_FILE": "/home/me/aws",
    "AWS_CA_BUNDLE": "/home/me/ca.pem",
    "WANDB_DIR": "/home/me/wandb",
    "HF_HUB_CACHE": "/home/me/hub",
    "MINE": "1",
}


def test_variables_of_known_services_are_forwarded_and_local_ones_are_not(tmp_path: Path) -> None:
    found = forwarded_env([], HERE, tmp_path / ".env")
    assert found == {"HF_TOKEN": "hf_1", "LAKEFS_SECRET_KEY": "lake", "AWS_SESSION_TOKEN": "aws"}


def test_variables_named_in_dotenv_are_forwarded_with_their_value_in_the_environment(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    own = 'REMOTE_HOST=box\nexport HF_HOME="~/hf"\nTMPDIR=/x\nPYTHONHOME=/x\n'
    file.write_text(f'export MINE="0"\n{own}CUDA_VISIBLE_DEVICES=1\n')
    found = forwarded_env([], HERE | {"CUDA_VISIBLE_DEVICES": "1", "TMPDIR": "/x", "PYTHONHOME": "/x"}, file)
    assert found["MINE"] == "1" and found["CUDA_VISIBLE_DEVICES"] == "1"
    assert not found.keys() & {"REMOTE_HOST", "HF_HOME", "TMPDIR", "PYTHONHOME"}


def test_variables_that_a_setting_refers_to_are_forwarded(tmp_path: Path) -> None:
    words = ["model_name=${oc.env:EDITOR}", "a=${oc.env:MINE,none}", "b=${oc.env:ABSENT,none}"]
    assert forwarded_env(words, HERE, tmp_path / ".env").keys() >= {"EDITOR", "MINE"}


def test_variables_of_remote_env_are_forwarded(tmp_path: Path) -> None:
    assert forwarded_env([], HERE | {"REMOTE_ENV": "EDITOR, MINE"}, tmp_path / ".env")["EDITOR"] == "vi"


def test_a_reference_to_an_unset_variable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ABSENT is not set"):
        forwarded_env(["lr=${oc.env:ABSENT}"], HERE, tmp_path / ".env")
