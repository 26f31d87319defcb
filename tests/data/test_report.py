"""The data report: evaluation rows are kept out of training, and every row is trained on or rejected."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.data.chat import ChatTokenizer
from src.data.mask_check import MaskCheck, MaskVerifier
from src.data.report import refuse_evaluation_files, refuse_findings
from src.data.report_text import print_report
from src.errors import MAX_LISTED, DataError
from src.utils.logs import start_logging
from tests.data.fixtures import Maker
from tests.data.tokenizers import TOOLS, assistant, user
from tests.fixtures import chat, jsonl

pytest_plugins = ["tests.fixtures", "tests.data.fixtures"]


def test_an_evaluation_file_among_the_training_files_is_refused(tmp_path: Path) -> None:
    held = jsonl(tmp_path / "test.jsonl", [chat("2+2?", "4")])
    with pytest.raises(DataError, match=r"training file .*test\.jsonl is the evaluation file"):
        refuse_evaluation_files([held], [held])


def test_each_copy_of_an_evaluation_file_is_refused_whatever_its_name(tmp_path: Path) -> None:
    held = jsonl(tmp_path / "eval" / "test.jsonl", [chat("2+2?", "4")])
    other = jsonl(tmp_path / "eval" / "dev.jsonl", [chat("4+4?", "8")])
    copies = [Path(shutil.copy(held, tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    own = jsonl(tmp_path / "c.jsonl", [chat("3+3?", "6")])
    with pytest.raises(DataError) as caught:
        refuse_evaluation_files([*copies, own, other], [held, other])
    assert caught.value.problems == tuple(
        f"training file {c} is the evaluation file {e}"
        for c, e in ((copies[0], held), (copies[1], held), (other, other))
    )
    refuse_evaluation_files([own], [held, other])
    refuse_evaluation_files([own], [])


def test_the_report_accounts_for_every_row(make: Maker) -> None:
    rows = [chat("2+2?", "4"), {}, chat("2+2 at length?", "4" * 300), chat("3+3?", "6")]
    first, second = make.file("a.jsonl", rows), make.file("b.jsonl", [chat("4+4?"), chat("5+5?", "10")])
    tokens = make.tokens(max_length=64)
    made = tokens.report

    assert (made["rows_in"], made["rows_trained"], made["examples"]) == (6, 3, 3)
    assert made["rows_in"] == made["rows_trained"] + len(made["rejected"])
    assert made["rejected_by_reason"] == {"no_messages": 1, "over_length": 1, "no_assistant_turn": 1}
    assert [(r["file"], r["line"]) for r in made["rejected"]] == [
        (str(first), 2),
        (str(first), 3),
        (str(second), 1),
    ]
    assert all(r["detail"] for r in made["rejected"])
    assert [(f["rows_in"], f["rows_trained"], f["format"]) for f in made["files"]] == [
        (4, 2, "messages"),
        (2, 1, "messages"),
    ]
    assert [f["sha256"] for f in made["files"]] == [
        hashlib.sha256(f.read_bytes()).hexdigest() for f in (first, second)
    ]

    lengths = sorted(len(e.ids) for e in tokens)
    assert made["tokens"]["total"] == sum(lengths)
    assert made["tokens"]["with_loss"] == sum(sum(e.loss_mask) for e in tokens)
    assert list(made["tokens"]["row_length"]) == ["min", "p50", "p90", "p95", "p99", "max"]
    assert made["tokens"]["row_length"]["min"] == lengths[0]
    assert made["tokens"]["row_length"]["p50"] == lengths[1]
    assert made["tokens"]["row_length"]["max"] == lengths[-1]
    assert made["mask"] == {"checked": 4 - 1, "agree": 3, "disagree": 0, "not_comparable": {}}


@pytest.mark.parametrize(
    ("rows", "settings", "finding"),
    [
        ([{}], {}, "1 row is rejected: no_messages"),
        ([chat("2+2?", "4" * 300)], {"max_length": 64}, "1 row is rejected: over_length"),
        (
            [chat("2+2?", "4" * 300)],
            {"max_length": 64, "on_overlength": "truncate"},
            "1 row is cut to max_length",
        ),
        ([chat("3+3?", "6")], {}, "1 row is a duplicate of earlier ones (1 exact)"),
        ([chat("Held out?", "9")], {"on_contamination": "keep"}, "1 row occurs in the evaluation files"),
        ([chat("<|end|>?", "4")], {}, "1 row is rejected: control_token"),
        (
            [chat("2+2?", "4") | {"mood": "calm", "source": "book"}],
            {},
            "not read, and so not trained on: mood (1 row); user_prompt puts columns into the request",
        ),
        ([chat("2+2?", "4") | {"weight": 0.5}], {}, "not read, and so not trained on: weight (1 row)"),
    ],
)
def test_a_finding_is_reported_and_with_strict_data_refused(
    make: Maker, rows: list[Any], settings: dict[str, Any], finding: str
) -> None:
    make.held_out([{"prompt": "Held out?", "completion": "9"}])
    make.file("a.jsonl", [chat("3+3?", "6"), *rows])
    tokens = make.tokens(**settings)
    assert tokens.report["findings"] == [finding]
    with pytest.raises(DataError) as caught:
        make.tokens(**settings, strict_data=True)
    assert caught.value.problems == (finding,)


def test_values_that_are_not_read_are_counted_with_an_example(make: Maker) -> None:
    rows: list[Any] = [chat("2+2?", "4"), chat("3+3?", "6") | {"mood": "calm", "id": 1}, chat("4+4?", "8")]
    rows[2]["messages"][0]["tone"] = "dry"
    path = make.file("a.jsonl", [*rows, {"mood": "calm"}, chat("6+6?", "12") | {"mood": "calm"}])
    make.file("b.jsonl", [chat("5+5?", "10") | {"mood": "calm"}])
    assert make.tokens().report["unread"] == [
        {"key": "mood", "rows": 3, "example": f"{path}:2"},
        {"key": "id", "rows": 1, "example": f"{path}:2", "harmless": True},
        {"key": "messages[].tone", "rows": 1, "example": f"{path}:3"},
    ]


def test_rows_that_differ_in_anything_that_is_trained_are_no_duplicates(make: Maker) -> None:
    asked = {"role": "user", "content": "Do the usual task for me now, please, as we agreed last week at home."}

    def call(name: str, arguments: object, **beside: Any) -> dict[str, Any]:
        called = {"function": {"name": name, "arguments": arguments}, "id": str(arguments)}
        return {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [called]}], **beside}

    answered = {"role": "assistant", "content": "Done."}
    different: list[Any] = [
        call("water", {"litres": 2}), call("water", {"litres": 3}), call("feed", {"litres": 2}),
        call("water", {"litres": 2}, tools=[{"name": "water"}]), chat("a\nb", "c"), chat("a", "b\nc"),
        {"messages": [asked, answered]}, {"messages": [asked, {**answered, "reasoning_content": "Which one?"}]},
        {"messages": [asked, answered, asked, {**answered, "weight": 0}]}, {"messages": [asked, answered] * 2},
        {"messages": [asked, {**answered, "weight": 0}, asked, answered]},
    ]  # fmt: skip
    make.file("a.jsonl", different)
    assert list(make.read().store.matches("duplicates")) == []
    weighted = {"messages": [asked, {**answered, "weight": 1}]}
    same = [call("water", '{"litres": 2}'), {"messages": different[7]["messages"]}, weighted]
    make.file("a.jsonl", [*different, *same])
    assert [match.kind for match in make.read().store.matches("duplicates")] == ["exact"] * 3


def test_clean_data_has_no_finding(make: Maker) -> None:
    make.file("a.jsonl", [chat("3+3?", "6"), chat("4+4?", "8")])
    assert make.tokens(strict_data=True).report["findings"] == []


def test_a_template_without_an_end_of_turn_is_a_finding(make: Maker) -> None:
    make.file("a.jsonl", [chat("3+3?", "6")])
    make.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '[end]\\n' }}{% endfor %}"
        + ("{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    )
    (finding,) = make.tokens().report["findings"]
    assert "the model does not learn to stop" in finding


def test_the_report_follows_the_order_in_which_the_data_sets_are_named(make: Maker) -> None:
    rows = [chat("2+2?", "4"), {}, chat("3+3?", "6" * 300), chat("4+4?", "8" * 300)]
    first, second = make.file("b.jsonl", rows), make.file("a.jsonl", [chat("5+5?", "10"), []])
    report = make.tokens(datasets=[{"path": str(first)}, {"path": str(second)}], max_length=64).report
    places = [(first, 2), (first, 3), (first, 4), (second, 2)]
    assert [(r["file"], r["line"]) for r in report["rejected"]] == [(str(file), line) for file, line in places]
    assert list(report["rejected_by_reason"]) == ["over_length", "no_messages", "not_an_object"]  # most first
    assert report["findings"][0] == "2 rows are rejected: over_length"


def test_a_row_of_several_examples_is_one_row(make: Maker) -> None:
    short, long = make.file("a.jsonl", [{"text": "3+3=6"}]), make.file("b.jsonl", [{"text": "2+2=4 " * 40}])
    entries = [{"path": str(path), "format": "text", "weight": w} for path, w in ((short, 1), (long, 2))]
    tokens = make.tokens(datasets=entries, on_overlength="split", max_length=16)
    report = tokens.report
    pieces = report["examples"] - 1
    assert (report["rows_trained"], [f["rows_trained"] for f in report["files"]]) == (2, [1, 1])
    assert len(tokens) == 1 + 2 * pieces > 4
    assert report["findings"] == ["1 row is cut to max_length"]
    (cut,) = report["cut"]
    assert (cut["line"], cut["detail"]) == (1, f"split into {pieces} pieces")


def test_row_lengths_are_reported_by_nearest_rank(make: Maker) -> None:
    make.file("a.jsonl", [chat("How many?", "4 " * n + "4") for n in range(40)])
    tokens = make.tokens()
    lengths = sorted(len(example.ids) for example in tokens)
    assert len(set(lengths)) == 40
    ranks = {"min": 0, "p50": 20, "p90": 36, "p95": 38, "p99": 39, "max": 39}
    assert tokens.report["tokens"]["row_length"] == {name: lengths[rank] for name, rank in ranks.items()}


def test_overlap_is_counted_for_each_evaluation_file(make: Maker) -> None:
    dev = make.held_out([{"prompt": "Dev?", "completion": "9"}], "dev")
    test = make.held_out([{"prompt": "Test?", "completion": "9"}], "test")
    make.file("a.jsonl", [chat("3+3?", "6"), chat("Test?", "9"), chat("TEST?", "9"), chat("Dev?", "9")])
    assert make.tokens().report["contamination"]["files"] == {
        str(dev): {"exact": 1, "normalised": 0, "near": 0},
        str(test): {"exact": 1, "normalised": 1, "near": 0},
    }


def test_a_similarity_is_reported_with_three_digits(make: Maker) -> None:
    words = [f"word{i}" for i in range(60)]
    other = [*words[:30], "another", *words[31:]]
    make.file("a.jsonl", [chat(" ".join(words), "4"), chat(" ".join(other), "4")])
    (row,) = make.tokens().report["duplicates"]["rows"]
    assert 0.8 <= row["similarity"] < 1
    assert row["similarity"] == round(row["similarity"], 3)


def test_if_no_row_is_left_only_the_first_reasons_are_reported(make: Maker) -> None:
    make.file("a.jsonl", [chat(f"{i}+1?", "4" * 300) for i in range(MAX_LISTED + 5)])
    with pytest.raises(DataError) as caught:
        make.tokens(max_length=16)
    assert len(caught.value.problems) == MAX_LISTED


# For people


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


@pytest.mark.parametrize(
    ("reasons", "remedy"),
    [
        ({"over_length": 2, "template": 1}, "raise max_length"),
        ({"template": 3, "over_length": 1}, "change the data or the model"),
    ],
)
def test_the_remedy_is_that_of_the_most_frequent_reason(reasons: dict[str, int], remedy: str) -> None:
    report = {"rows_trained": 0, "rejected": [], "rejected_by_reason": reasons, "findings": []}
    with pytest.raises(DataError) as refused:
        refuse_findings(report, strict=False)
    assert refused.value.hint == f"no row is left to train on; {remedy}"


def test_the_table_shows_what_became_of_the_rows(make: Maker, seen: Callable[..., str]) -> None:
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
        "warning: 1 row is rejected: no_messages",
    ):
        assert line in " ".join(shown.split()), shown
    assert "with loss (" in shown
    assert "p95 " in shown


def test_three_examples_are_shown_with_their_loss_mask(make: Maker, seen: Callable[..., str]) -> None:
    make.file("a.jsonl", [chat(f"[b]{i}[/b]+1?", f"<{i}>") for i in range(9)])
    shown = seen()
    assert [f"⟦<{i}><|end|>⟧" in shown for i in range(9)] == [i in (0, 4, 8) for i in range(9)]
    assert "[b]4[/b]+1?" in shown  # text is not parsed as markup
    assert "⟦[b]" not in shown


def test_in_a_terminal_tokens_with_loss_are_green(make: Maker, seen: Callable[..., str]) -> None:
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


def test_the_method_of_the_mask_check_is_reported(
    make: Maker, seen: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter([MaskCheck(True), MaskCheck(False, "has loss elsewhere"), MaskCheck(None, "no offsets")])
    monkeypatch.setattr(MaskVerifier, "verify_all", lambda *_: verdicts)
    path = make.file("a.jsonl", [chat(f"{i}+1?", str(i + 1)) for i in range(3)])
    shown = seen()
    said = "1 of 3 checked are the same by a second derivation, 1 differ; 1: no offsets"
    assert said in " ".join(shown.split())
    assert f"rejected: {path}:2 has loss elsewhere" in shown
    assert "1 mask could not be compared" in shown


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


def test_the_report_names_what_is_dropped_with_rows_and_an_example(make: Maker) -> None:
    turns = [user("Which tools do you have?"), assistant("Only weather.")]
    thoughts = [user("What is two and two?"), assistant("Four.", reasoning_content="Two and two make four.")]
    path = jsonl(make.folder / "data" / "rows.jsonl", [
        {"messages": turns, "tools": TOOLS},
        {"messages": thoughts},
        {"messages": [{"role": "developer", "content": "Be brief."}, user("Name a colour."), assistant("Blue.")]},
    ])  # fmt: skip
    report = make.tokens(strict_data=False).report
    assert report["passed_to_template"] == [
        {"what": "a developer turn as a system turn", "rows": 1, "example": f"{path}:3"}
    ]
    assert report["dropped_by_template"] == [
        {"what": "tools", "rows": 1, "rejected": 0, "example": f"{path}:1"},
        {"what": "thoughts", "rows": 1, "rejected": 1, "example": f"{path}:2"},
    ]
    assert report["rejected_by_reason"] == {"dropped_by_template": 1}
    assert f"1 row has tools that the chat template leaves out ({path}:1)" in report["findings"]
    assert any("rejected: dropped_by_template (chat_template" in finding for finding in report["findings"])
