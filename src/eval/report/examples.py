"""The answers behind the scores, read for the report: which changed most, how, and how long they are.

Both files of a split are read once and side by side, and only what is shown is kept: a report on a million answers
takes the memory of one on a hundred, but for a few numbers an answer.
"""

from __future__ import annotations

import heapq
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from src.utils.secrets import redact

MOST_SHOWN = 6  # examples of a split, in either direction
LONGEST_TEXT = 1200  # characters of a prompt or an answer
LONGEST_DIFFERENCE = 400  # words: difflib's time grows with their square
IN_COMMON = 0.2  # below this similarity, marking word by word tells nothing

Row = Mapping[str, Any]


class Word(NamedTuple):
    """A stretch of an answer held against its reference: `same`, `extra` in it, or `missing` from it."""

    kind: str
    text: str


class Answer(NamedTuple):
    score: float | None
    words: list[Word]
    note: str  # what is said beside it: how long it is, where it was cut


class Example(NamedTuple):
    """`number` counts the rows of the split from 1; `base` is None where its answers are not at hand."""

    number: int
    prompt: str
    reference: str
    base: Answer | None
    tuned: Answer
    change: float


class Lengths(NamedTuple):
    """Lengths of one kind of text, in `unit`, and how its answers ended (counts of `end`, `length`, `stop`)."""

    name: str
    kind: str
    values: list[int]
    ended: Counter[str]


class Split(NamedTuple):
    """What is told of the answers to a split. `better`, `same`, `worse` count the examples by `metric`."""

    name: str
    metric: str
    compared: bool
    better: int
    same: int
    worse: int
    ups: list[Example]
    downs: list[Example]
    prompts: list[int]
    unit: str
    lengths: list[Lengths]

    @property
    def examples(self) -> int:
        return self.better + self.same + self.worse


def read_split(name: str, tuned: Path, base: Path | None, metric: str, lower_is_better: bool) -> Split | None:
    """Read a split's answers; None where there are none that can be read.

    `metric` orders the examples; where the answers were not scored by it, the first that they have does. Without
    `base`, the examples are those with the highest and the lowest scores.
    """
    first = next(_rows(tuned), None)
    if first is None or not isinstance(first.get("scores"), Mapping) or not first["scores"]:
        return None
    metric = metric if metric in first["scores"] else next(iter(first["scores"]))
    sign = -1 if lower_is_better else 1
    changes, prompts = _Changes(), list[int]()
    texts: dict[str, list[tuple[int | None, int]]] = {"reference": [], "base": [], "tuned": []}
    ended = {"base": Counter[str](), "tuned": Counter[str]()}
    for number, (ours, theirs) in enumerate(zip_longest(_rows(tuned), _rows(base)), start=1):
        if ours is None:
            break
        if theirs is not None and theirs.get("prompt") != ours.get("prompt"):
            theirs = None  # another file than it says: nothing is compared with it
        if "prompt_tokens" in ours:
            prompts.append(int(ours["prompt_tokens"]))
        texts["reference"].append((ours.get("reference_tokens"), _words(ours.get("reference"))))
        for key, row in (("tuned", ours), ("base", theirs)):
            if row is not None:
                texts[key].append((row.get("tokens"), _words(row.get("prediction"))))
                ended[key][str(row.get("stop", ""))] += 1
        if base is None or theirs is not None:
            changes.add(number, ours, theirs, metric, sign)
    unit, lengths = _lengths(texts, ended)
    compared = base is not None and changes.count > 0
    return Split(
        name, metric, compared, changes.better, changes.same, changes.worse,
        [_example(*kept) for kept in changes.ups()], [_example(*kept) for kept in changes.downs()],
        prompts, unit, lengths,
    )  # fmt: skip


def _rows(path: Path | None) -> Iterator[Row]:
    """The rows of a file of answers, up to a line that is none."""
    if path is None or not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                return
            if not isinstance(row, dict):
                return
            yield row


