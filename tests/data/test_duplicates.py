"""Duplicates: normalisation, the order of kinds, near duplicates by true similarity."""

from __future__ import annotations

import doctest
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bench import duplicates as bench
from src.data import duplicates
from src.data.contamination import HeldOutIndex, HeldOutText
from src.data.duplicates import (
    FEWEST_WORDS,
    MAX_COMPARED,
    Duplicate,
    FingerprintSpool,
    fingerprints,
    normalise,
    similarity,
)

ROOT = Path(__file__).resolve().parents[2]
LONG = " ".join(f"word{number}" for number in range(40))


def found_in(texts: Sequence[str], threshold: float = 0.8) -> list[Duplicate]:
    with FingerprintSpool() as spool:
        spool.add(fingerprints(texts))
        return list(spool.duplicates(texts.__getitem__, threshold))


def replaced(text: str, *places: int, by: str = "other") -> str:
    words = text.split()
    for place in places:
        words[place] = f"{by}{place}"
    return " ".join(words)


# Normalising


def test_the_docstring_examples_are_true() -> None:
    result = doctest.testmod(duplicates)
    assert (result.failed, result.attempted > 0) == (0, True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Yes!", "yes"),
        ("2+2?", "2+2"),
        ("Stop, he said; \u201cnow\u201d.", "stop he said \"NOW\""),
        ("A\u00a0 b\r\n\tc ", "a b c"),
        ("Cafe\u0301 stra\u00dfe", "CAF\u00c9 STRASSE"),
        ("\uff11\uff12\uff13 \uff21\uff22\uff23\uff01 \ufb01ne", "123 abc fine"),
        ("\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u4f60\u597d \u4e16\u754c"),
        ("\ufeffsoft\u00adhyphen", "softhyphen"),
        ("\u00bfQu\u00e9 hora es?", "qu\u00e9 hora es"),
        ("x\u2212y \u2014 z", "x-y - z"),
        ("x\u00b2 + y\u2081", "X^2 + y_1"),
        ("Wait\u2026", "wait"),
    ],
)  # fmt: skip
def test_form_is_folded(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a+b", "a-b"),
        ("a + b", "a * b"),
        ("a/b", "a%b"),
        ("3.14", "314"),
        ("1,5", "15"),
        ("1, 2", "12"),
        ("10\u00b2", "102"),
        ("1\u00bd", "11/2"),
        ("1\u2460", "11"),
        ("log\u2082 8", "log2 8"),
        ("5!", "5"),
        ("n!", "n"),
        ("(1,)", "(1)"),
        ("a ? b : c", "a b c"),
        ("f . g", "f g"),
        ("f(x)", "f[x]"),
        ("???", "!!!"),
        (":)", ":("),
        ("...", ""),
        ("<", ">"),
        ("\u2192", "\u2190"),
        ("snake_case", "snakecase"),
        ("\u4f60\u597d", "\u4f60\u574f"),
        ("ab", "a b"),
    ],
)
def test_texts_of_different_meaning_stay_different(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


# Kinds


def test_each_row_is_reported_once_by_its_strongest_kind_and_of_that_the_earliest() -> None:
    near = replaced(LONG, 5)
    rows = [LONG, near, LONG.upper(), LONG.upper(), near, LONG, near.title()]
    assert found_in(rows) == [
        Duplicate(1, 0, "near", similarity(LONG, near)),
        Duplicate(2, 0, "normalised", 1.0),
        Duplicate(3, 2, "exact", 1.0),
        Duplicate(4, 1, "exact", 1.0),
        Duplicate(5, 0, "exact", 1.0),
        Duplicate(6, 1, "normalised", 1.0),
    ]


def test_the_earliest_near_row_is_named_not_the_nearest() -> None:
    rows = [LONG, replaced(LONG, 3, 30), replaced(LONG, 3)]
    assert [(found.row, found.earlier) for found in found_in(rows)] == [(1, 0), (2, 0)]
    assert similarity(rows[2], rows[1]) == similarity(rows[2], rows[0])


def test_a_later_band_does_not_replace_the_earliest_row() -> None:
    rows = [LONG, replaced(LONG, 3, 30), replaced(LONG, 3)]
    found = fingerprints(rows)
    found["bands"][:, 0] = 1
    found["bands"][:, 1:] = [[1], [2], [2]]  # in which the first row is not
    with FingerprintSpool() as spool:
        spool.add(found)
        assert [(one.row, one.earlier) for one in spool.duplicates(rows.__getitem__)] == [(1, 0), (2, 0)]


def test_near_is_not_transitive() -> None:
    chain = [LONG, replaced(LONG, 0, 13, 26), replaced(LONG, 0, 6, 13, 19, 26, 32)]
    assert similarity(chain[0], chain[2]) < 0.8 <= min(similarity(*chain[:2]), similarity(*chain[1:]))
    assert [(found.row, found.earlier) for found in found_in(chain)] == [(1, 0), (2, 1)]


def test_three_words_of_forty_may_differ_and_five_may_not() -> None:
    assert len(found_in([LONG, replaced(LONG, 5, 15, 25)])) == 1
    assert found_in([LONG, replaced(LONG, 5, 12, 19, 26, 33)]) == []


def test_similarity_is_the_jaccard_index_of_shingles_with_words_twice() -> None:
    assert similarity("a b c", "a b d") == pytest.approx((2 * 2 + 1) / (2 * 4 + 3))
    assert similarity(LONG, replaced(LONG, 5, 15, 25)) == pytest.approx((3 * 40 - 1 - 12) / (3 * 40 - 1 + 12))
    assert similarity(LONG, " ".join(sorted(LONG.split(), reverse=True))) < 0.8
    assert similarity("", "") == 1.0 and similarity("", "a") == 0.0


def test_candidates_below_the_threshold_are_refused() -> None:
    rows = [LONG, replaced(LONG, 5, 25)]
    true = similarity(*rows)
    assert [found.similarity for found in found_in(rows, true)] == [true]
    assert found_in(rows, true + 1e-9) == []


# Texts of every sort


def test_short_texts_have_exact_and_normalised_duplicates_only() -> None:
    short = "sort the list of names"
    assert found_in([short, f"{short} twice", "yes", "Yes.", "yes", "2+2?", "2-2?"]) == [
        Duplicate(3, 2, "normalised", 1.0),
        Duplicate(4, 2, "exact", 1.0),
    ]
    nine, ten = (" ".join("abcdefghij"[:count]) for count in (FEWEST_WORDS - 1, FEWEST_WORDS))
    assert [(found.row, found.kind) for found in found_in([nine, ten, f"{ten} k"])] == [(2, "near")]


def test_one_slot_of_a_template_makes_a_different_question() -> None:
    rows = ["What is the top of feed rate?", "What is the top of kiln rate?"]
    assert similarity(*rows) < 0.8 and found_in(rows) == []


def test_empty_texts_and_symbols() -> None:
    assert found_in(["", " \n", "", "???", "!!!", "\U0001f600", "\U0001f600"]) == [
        Duplicate(1, 0, "normalised", 1.0),
        Duplicate(2, 0, "exact", 1.0),
        Duplicate(6, 5, "exact", 1.0),
    ]
    assert found_in([]) == []


def test_text_without_spaces_is_compared_letter_by_letter() -> None:
    text = "".join(chr(0x4E00 + 7 * number) for number in range(60))
    assert [found.kind for found in found_in([text, text[:30] + "\u9fa0" + text[31:], text[::-1]])] == ["near"]


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        fingerprints(["\ud800"])


def test_a_text_has_the_same_sketch_wherever_it_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [LONG, " ".join(f"w{number}" for number in range(5_000)), replaced(LONG, 1)]
    whole = fingerprints(texts)
    monkeypatch.setattr(duplicates, "PIECE", 100)
    assert np.array_equal(fingerprints(texts), whole)


def test_other_texts_do_not_change_a_fingerprint() -> None:
    texts = [replaced(LONG, number % 40, by=f"x{number}") for number in range(150)] + ["short", ""]
    together = fingerprints(texts)
    assert np.array_equal(np.concatenate([fingerprints([text]) for text in texts]), together)
    assert together["bands"][:150].all() and not together["bands"][150:].any()


# Processes


def test_fingerprints_are_the_same_in_every_process() -> None:
    texts = [LONG, "caf\u00e9", ""]
    code = f"from src.data.duplicates import fingerprints; print(fingerprints({texts}).tobytes().hex())"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert printed == {fingerprints(texts).tobytes().hex()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_works_after_its_parent_used_rensa() -> None:
    texts = [replaced(LONG, number % 40, by=f"x{number}") for number in range(600)]
    texts.append(" ".join(f"w{number}" for number in range(60_000)))
    fingerprints(texts)
    child = multiprocessing.get_context("fork").Process(target=fingerprints, args=(texts,))
    child.start()
    child.join(30)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads that the kernel knows")
def test_no_thread_is_started() -> None:
    code = (
        "import os; from src.data.duplicates import fingerprints; before = len(os.listdir('/proc/self/task'));"
        "fingerprints([' '.join(f'w{n}' for n in range(60_000))] + ['a b c d e f g h i j k'] * 2_000);"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0"


# Many rows


def test_the_spool_reads_back_what_was_added_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = [f"{number % 7} {LONG}" for number in range(50)]
    monkeypatch.setattr(duplicates, "READ_ROWS", 8)
    with FingerprintSpool(tmp_path) as spool:
        for start in range(0, 50, 11):
            spool.add(fingerprints(texts[start : start + 11]))
        assert len(spool) == 50
        assert list(spool.duplicates(texts.__getitem__)) == found_in(texts)
        assert list(spool.duplicates(texts.__getitem__)) == found_in(texts)


def test_a_bucket_of_many_rows_costs_a_few_comparisons_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share all bands and are near no other: the worst case."""
    found = fingerprints([LONG]).repeat(500)
    found["exact"] = found["normalised"] = np.arange(500)
    compared = 0

    def counted(one: object, other: object) -> float:
        nonlocal compared
        compared += 1
        return 0.0

    monkeypatch.setattr(duplicates, "jaccard", counted)
    with FingerprintSpool() as spool:
        spool.add(found)
        assert list(spool.duplicates(lambda row: f"{row} {LONG}")) == []
    assert compared <= duplicates.BANDS * MAX_COMPARED * 500


def test_a_bucket_of_many_copies_is_read_once_and_of_many_near_rows_named_by_the_first() -> None:
    copies = [LONG] * 5_000
    reads: list[int] = []
    with FingerprintSpool() as spool:
        spool.add(fingerprints(copies))
        assert len(list(spool.duplicates(lambda row: reads.append(row) or copies[row]))) == 4_999  # type: ignore[func-returns-value]
    assert reads == []
    near = [f"{LONG} {number}" for number in range(300)]
    assert [(found.row, found.earlier) for found in found_in(near)] == [(row, 0) for row in range(1, 300)]


def test_in_a_full_bucket_rows_unlike_the_first_are_found_too() -> None:
    """Two kinds of rows in one bucket, of which the first alone would fill it."""
    other = replaced(LONG, *range(0, 40, 2), by="second")
    rows = [f"{LONG} {number}" for number in range(30)] + [f"{other} {number}" for number in range(30)]
    found = fingerprints(rows)
    found["bands"] = found["bands"][0]
    with FingerprintSpool() as spool:
        spool.add(found)
        named = {duplicate.earlier for duplicate in spool.duplicates(rows.__getitem__)}
    assert named == {0, 30}


# Rates


@pytest.fixture(scope="module")
def planted() -> list[bench.Planted]:
    return list(bench.corpus(seed=11, rows=350))


@pytest.mark.parametrize("search", [bench.duplicate_kinds, bench.contamination_kinds])
def test_planted_duplicates_are_found_and_no_others(search: object, planted: list[bench.Planted]) -> None:
    assert callable(search)
    rates = {kind: hits / rows for kind, (hits, rows) in bench.rates(search(planted)).items()}
    assert rates["exact"] >= 0.99 and rates["normalised"] >= 0.99
    assert rates["near"] >= 0.90
    assert rates["hard negative"] <= 0.01 and rates["unrelated"] <= 0.01


def demo(name: str) -> list[str]:
    """The first request of each row of a demo file, with its answer."""
    rows = map(json.loads, (ROOT / "data" / name).read_text(encoding="utf-8").splitlines())
    return [
        "\n".join(turn["content"] for turn in row["messages"][:2])
        if "messages" in row
        else f"{row['prompt']}\n{row['completion']}"
        for row in rows
    ]


@pytest.mark.parametrize("part", [slice(None), slice(1)], ids=["with answers", "requests alone"])
def test_the_demo_loses_no_row(part: slice) -> None:
    training, evaluation = (
        ["\n".join(text.split("\n")[part]) for name in names for text in demo(name)]
        for names in (["ingot.jsonl"], ["eval/test.jsonl", "eval/dev.jsonl", "eval/adversarial.jsonl"])
    )
    assert found_in(training) == []
    held_out = HeldOutIndex([HeldOutText("eval", line, text) for line, text in enumerate(evaluation, 1)])
    assert held_out.matches(fingerprints(training), training) == [None] * len(training)
