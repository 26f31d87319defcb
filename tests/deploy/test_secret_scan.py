"""The scan for credentials reports their kind and file, never their value."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from src.deploy.checks.files import SECRET_PATTERNS, find_secrets

MINE = "correct-horse-7"
# In two pieces, so that no scanner takes this file for a leak.
EXAMPLES = {
    "a Hugging Face token": "hf_" + "aB3" * 11 + "x",
    "an AWS access key": "AKIA" + "Z9" * 8,
    "a temporary AWS access key": "ASIA" + "Z9" * 8,
    "a GitHub token": "ghp_" + "aB3" * 12,
    "a GitHub app's token": "ghs_" + "aB3" * 12,
    "a fine-grained GitHub token": "github_pat_" + "aB3_" * 6,
    "a GitLab token": "glpat-" + "aB3-" * 5,
    "an OpenAI key": "sk-proj-" + "aB3-" * 6,
    "an Anthropic key": "sk-ant-" + "aB3-" * 6,
    "a Slack token": "xoxb-" + "1234567890" * 2,
    "a Google API key": "AIza" + "aB3_-" * 7,
    "a private key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if any(word in n for word in ("TOKEN", "KEY", "SECRET", "PASSWORD"))]:
        monkeypatch.delenv(name)


def test_every_pattern_has_an_example() -> None:
    assert EXAMPLES.keys() == SECRET_PATTERNS.keys()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_credential_is_found_anywhere_in_a_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "notes.bin").write_bytes(b"\0\xff" * 5000 + EXAMPLES[kind].encode() + b"\0")
    (tmp_path / "README.md").write_text("no secret\n")
    assert find_secrets(tmp_path) == [f"deep/notes.bin contains {kind}"]


@pytest.mark.parametrize(
    "near",
    [
        "hf_short",
        "AKIA" + "Z9" * 7,
        "AKIA" + "Z9" * 9,
        "ghp_x",
        "PRIVATE KEY",
        "BEGIN PUBLIC KEY",
        "hf_hub_download",
    ],
)
def test_a_similar_text_is_not_a_credential(tmp_path: Path, near: str) -> None:
    (tmp_path / "README.md").write_text(f"see {near}")
    assert find_secrets(tmp_path) == []


@pytest.mark.parametrize("value", [MINE, 'has "quotes"\n and\\slashes', "ünïcode-\U0001f642"])
@pytest.mark.parametrize("write", [str, json.dumps, lambda v: json.dumps(v, ensure_ascii=False)])
def test_a_value_of_the_environment_is_found_as_json_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, write: object
) -> None:
    monkeypatch.setenv("MY_PASSWORD", value)
    assert callable(write)
    (tmp_path / "config.json").write_text(f"[{write(value)}]", encoding="utf-8")
    found = find_secrets(tmp_path)
    assert found == ["config.json contains the value of MY_PASSWORD"]
    assert value not in found[0]


@pytest.mark.parametrize(
    ("name", "value"), [("PASSWORD", "password"), ("TOKEN", "short-1"), ("LAKEFS_ENDPOINT", "http://lake:8000")]
)
def test_a_value_that_is_not_a_secret_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    (tmp_path / "vocabulary.txt").write_text(f"a {value} b")
    assert find_secrets(tmp_path) == []


def test_weights_contain_no_secret(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(random.Random(1).randbytes(1 << 20))
    (tmp_path / "empty").touch()
    assert find_secrets(tmp_path) == []