class _Changes:
    """Counts every example, and keeps those that changed most in either direction."""

    def __init__(self) -> None:
        self.better = self.same = self.worse = 0
        self._up: list[tuple[float, int, Any]] = []
        self._down: list[tuple[float, int, Any]] = []

    @property
    def count(self) -> int:
        return self.better + self.same + self.worse

    def add(self, number: int, ours: Row, theirs: Row | None, metric: str, sign: int) -> None:
        """`change` is above 0 where the tuned model is better, whichever way the metric goes."""
        mine, other = _score(ours, metric), _score(theirs, metric) if theirs is not None else 0.0
        if mine is None or other is None:
            return
        change = sign * (mine - other)
        self.better += change > 1e-9
        self.worse += change < -1e-9
        self.same += abs(change) <= 1e-9
        kept = (number, ours, theirs, metric, mine - other)
        for heap, size in ((self._up, change), (self._down, -change)):
            if size > 1e-9 or theirs is None:
                heapq.heappush(heap, (size, -number, kept))
                if len(heap) > MOST_SHOWN:
                    heapq.heappop(heap)

    def ups(self) -> list[Any]:
        return [kept for _, _, kept in sorted(self._up, reverse=True)]

    def downs(self) -> list[Any]:
        return [kept for _, _, kept in sorted(self._down, reverse=True)]


def _score(row: Row, metric: str) -> float | None:
    value = (row.get("scores") or {}).get(metric)
    return float(value) if isinstance(value, int | float) and value == value else None


def _example(number: int, ours: Row, theirs: Row | None, metric: str, change: float) -> Example:
    ours, theirs = redact(ours), redact(theirs)
    reference = str(ours.get("reference", ""))
    return Example(
        number,
        clipped(str(ours.get("prompt", ""))),
        clipped(reference),
        _answer(theirs, reference, metric) if theirs is not None else None,
        _answer(ours, reference, metric),
        change,
    )


def _answer(row: Row, reference: str, metric: str) -> Answer:
    notes = []
    if "tokens" in row:
        notes.append(f"{row['tokens']} tokens" + (", cut off there" if row.get("stop") == "length" else ""))
    if "probability" in row:
        notes.append(f"probability {row['probability']:.2f}")
    text = str(row.get("prediction", ""))
    return Answer(_score(row, metric), differences(clipped(reference), clipped(text)), ", ".join(notes))


def clipped(text: str) -> str:
    """The text up to LONGEST_TEXT characters, and how many are left out."""
    rest = len(text) - LONGEST_TEXT
    return text if rest <= 0 else f"{text[:LONGEST_TEXT]} … and {rest:,} more characters"


def differences(reference: str, answer: str) -> list[Word]:
    """The answer word by word, held against the reference (difflib's Ratcliff-Obershelp matching).

    A word takes the white space after it along, which does not count. Where both have next to nothing in common,
    or are too long, the answer is one stretch of `other`.
    """
    a, b = (re.findall(r"\w+\s*|[^\w\s]\s*|\s+", text) for text in (reference, answer))
    if not b:
        return []
    if len(a) > LONGEST_DIFFERENCE or len(b) > LONGEST_DIFFERENCE:
        return [Word("other", answer)]
    matcher = SequenceMatcher(None, [w.strip() for w in a], [w.strip() for w in b], autojunk=False)
    if matcher.ratio() < IN_COMMON:
        return [Word("other", answer)]
    found: list[Word] = []
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        missing, there = "".join(a[a1:a2]), "".join(b[b1:b2])
        if missing and a1 and a[a1 - 1][-1].isspace() and found and not found[-1].text[-1].isspace():
            found.append(Word("same", " "))  # the space before it went with a word that the answer ends with
        if kind == "equal":
            found.append(Word("same", there))
            continue
        if missing:
            found.append(Word("missing", missing))
        if there:
            found.append(Word("extra", there))
    return found


def _words(text: object) -> int:
    return len(str(text or "").split())


def _lengths(
    texts: Mapping[str, list[tuple[int | None, int]]], ended: Mapping[str, Counter[str]]
) -> tuple[str, list[Lengths]]:
    """All in one unit: tokens where those of every text are known, words otherwise."""
    known = {key: rows for key, rows in texts.items() if rows}
    in_tokens = all(tokens is not None for rows in known.values() for tokens, _ in rows)
    names = {"reference": "reference", "base": "base model", "tuned": "tuned model"}
    found: list[Lengths] = []
    for key, rows in known.items():
        values = [int(tokens or 0) if in_tokens else words for tokens, words in rows]
        found.append(Lengths(names[key], key, values, ended.get(key, Counter())))
    return ("tokens" if in_tokens else "words"), found
