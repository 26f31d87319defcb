"""Contamination: which evaluation row a training row matches, and by which kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.data.contamination import EvaluationRows, HeldOutIndex, HeldOutMatch, HeldOutText
from src.data.duplicates import fingerprints, similarity
from src.utils.logs import start_logging
from tests.data.test_duplicates import LONG as WORDS
from tests.data.test_duplicates import replaced
from tests.fixtures import chat, jsonl

LONG = (
    "The upper kiln was stopped at noon because the outer shell had grown too hot near the second burner, and the "
    "crew then waited until evening before they looked at the bricks, of which eleven were found loose or cracked."
)


def asked(*requests: str, answer: str = "yes") -> list[dict[str, str]]:
    return [{"prompt": request, "completion": answer} for request in requests]


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def found(folder: Path, *turns: str) -> tuple[int, str] | None:
    """The line of the evaluation row that a conversation matches, and the kind of the match."""
    (match,) = EvaluationRows(files_of(folder), 0.8).matches([chat(*turns)["messages"]], {})
    return (match.line, match.kind) if match else None


def test_the_evaluation_row_of_the_same_letters_goes_before_one_that_is_normalised_the_same(
    tmp_path: Path,
) -> None:
    jsonl(tmp_path / "test.jsonl", asked("held OUT?", "Held out?", "Held out?"))
    assert found(tmp_path, "Held out?", "no") == (2, "exact")  # of equal ones the first is named
    assert found(tmp_path, "held OUT?", "no") == (1, "exact")
    assert found(tmp_path, "HELD OUT?", "no") == (1, "normalised")


def test_the_same_request_goes_before_a_near_exchange(tmp_path: Path) -> None:
    jsonl(tmp_path / "test.jsonl", asked(LONG))
    assert found(tmp_path, LONG, "no") == (1, "exact")
    assert found(tmp_path, LONG.upper(), "no") == (1, "normalised")
    assert found(tmp_path, LONG.replace("eleven", "twelve"), "yes") == (1, "near")


@pytest.mark.parametrize("backwards", [False, True])
def test_the_strongest_match_of_all_exchanges_counts(tmp_path: Path, backwards: bool) -> None:
    jsonl(tmp_path / "test.jsonl", asked("First?", "Second?", LONG, "Third?"))
    near = LONG.replace("eleven", "twelve")
    nearer = f"{LONG} Indeed."

    def strongest(*requests: str) -> Any:
        ordered = requests[::-1] if backwards else requests
        return found(tmp_path, *(turn for request in ordered for turn in (request, "yes")))

    assert strongest("Hm?", near, "FIRST?", "Second?") == (2, "exact")
    assert strongest("Hm?", near, "FIRST?") == (1, "normalised")
    assert strongest("Hm?", near) == (3, "near")
    assert strongest("First?", "Third?") == ((4, "exact") if backwards else (1, "exact"))  # of equals the first
    (match,) = EvaluationRows(files_of(tmp_path), 0.5).matches(
        [chat(*(t for r in ((nearer, near) if backwards else (near, nearer)) for t in (r, "yes")))["messages"]], {}
    )
    (alone,) = EvaluationRows(files_of(tmp_path), 0.5).matches([chat(nearer, "yes")["messages"]], {})
    assert match == alone


def test_an_exchange_is_near_by_its_request_and_its_answer_together(tmp_path: Path) -> None:
    jsonl(tmp_path / "test.jsonl", asked("Why was it stopped?", answer=LONG))
    assert found(tmp_path, "Why was it halted?", LONG) == (1, "near")
    assert found(tmp_path, "Why was it halted?", "Nobody knows.") is None


def test_a_document_matches_a_request_or_a_complete_exchange(tmp_path: Path) -> None:
    jsonl(tmp_path / "test.jsonl", asked("Held out?"))
    for text, kind in (("Held out?", "exact"), ("Held out?\nyes", "exact"), ("HELD OUT?\nyes", "normalised")):
        (match,) = EvaluationRows(files_of(tmp_path), 0.8).matches([[{"role": "text", "content": text}]], {})
        assert match is not None
        assert (match.line, match.kind) == (1, kind)
    assert EvaluationRows(files_of(tmp_path), 0.8).matches([[{"role": "text", "content": "Nothing."}]], {}) == [
        None
    ]


def test_evaluation_rows_that_cannot_be_read_are_counted_and_the_others_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_logging()
    path = jsonl(tmp_path / "test.jsonl", [{}, *asked("Held out?"), [], {"prompt": "Why?", "completion": ""}])
    path.write_text(path.read_text() + "{\n")
    assert found(tmp_path, "Held out?", "no") == (2, "exact")
    assert f"{path}: 4 rows cannot be read" in capsys.readouterr().out
    jsonl(path, asked("Held out?"))
    EvaluationRows(files_of(tmp_path), 0.8)
    assert "cannot be read" not in capsys.readouterr().out


def test_without_evaluation_rows_nothing_is_given_away(tmp_path: Path) -> None:
    assert found(tmp_path / "nowhere", "Held out?", "no") is None
    jsonl(tmp_path / "test.jsonl", [{}])
    assert found(tmp_path, "Held out?", "no") is None


# Held-out texts


def held_out(*texts: str) -> HeldOutIndex:
    return HeldOutIndex([HeldOutText("test.jsonl", line, text) for line, text in enumerate(texts, 1)])


def test_a_training_text_is_matched_with_the_held_out_text_by_its_strongest_kind() -> None:
    near, upper = replaced(WORDS, 7), WORDS.upper()
    texts = [upper, WORDS, WORDS.title(), near, "2+2?", "2-2?", "", replaced(WORDS, *range(20))]
    assert held_out(near + " x", WORDS, upper, "2+2").matches(fingerprints(texts), texts) == [
        HeldOutMatch("test.jsonl", 3, "exact", 1.0),
        HeldOutMatch("test.jsonl", 2, "exact", 1.0),
        HeldOutMatch("test.jsonl", 2, "normalised", 1.0),
        HeldOutMatch("test.jsonl", 1, "near", similarity(near + " x", near)),
        HeldOutMatch("test.jsonl", 4, "normalised", 1.0),
        None,
        None,
        None,
    ]


def test_the_nearest_held_out_text_is_named_and_of_equals_the_first() -> None:
    far, near = replaced(WORDS, 3, 30), replaced(WORDS, 3)
    assert [m and m.line for m in held_out(far, near, near).matches(fingerprints([WORDS]), [WORDS])] == [2]
    assert [m and m.line for m in held_out("x", WORDS, WORDS).matches(fingerprints([WORDS]), [WORDS])] == [2]


def test_nothing_is_held_out() -> None:
    assert held_out().matches(fingerprints([WORDS, ""]), [WORDS, ""]) == [None, None]
    assert held_out(WORDS).matches(fingerprints([]), []) == []


def test_the_near_threshold_of_held_out_texts_holds() -> None:
    text = replaced(WORDS, 5, 25)
    for threshold, count in ((similarity(WORDS, text), 1), (similarity(WORDS, text) + 1e-9, 0)):
        held = HeldOutIndex([HeldOutText("dev.jsonl", 1, WORDS)], threshold)
        assert sum(match is not None for match in held.matches(fingerprints([text]), [text])) == count
