"""Recall and false positives of src/data/duplicates.py, its speed and memory: `python bench/duplicates.py`.

A seeded corpus with known truth: sentences over a Zipf vocabulary and the demo's own requests, 20 to 200 words
a row, with planted copies, variants, near duplicates spread evenly over similarities 0.8 to 1, hard negatives
(0.5 to 0.75) and unrelated rows. `--rows 1000000` also measures a spool of that many rows.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.data.contamination import HeldOutIndex, HeldOutText  # noqa: E402
from src.data.duplicates import (  # noqa: E402
    FingerprintSpool,
    fingerprints,
    similarity,
)

LETTERS = "etaoinshrdlcumwfgypbvk"
KINDS = ("exact", "normalised", "near", "hard negative", "unrelated")


class Planted(NamedTuple):
    text: str
    origin: str
    kind: str  # one of KINDS


class Writer:
    """Writes random text: words by Zipf's law, in sentences of 6 to 18 words."""

    def __init__(self, seed: int, vocabulary: int = 20_000) -> None:
        self.random = random.Random(seed)
        self.vocabulary = sorted({self._word() for _ in range(vocabulary)}, key=len)
        self._weights = list(accumulate(1 / rank for rank in range(1, len(self.vocabulary) + 1)))

    def _word(self) -> str:
        return "".join(self.random.choices(LETTERS, k=self.random.randint(2, 9)))

    def words(self, count: int) -> list[str]:
        return self.random.choices(self.vocabulary, cum_weights=self._weights, k=count)

    def text(self) -> str:
        count, sentences = self.random.randint(20, 200), []
        while count > 0:
            sentences.append(" ".join(self.words(min(count, self.random.randint(6, 18)))).capitalize())
            count -= 18
        return self.join(sentences)

    def join(self, sentences: list[str]) -> str:
        return ". ".join(sentences) + self.random.choice(".?!")

    def change_word(self, text: str) -> str:
        """`text` with one word replaced, added or left out."""
        words = text.split(" ")
        place, change = self.random.randrange(len(words)), self.random.randrange(3)
        words[place : place + (change != 1)] = self.words(1) if change < 2 else []
        return " ".join(words)

    def like(self, text: str, least: float, most: float) -> str:
        """A variant of `text` whose similarity is drawn evenly from `least` to `most`."""
        while True:
            wanted, variant, found = self.random.uniform(least, most), text, 1.0
            while found > wanted:
                previous, variant = variant, self.change_word(variant)
                found = similarity(text, variant)
            for candidate in (variant, previous):
                if candidate != text and least <= similarity(text, candidate) <= most:
                    return candidate

    def normalised(self, text: str) -> str:
        changes: list[Callable[[str], str]] = [
            str.upper,
            lambda text: text.replace(" ", "  ").replace(". ", ".\n"),
            lambda text: text.replace(". ", " "),
            lambda text: text.rstrip(".?!") + " \t",
            lambda text: "".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in text),
            lambda text: unicodedata.normalize("NFD", text).replace(" ", "\u00a0"),
            lambda text: f"\ufeff{text}".replace(". ", "... "),
        ]
        while (variant := self.random.choice(changes)(text)) == text:
            pass
        return variant


def demo_texts() -> list[str]:
    """The demo's training rows, several joined to 40 words or more, none used twice."""
    rows = [json.loads(line)["messages"] for line in (ROOT / "data" / "ingot.jsonl").open(encoding="utf-8")]
    turns = [" ".join(turn["content"] for turn in row) for row in rows]
    return ["\n".join(turns[start : start + 3]) for start in range(0, len(turns) - 2, 3)]


