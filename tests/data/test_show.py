"""What a person sees of the data: every count of the report, and which tokens carry loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from src.data.chat import ChatTokenizer
from src.data.mask_check import MaskCheck, MaskVerifier
from src.data.show import print_report
from src.errors import MAX_LISTED
from src.utils.logs import start_logging
from tests.data.fixtures import Maker
from tests.fixtures import chat

pytest_plugins = ["tests.fixtures", "tests.data.fixtures"]


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
        print_report(tokens, ChatTokenizer(make.tokenizer), 48)
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


def test_rows_that_a_weight_leaves_out_are_counted_without_a_warning(
    make: Maker, seen: Callable[..., str]
) -> None:
    path = make.file("a.jsonl", [chat(f"{i}+1?", str(i + 1)) for i in range(20)])
    shown = seen(datasets=[{"path": str(path), "weight": 0.5}])
    assert "not_sampled" in shown
    assert "is left out by weight" not in shown
    assert "finding" not in shown


def test_rows_that_were_cut_or_split_are_named(make: Maker, seen: Callable[..., str]) -> None:
    path = make.file("a.jsonl", [{"text": f"{i}+1={i + 1} " * 30} for i in range(MAX_LISTED + 5)])
    shown = seen(data_format="text", on_overlength="split", max_length=32)
    examples = len(make.tokens(data_format="text", on_overlength="split", max_length=32))
    assert f"25 in = 25 trained ({examples} examples)" in shown
    assert f"cut: {path}:20 split into" in shown
    assert f"cut: {path}:21 " not in shown
    assert "... and 5 more, all in data_report.json" in shown


def test_as_many_as_are_named_leave_no_rest(make: Maker, seen: Callable[..., str]) -> None:
    path = make.file("a.jsonl", [chat("2+2?", "4"), *[{}] * MAX_LISTED])
    shown = seen()
    assert f"rejected: {path}:{MAX_LISTED + 1} " in shown
    assert "more, all in" not in shown


def test_what_the_mask_was_compared_with_is_told(
    make: Maker, seen: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter([MaskCheck(True), MaskCheck(False, "has loss elsewhere"), MaskCheck(None, "no offsets")])
    monkeypatch.setattr(MaskVerifier, "verify", lambda *_: next(verdicts))
    path = make.file("a.jsonl", [chat(f"{i}+1?", str(i + 1)) for i in range(3)])
    shown = seen()
    said = "1 of 3 checked are the same by a second derivation, 1 differ; 1: no offsets"
    assert said in " ".join(shown.split())
    assert f"rejected: {path}:2 has loss elsewhere" in shown
    assert "finding: 1 masks could not be compared" in shown


def test_an_example_has_its_number_and_its_counts(make: Maker, seen: Callable[..., str]) -> None:
    make.file("a.jsonl", [chat("2+2?", "4"), chat("3+3?", "6 and so on")])
    shown = seen()
    for number, example in enumerate(make.tokens(), 1):
        assert sum(example.loss_mask) < len(example.ids)
        assert f"example {number}, {len(example.ids)} tokens, {sum(example.loss_mask)} with loss:" in shown


def test_an_example_of_many_turns_is_shortened_once(make: Maker, seen: Callable[..., str]) -> None:
    turns = [f"turn {i} " + "x " * 150 for i in range(20)]
    make.file("a.jsonl", [chat(*turns)])
    shown = seen(max_length=9000)
    assert "turn 2 " in shown
    assert "turn 8 " not in shown
    assert shown.count(" ... ") == 1


def test_an_address_of_the_environment_is_not_shown(
    make: Maker, seen: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKEFS_ENDPOINT", "http://lake.example.org")
    make.file("a.jsonl", [chat("Where?", "http://lake.example.org")])
    assert "⟦${oc.env:LAKEFS_ENDPOINT}<|end|>⟧" in seen()
