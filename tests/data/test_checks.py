"""The account of the data: evaluation rows stay out of training, and every row is trained on or rejected."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from src.config import DataArgs
from src.data.checks import refuse_evaluation_files, report
from src.data.loader import IGNORED, encode, read_rows
from src.errors import DataError
from tests.fixtures import chat, jsonl

pytest_plugins = ["tests.fixtures"]


def test_an_evaluation_file_among_the_training_files_is_refused(tmp_path: Path) -> None:
    held = jsonl(tmp_path / "test.jsonl", [chat("2+2?", "4")])
    with pytest.raises(DataError, match=r"training file .*test\.jsonl is the evaluation file"):
        refuse_evaluation_files([held], tmp_path)


def test_each_copy_of_an_evaluation_file_is_refused_whatever_its_name(tmp_path: Path) -> None:
    held = jsonl(tmp_path / "eval" / "test.jsonl", [chat("2+2?", "4")])
    copies = [Path(shutil.copy(held, tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    own = jsonl(tmp_path / "c.jsonl", [chat("3+3?", "6")])
    with pytest.raises(DataError) as caught:
        refuse_evaluation_files([*copies, own], tmp_path / "eval")
    assert caught.value.problems == tuple(f"training file {c} is the evaluation file {held}" for c in copies)
    refuse_evaluation_files([own], tmp_path / "eval")
    refuse_evaluation_files([own], tmp_path / "there is none")


def test_the_report_accounts_for_every_row(tmp_path: Path, tokenizer: Any) -> None:
    first = jsonl(tmp_path / "a.jsonl", [chat("2+2?", "4"), {}, chat("2+2?", "4" * 300), chat("3+3?", "6")])
    second = jsonl(tmp_path / "b.jsonl", [chat("4+4?"), chat("5+5?", "10")])
    files = [first, second]
    rows, bad = read_rows(files, DataArgs(on_bad_row="skip"))
    examples, unfit = encode(rows, tokenizer, 64)
    made = report(files, examples, [*bad, *unfit])

    assert (made["rows_in"], made["rows_trained"]) == (6, 3)
    assert made["rows_in"] == made["rows_trained"] + len(made["rejected"])
    assert made["rejected_by_reason"] == {"no_messages": 1, "no_assistant_turn": 1, "over_length": 1}
    assert [(r["file"], r["line"]) for r in made["rejected"]] == [
        (str(first), 2),
        (str(second), 1),
        (str(first), 3),
    ]
    assert all(r["detail"] for r in made["rejected"])
    assert [(f["rows_in"], f["rows_trained"]) for f in made["files"]] == [(4, 2), (2, 1)]
    assert [f["sha256"] for f in made["files"]] == [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]

    lengths = sorted(len(e.input_ids) for e in examples)
    assert made["tokens"]["total"] == sum(lengths)
    assert made["tokens"]["with_loss"] == sum(x != IGNORED for e in examples for x in e.labels)
    assert made["tokens"]["row_length"]["min"] == lengths[0]
    assert made["tokens"]["row_length"]["p50"] == lengths[1]
    assert made["tokens"]["row_length"]["max"] == lengths[-1]
