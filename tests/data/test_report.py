"""The account of the data: evaluation rows stay out of training, and every row is trained on or rejected."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from src.data.report import refuse_evaluation_files
from src.errors import MAX_LISTED, DataError
from tests.data.fixtures import Maker
from tests.fixtures import chat, jsonl

pytest_plugins = ["tests.fixtures", "tests.data.fixtures"]


def test_an_evaluation_file_among_the_training_files_is_refused(tmp_path: Path) -> None:
    held = jsonl(tmp_path / "test.jsonl", [chat("2+2?", "4")])
    with pytest.raises(DataError, match=r"training file .*test\.jsonl is the evaluation file"):
        refuse_evaluation_files([held], tmp_path)


def test_each_copy_of_an_evaluation_file_is_refused_whatever_its_name(tmp_path: Path) -> None:
    held = jsonl(tmp_path / "eval" / "test.jsonl", [chat("2+2?", "4")])
    other = jsonl(tmp_path / "eval" / "dev.jsonl", [chat("4+4?", "8")])
    copies = [Path(shutil.copy(held, tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    own = jsonl(tmp_path / "c.jsonl", [chat("3+3?", "6")])
    with pytest.raises(DataError) as caught:
        refuse_evaluation_files([*copies, own, other], tmp_path / "eval")
    assert caught.value.problems == tuple(
        f"training file {c} is the evaluation file {e}"
        for c, e in ((copies[0], held), (copies[1], held), (other, other))
    )
    refuse_evaluation_files([own], tmp_path / "eval")
    refuse_evaluation_files([own], tmp_path / "there is none")


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
        ([{}], {}, "1 rows are rejected: no_messages"),
        ([chat("2+2?", "4" * 300)], {"max_length": 64}, "1 rows are rejected: over_length"),
        (
            [chat("2+2?", "4" * 300)],
            {"max_length": 64, "on_overlength": "truncate"},
            "1 rows are cut to max_length",
        ),
        ([chat("3+3?", "6")], {}, "1 rows are duplicates of earlier ones (1 exact)"),
        ([chat("Held out?", "9")], {"on_contamination": "keep"}, "1 rows occur in the evaluation files"),
        ([chat("<|end|>?", "4")], {}, "1 rows are rejected: control_token"),
    ],
)
def test_a_finding_is_told_and_with_strict_data_refused(
    make: Maker, rows: list[Any], settings: dict[str, Any], finding: str
) -> None:
    make.held_out([{"prompt": "Held out?", "completion": "9"}])
    make.file("a.jsonl", [chat("3+3?", "6"), *rows])
    tokens = make.tokens(**settings)
    assert tokens.report["findings"] == [finding]
    with pytest.raises(DataError) as caught:
        make.tokens(**settings, strict_data=True)
    assert caught.value.problems == (finding,)


def test_clean_data_has_no_finding(make: Maker) -> None:
    make.file("a.jsonl", [chat("3+3?", "6"), chat("4+4?", "8")])
    assert make.tokens(strict_data=True).report["findings"] == []


def test_a_template_without_an_end_of_turn_is_a_finding(make: Maker) -> None:
    make.file("a.jsonl", [chat("3+3?", "6")])
    make.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
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
    assert report["findings"] == ["1 rows are cut to max_length"]
    (cut,) = report["cut"]
    assert (cut["line"], cut["detail"]) == (1, f"split into {pieces} pieces")


def test_row_lengths_are_told_by_nearest_rank(make: Maker) -> None:
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


def test_a_similarity_is_told_with_three_digits(make: Maker) -> None:
    words = [f"word{i}" for i in range(60)]
    other = [*words[:30], "another", *words[31:]]
    make.file("a.jsonl", [chat(" ".join(words), "4"), chat(" ".join(other), "4")])
    (row,) = make.tokens().report["duplicates"]["rows"]
    assert 0.8 <= row["similarity"] < 1
    assert row["similarity"] == round(row["similarity"], 3)


def test_when_no_row_is_left_the_first_reasons_are_told_and_no_more(make: Maker) -> None:
    make.file("a.jsonl", [chat(f"{i}+1?", "4" * 300) for i in range(MAX_LISTED + 5)])
    with pytest.raises(DataError) as caught:
        make.tokens(max_length=16)
    assert len(caught.value.problems) == MAX_LISTED