def corpus(seed: int, rows: int) -> Iterator[Planted]:
    """`rows` of each kind, after the texts that they vary; some of these are of the demo."""
    writer = Writer(seed)
    demo = demo_texts()
    writer.random.shuffle(demo)
    origins = (demo[: rows // 5] + [writer.text() for _ in range(rows * 4)])[: rows * 4]
    writer.random.shuffle(origins)
    yield from (Planted(origin, "", "unrelated") for origin in origins)
    variants: list[Callable[[str], str]] = [
        str,
        writer.normalised,
        lambda text: writer.like(text, 0.8, 0.999),
        lambda text: writer.like(text, 0.5, 0.75),
    ]
    planted = [
        Planted(variant(origin), origin, kind)
        for number, (kind, variant) in enumerate(zip(KINDS, variants, strict=False))
        for origin in origins[number * rows : (number + 1) * rows]
    ]
    planted += [Planted(writer.text(), "", "unrelated") for _ in range(rows)]
    writer.random.shuffle(planted)
    yield from planted


def duplicate_kinds(planted: list[Planted]) -> Iterator[tuple[Planted, str]]:
    """Each row of a corpus, and the kind found if it names the right earlier row."""
    texts = [row.text for row in planted]
    with FingerprintSpool() as spool:
        spool.add(fingerprints(texts))
        found = {duplicate.row: duplicate for duplicate in spool.duplicates(texts.__getitem__)}
    for number, row in enumerate(planted):
        right = number in found and row.origin in ("", texts[found[number].earlier])
        yield row, found[number].kind if right else "wrong row" if number in found else ""


def contamination_kinds(planted: list[Planted]) -> Iterator[tuple[Planted, str]]:
    """Each row that is not an origin, and the kind found if it names the right held-out text."""
    origins = [row.text for row in planted if not row.origin][: 4 * len(planted) // 9]
    rows = planted[len(origins) :]
    held_out = HeldOutIndex([HeldOutText("held_out", number, text) for number, text in enumerate(origins)])
    found = held_out.matches(fingerprints([row.text for row in rows]), [row.text for row in rows])
    for row, match in zip(rows, found, strict=True):
        right = match is not None and row.origin in ("", origins[match.line])
        yield row, match.kind if match and right else "wrong row" if match else ""


def rates(found: Iterator[tuple[Planted, str]]) -> dict[str, tuple[int, int]]:
    """Per planted kind: rows found as that kind (as any, where there is nothing to find), and all rows."""
    rows, hits = Counter[str](), Counter[str]()
    for row, kind in found:
        rows[row.kind] += 1
        hits[row.kind] += kind == row.kind if row.kind in KINDS[:3] else kind != ""
    return {kind: (hits[kind], rows[kind]) for kind in KINDS}


def show(title: str, found: dict[str, tuple[int, int]]) -> None:
    print(title)
    for kind, (hits, rows) in found.items():
        print(
            f"  {kind:<14} {'recall' if kind in KINDS[:3] else 'false positives':<16} {hits / rows:8.3%} of {rows}"
        )


def memory_mb() -> float:
    """Peak resident memory of this process, in MiB (Linux gives KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def speed(rows: int, seed: int) -> None:
    """Fingerprints of `rows` rows of 60 words, of which one in twenty is a near duplicate."""
    writer, batch = Writer(seed), 2_000
    pool = [" ".join(writer.words(60)) for _ in range(20_000)]
    base = memory_mb()

    def text_of(row: int) -> str:
        """One in twenty repeats its neighbour but for one word, without storing any text."""
        number = row - (row % 20 == 19)
        words = pool[number % len(pool)].split(" ")
        shift = number // len(pool)
        words = [f"{word}{shift}" for word in words] if shift else words
        return " ".join([*words[:-1], "other"] if number != row else words)

    seconds = 0.0
    with FingerprintSpool() as spool:
        for start in range(0, rows, batch):
            texts = [text_of(row) for row in range(start, min(start + batch, rows))]
            began = time.perf_counter()
            spool.add(fingerprints(texts))
            seconds += time.perf_counter() - began
        print(f"{rows} fingerprints: {rows / seconds:,.0f} rows/s, {seconds / rows * 1e6:.1f} us a row")
        began = time.perf_counter()
        found = sum(1 for _ in spool.duplicates(text_of))
        print(f"duplicates: {found} found in {time.perf_counter() - began:.1f} s; {rows // 20} planted")
    print(f"peak memory: {memory_mb() - base:.0f} MiB above the {base:.0f} MiB before")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--planted", type=int, default=1_000, help="rows of each kind")
    parser.add_argument("--rows", type=int, default=0, help="rows of the speed and memory measurement")
    options = parser.parse_args()
    planted_rows = list(corpus(options.seed, options.planted))
    show("duplicates", rates(duplicate_kinds(planted_rows)))
    show("contamination", rates(contamination_kinds(planted_rows)))
    if options.rows:
        speed(options.rows, options.seed)
