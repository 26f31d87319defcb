r"""Texts of settings survive config_used.yaml: `${`, backslashes, secrets, what YAML reads as something else."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src import cli, cli_args, config, runs, schema
from src.errors import ConfigError
from src.train.resume import find_resumable
from src.utils.references import to_config, to_literal

SECRET = r"${a\secret"
PIECES = [
    "$", "{", "}", "${", "\\", "\\${VAR}", "${lr}", "${mirror}", "${oc.env:HOME}", SECRET, "???", "a", ":",
    " ", "'", '"', "\n", "\r", "\t", "#", "~", "null", "true", "on", "1e5", "1_000", "-", "[", "]", ",", "%",
    "@", "&", "*", "!", "|", ">", "=", ".", "é", "\x85", "\u2028", "\x7f", "\x1b", "\ufeff", "\u200b", "😀",
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, a secret, and an environment that is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def one(stage: str, *words: str) -> Any:
    started: list[Any] = []
    cli.run_jobs(cli_args.parse(stage, list(words)), started.append)
    (job,) = started
    return job


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        one("train", *words)
    return str(caught.value)


def random_texts(count: int) -> list[str]:
    chosen = random.Random(7)
    return [*PIECES, *("".join(chosen.choices(PIECES, k=chosen.randint(0, 6))) for _ in range(count))]


def test_every_text_is_read_back_from_the_snapshot() -> None:
    texts = random_texts(500)
    used = schema.EvalConfig(stop=texts, system_prompt="".join(texts), generation={"a": {"b": texts}})
    snapshot = config.to_yaml(used)
    assert SECRET not in snapshot and "${oc.env:HF_TOKEN}" in snapshot
    Path("config_used.yaml").write_text(snapshot, encoding="utf-8", newline="")
    call = cli_args.parse("eval", ["--config-name", "config_used.yaml"])
    cli.compose.register_root(call)
    values, problems = cli.compose.compose_values(call, [])
    assert not problems and [values["stop"], values["system_prompt"]] == [texts, "".join(texts)]
    assert values["generation"] == {"a": {"b": texts}}
    assert to_literal(to_config(texts)) == texts


TYPED = {  # by setting: the word on the command line, and its text
    "system_prompt": (r"\${mirror} and ${oc.env:HOME_OF_IT}", "${mirror} and here"),
    "user_prompt": (r"\\\${mirror}\n{question}", r"\${mirror}\n{question}"),
    "question_key": ("a$b {c} $5 $", "a$b {c} $5 $"),
    "answer_key": ("two\nlines: # 'no' \"comment\"\x85", "two\nlines: # 'no' \"comment\"\x85"),
}


def test_typed_texts_are_resumed_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME_OF_IT", "here")
    first = one("train", *(f"{key}={word}" for key, (word, _) in TYPED.items()))
    assert {key: getattr(first, key) for key in TYPED} == {key: text for key, (_, text) in TYPED.items()}
    run = runs.create("outputs", "train", config.to_yaml(first), {})
    run.update(status="interrupted")
    run.unlock()
    assert one("train", "--config-name", str(run.path / "config_used.yaml")) == first
    resumed = one("train", "resume=latest")
    assert resumed.system_prompt == first.system_prompt
    assert [found.id for found in find_resumable(resumed) if isinstance(found, runs.Run)] == [run.id]


def test_a_text_of_the_run_is_a_text_in_its_evaluation() -> None:
    text = "Costs ${price}: {question}"
    run = runs.create("outputs", "train", config.to_yaml(schema.TrainConfig(user_prompt=text)), {"base_model": {}})
    run.unlock()
    (run.path / "model").mkdir()
    run.update(status="finished")
    assert one("eval", run.id).user_prompt == text
    run.update(evaluation_data={"columns": {"user_prompt": text}})  # as data of JSON, unescaped
    assert one("eval", run.id).user_prompt == text


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        (
            "system_prompt=${VAR}",
            r"system_prompt cannot be resolved: there is no setting VAR; write \${ for the text ${",
        ),
        (
            "system_prompt=${VAR",
            r"system_prompt=${VAR has an incomplete reference ${...}; write \${ for the text ${",
        ),
        ('chat_template_kwargs={a: ["${"]}', "chat_template_kwargs.a.0=${ has an incomplete reference"),
        ("system_prompt=${oc.env:NOPE_X}", "the environment variable NOPE_X is not set"),
        ("system_prompt=???", "system_prompt=??? stands for a missing value"),
        ("system_prompt=\udcff", "'system_prompt=\\udcff' holds bytes that are not UTF-8"),
    ],
)
def test_a_reference_that_cannot_be_read_is_a_sentence_beside_the_others(word: str, sentence: str) -> None:
    reported = refusal(word, "lr=-1")
    assert sentence in reported and "lr=-1: should be greater than 0" in reported


@pytest.mark.parametrize("words", [["--config-name", "bad.yaml"], ["experiment=bad.yaml"]])
def test_an_incomplete_reference_in_a_file_is_named_with_the_file(words: list[str]) -> None:
    Path("bad.yaml").write_text('# @package _global_\nsystem_prompt: "${VAR"\n')
    assert "bad.yaml: system_prompt=${VAR has an incomplete reference" in refusal(*words)
