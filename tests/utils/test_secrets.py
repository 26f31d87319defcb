"""No secret of the environment is written down, wherever it hides in what is written."""

from __future__ import annotations

import os

import pytest

from src.utils.secrets import redact, redact_argv, secrets

SECRET = "correct-horse-battery"
REFERENCE = "${oc.env:MY_TOKEN}"


@pytest.fixture(autouse=True)
def one_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in secrets().values():
        monkeypatch.delenv(name)
    monkeypatch.setenv("MY_TOKEN", SECRET)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "LAKEFS_ENDPOINT",
        "LAKEFS_X",
        "my_token",
    ],
)
def test_a_variable_is_secret_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://user:pw@host")
    assert redact("to http://user:pw@host/x") == f"to ${{oc.env:{name}}}/x"


@pytest.mark.parametrize("name", ["HOME_OF_MINE", "MY_LAKEFS_ENDPOINT", "PATHS"])
def test_other_variables_are_not(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/some/where/else")
    assert redact("/some/where/else") == "/some/where/else"


def test_a_secret_is_found_inside_text_and_every_time() -> None:
    assert redact(f"a{SECRET}b {SECRET}") == f"a{REFERENCE}b {REFERENCE}"


def test_a_secret_is_found_in_nested_keys_and_values() -> None:
    value = {SECRET: [{"x": (SECRET, 1)}, [[SECRET]]], "n": 3, "f": 0.5, "b": True, "none": None}
    clean = {REFERENCE: [{"x": [REFERENCE, 1]}, [[REFERENCE]]], "n": 3, "f": 0.5, "b": True, "none": None}
    assert redact(value) == clean
    assert SECRET in value  # what was passed in is as it was


def test_the_longest_secret_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", SECRET[:10])
    monkeypatch.setenv("Z_KEY", SECRET + "-staple")
    assert list(secrets()) == [SECRET + "-staple", SECRET, SECRET[:10]]
    assert redact(f"{SECRET}-staple {SECRET} {SECRET[:10]}") == f"${{oc.env:Z_KEY}} {REFERENCE} ${{oc.env:A_KEY}}"


def test_references_to_secrets_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_LONG_TOKEN", "swordfish-and-more")
    monkeypatch.setenv("OTHER_TOKEN", "A_LONG_TOKEN")
    assert redact("swordfish-and-more") == "${oc.env:A_LONG_TOKEN}"
    assert redact("A_LONG_TOKEN") == "${oc.env:OTHER_TOKEN}"


def test_a_short_value_is_not_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_KEY", "example")
    monkeypatch.setenv("LONG_KEY", "examples")
    assert redact("an example") == "an example"
    assert redact("examples") == "${oc.env:LONG_KEY}"


def test_the_environment_is_read_at_each_call() -> None:
    os.environ["MY_TOKEN"] = "another-value"
    assert redact(f"{SECRET} another-value") == f"{SECRET} {REFERENCE}"


def test_a_command_line_refers_to_its_secrets() -> None:
    assert redact_argv(["train", f"peft={{x: {SECRET}}}", "lr=1"]) == [
        "train",
        f"peft={{x: {REFERENCE}}}",
        "lr=1",
    ]
