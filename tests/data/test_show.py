"""What a person sees of the data: every count of the report, and which tokens carry loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from src.data.chat import Chat
from src.data.show import show
from src.utils.logs import start_logging
from tests.data.ready import Maker
from tests.fixtures import chat

pytest_plugins = ["tests.fixtures", "tests.data.ready"]


@pytest.fixture
def seen(make: Maker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def show_it(*, colour: bool = False, **settings: Any) -> str:
        tokens = make.tokens(**settings)
        for name in ("FORCE_COLOR", "NO_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        if colour:
            monkeypatch.setenv("FORCE_COLOR", "1")
        start_logging()
        capsys.readouterr()
        show(tokens, Chat(make.tokenizer), 48)
        return capsys.readouterr().out

    return show_it


def test_the_table_tells_what_became_of_the_rows(make: Maker, seen: Callable[..., str]) -> None:
    held = make.held_out([{"prompt": "Held out?", "completion": "9"}])
    rows = [chat("2+2?", "4"), chat("2+2?", "4"), {}, chat("Held out?", "9"), chat("2+2?", "4" * 99)]
    path = make.file("a.jsonl", rows)
    shown = seen(max_length=48)
    for line in (
        f"file {path} messages, 5 rows in, 2 trained",
        "rows 5 in = 2 trained + 3 rejected",
        "1 no_messages",
        "1 contamination",
        "over max_length=48 1 rejected, 0 cut",
        "duplicates 1 exact, 0 normalised, 0 near",
        f"also in {held}: 1 exact, 0 normalised, 0 near",
        "mask 2 of 2 checked are the same by a second derivation",
        f"rejected: {path}:3 has no list of messages",
        "finding: 1 rows are rejected: no_messages",
    ):
        assert line in " ".join(shown.split()), shown
    assert "with loss (" in shown
    assert "p95 " in shown


def test_three_examples_are_shown_with_what_they_teach(make: Maker, seen: Callable[..., str]) -> None:
    make.file("a.jsonl", [chat(f"[b]{i}[/b]+1?", f"<{i}>") for i in range(9)])
    shown = seen()
    assert [f"⟦<{i}><|end|>⟧" in shown for i in range(9)] == [i in (0, 4, 8) for i in range(9)]
    assert "[b]4[/b]+1?" in shown  # text is not taken for markup
    assert "⟦[b]" not in shown


def test_in_a_terminal_what_is_learnt_is_green(make: Maker, seen: Callable[..., str]) -> None:
    make.file("a.jsonl", [chat("2+2?", "4")])
    shown = seen(colour=True)
    assert "\x1b[32m4<|end|>\x1b[0m" in shown
    assert "⟦" not in shown


def test_a_long_example_and_a_long_list_are_shortened(make: Maker, seen: Callable[..., str]) -> None:
    make.file("a.jsonl", [chat("2+2?", "4" * 3000), *[{}] * 30])
    shown = seen(max_length=5000)
    assert "444 ... " in shown
    assert "4" * 2000 not in shown
    assert "... and 10 more, all in data_report.json" in shown


def test_no_secret_is_shown(make: Maker, seen: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_0123456789")
    rows = [
        chat("2+2?", "4"),
        chat("What is the key?", "It is hf_canary_0123456789."),
        {"hf_canary_0123456789": 1},
    ]
    make.file("a.jsonl", rows)
    assert "hf_canary" not in seen()
