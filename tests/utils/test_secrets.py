"""No secret of the environment is written down, wherever it hides in what is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from src import secret_references
from src.utils.secrets import (
    credentials,
    redact,
    redact_argv,
    redact_secrets,
    restore_secrets,
    secrets,
    to_references,
)
from tests.fixtures import ROOT

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


@pytest.mark.parametrize(
    "name",
    [
        "DB_PASS", "DBPASS", "MYSQL_PWD", "SSH_PASSPHRASE", "GCP_CREDENTIALS", "GH_PAT", "PAT", "BASIC_AUTH",
        "AUTHORIZATION", "NPM_AUTH", "DATABASE_URL", "SENTRY_DSN", "Db_Pass", "SLACK_WEBHOOK",
    ],
)  # fmt: skip
def test_more_names_of_secrets(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "swordfish-and-more")
    assert redact("swordfish-and-more") == f"${{oc.env:{name}}}"
    assert credentials()["swordfish-and-more"] == name


@pytest.mark.parametrize("name", ["PATH_LIKE", "GIT_AUTHOR_NAME", "COMPAT_MODE", "BYPASS", "PASSENGERS", "OLDPWD"])
def test_names_that_resemble_them_are_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "swordfish-and-more")
    assert redact("swordfish-and-more") == "swordfish-and-more"


def test_the_path_of_a_secret_is_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", f"{tmp_path}/key.json")
    monkeypatch.setenv("SOME_PASS", "/3ab+c9/dE==")
    assert redact(f"{tmp_path}/key.json /3ab+c9/dE==") == f"{tmp_path}/key.json ${{oc.env:SOME_PASS}}"


def test_a_url_with_a_password_is_secret_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER", "amqp://me:word@host/queue")
    assert redact("at amqp://me:word@host/queue") == "at ${oc.env:BROKER}"
    assert credentials()["amqp://me:word@host/queue"] == "BROKER"


# References of settings


@pytest.fixture
def thing(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ASSAY_REFERRED", "")  # restored after the test
    monkeypatch.setenv("MY_THING", "swordfish-and-more")
    secret_references.register()
    assert redact("swordfish-and-more") == "swordfish-and-more"
    return "swordfish-and-more"


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer": {"run_name": "x-${oc.env:MY_THING}"}},
        {"run_name": "${oc.env:MY_THING}"},
        {"run_name": "${oc.env:MY_THING,none}"},
        {"datasets": [{"data_source": {"url": "https://h/?sig=${oc.env:MY_THING}"}}]},
        {"system_prompt": "${trainer.a}", "trainer": {"a": "${oc.env:MY_THING}"}},
    ],
)
def test_what_a_setting_refers_to_is_secret(thing: str, settings: dict[str, Any]) -> None:
    resolved = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    assert thing in str(resolved) and thing not in str(redact(resolved)) and "MY_THING" in str(redact(resolved))
    assert thing not in credentials()  # a word of the vocabulary may be one; it rejects no rows
    child = "import sys; sys.path.insert(0, '.'); from src.utils.secrets import redact; print(redact(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", child, thing], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "${oc.env:MY_THING}\n"  # workers know it too


@pytest.mark.parametrize(
    "settings",
    [{"model_name": "${oc.env:MY_THING}"}, {"lr": "${oc.env:MY_THING}"}, {"optim": "${oc.env:MY_THING}"}],
)
def test_a_name_and_a_choice_are_no_secret(thing: str, settings: dict[str, Any]) -> None:
    OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    assert redact(thing) == thing


def test_each_setting_that_names_something_exists() -> None:
    assert secret_references._texts() >= secret_references.NAMES


# URLs


def test_urls_are_redacted_and_rows_keep_theirs() -> None:
    url = f"https://me:word@host/a?id=1&sig={SECRET}&of=${{oc.env:MY_TOKEN}}"
    kept = f"https://***@host/a?id=***&sig={REFERENCE}&of={REFERENCE}"
    assert redact({url: [url]}) == {kept: [kept]}
    assert redact_secrets("https://host/watch?v=abc") == "https://host/watch?v=abc"


def test_another_process_gets_a_url_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        monkeypatch.setenv(f"ASSAY_URL_PART_{number}", "")
        monkeypatch.delenv(f"ASSAY_URL_PART_{number}")
    words = [f"a=https://me:x@h/f?id=1&sig=9f{REFERENCE}", f"b='https://h/f?id=1' {SECRET}"]
    passed = to_references(words)
    assert passed[1] == "b='https://h/f?id=${oc.env:ASSAY_URL_PART_2}' " + REFERENCE
    assert "9f" not in str(passed) and "me:x" not in str(passed)
    assert restore_secrets(passed) == [words[0].replace(REFERENCE, SECRET), words[1]]
    assert to_references(words) == passed  # the same variables
    assert (
        redact(passed)
        == redact(words)
        == ["a=https://***@h/f?id=***&sig=***", "b='https://h/f?id=***' " + REFERENCE]
    )
