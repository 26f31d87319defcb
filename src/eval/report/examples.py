"""The predictions behind the scores, for the report: the largest changes, word by word, and the lengths.

The files of base and tuned model are read once, in parallel, and only what is shown is kept in memory, with a few
numbers per prediction.
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

from ...utils.secrets import redact_secrets

MAX_SHOWN = 6  # examples of a split, in either direction
MAX_TEXT = 1200  # characters of a prompt or a prediction
MAX_DIFF_WORDS = 400  # the time of difflib grows with their square
MIN_SIMILARITY = 0.2  # below it, a word-by-word comparison says nothing

Row = Mapping[str, Any]


class DiffSpan(NamedTuple):
    """Part of a prediction against its reference: `same`, `extra`, `missing`, or `other` if not compared."""

    kind: str
    text: str


class PredictionView(NamedTuple):
    """`note`: its length and whether it was cut, or its probability."""

    score: float | None
    spans: list[DiffSpan]
    note: str


class ExampleView(NamedTuple):
    """`number` is the row of the split, from 1; `base` is None if the base model's predictions are not stored."""

    number: int
    prompt: str
    reference: str
    base: PredictionView | None
    tuned: PredictionView
    change: float


class LengthStats(NamedTuple):
    """Lengths of one kind of text, and how its generations ended (counts of `end`, `length`, `stop`)."""

    name: str
    kind: str
    values: list[int]
    ended: Counter[str]


class SplitView(NamedTuple):
    """The predictions on a split. `better`, `same`, `worse` count examples by `metric`; lengths are in `unit`."""

    name: str
    metric: str
    compared: bool
    better: int
    same: int
    worse: int
    ups: list[ExampleView]
    downs: list[ExampleView]
    prompts: list[int]
    unit: str
    lengths: list[LengthStats]

    @property
    def examples(self) -> int:
        return self.better + self.same + self.worse


def read_split(name: str, tuned: Path, base: Path | None, metric: str, lower_is_better: bool) -> SplitView | None:
    """Read the predictions on a split from the files `tuned` and `base`; None if `tuned` has no readable scores.

    Args:
        metric: orders the examples; if the predictions have no such score, their first score does.
        base: if None, the examples are those with the highest and the lowest scores.
    """
    first = next(_rows(tuned), None)
    if first is None or not isinstance(first.get("scores"), Mapping) or not first["scores"]:
        return None
    metric = metric if metric in first["scores"] else next(iter(first["scores"]))
    sign = -1 if lower_is_better else 1
    changes, prompts = _LargestChanges(), list[int]()
    texts: dict[str, list[tuple[int | None, int]]] = {"reference": [], "base": [], "tuned": []}
    ended = {"base": Counter[str](), "tuned": Counter[str]()}
    for number, (row, base_row) in enumerate(zip_longest(_rows(tuned), _rows(base)), start=1):
        if row is None:
            break
        if base_row is not None and base_row.get("prompt") != row.get("prompt"):
            base_row = None  # not the same requests: not compared
        if "prompt_tokens" in row:
            prompts.append(int(row["prompt_tokens"]))
        texts["reference"].append((row.get("reference_tokens"), _count_words(row.get("reference"))))
        for key, found in (("tuned", row), ("base", base_row)):
            if found is not None:
                texts[key].append((found.get("tokens"), _count_words(found.get("prediction"))))
                ended[key][str(found.get("stop", ""))] += 1
        if base is None or base_row is not None:
            changes.add(number, row, base_row, metric, sign)
    unit, lengths = _lengths(texts, ended)
    compared = base is not None and changes.count > 0
    return SplitView(
        name, metric, compared, changes.better, changes.same, changes.worse,
        [_example(*kept) for kept in changes.ups()], [_example(*kept) for kept in changes.downs()],
        prompts, unit, lengths,
    )  # fmt: skip


def _rows(path: Path | None) -> Iterator[Row]:
    """The rows of a predictions file, up to the first line that cannot be read."""
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


class _LargestChanges:
    """Counts every example, and keeps those with the largest changes in either direction."""

    def __init__(self) -> None:
        self.better = self.same = self.worse = 0
        self._up: list[tuple[float, int, Any]] = []
        self._down: list[tuple[float, int, Any]] = []

    @property
    def count(self) -> int:
        return self.better + self.same + self.worse

    def add(self, number: int, row: Row, base_row: Row | None, metric: str, sign: int) -> None:
        """Compare the scores of one example; `sign` is -1 if lower values of the metric are better."""
        tuned, base = _score(row, metric), _score(base_row, metric) if base_row is not None else 0.0
        if tuned is None or base is None:
            return
        change = sign * (tuned - base)
        self.better += change > 1e-9
        self.worse += change < -1e-9
        self.same += abs(change) <= 1e-9
        kept = (number, row, base_row, metric, tuned - base)
        for heap, size in ((self._up, change), (self._down, -change)):
            if size > 1e-9 or base_row is None:
                heapq.heappush(heap, (size, -number, kept))
                if len(heap) > MAX_SHOWN:
                    heapq.heappop(heap)

    def ups(self) -> list[Any]:
        return [kept for _, _, kept in sorted(self._up, reverse=True)]

    def downs(self) -> list[Any]:
        return [kept for _, _, kept in sorted(self._down, reverse=True)]


def _score(row: Row, metric: str) -> float | None:
    value = (row.get("scores") or {}).get(metric)
    return float(value) if isinstance(value, int | float) and value == value else None


def _example(number: int, row: Row, base_row: Row | None, metric: str, change: float) -> ExampleView:
    row, base_row = redact_secrets(row), redact_secrets(base_row)
    reference = str(row.get("reference", ""))
    return ExampleView(
        number,
        truncate(str(row.get("prompt", ""))),
        truncate(reference),
        _prediction(base_row, reference, metric) if base_row is not None else None,
        _prediction(row, reference, metric),
        change,
    )


def _prediction(row: Row, reference: str, metric: str) -> PredictionView:
    notes = []
    if "tokens" in row:
        notes.append(f"{row['tokens']} tokens" + (", cut off" if row.get("stop") == "length" else ""))
    if "probability" in row:
        notes.append(f"probability {row['probability']:.2f}")
    text = str(row.get("prediction", ""))
    return PredictionView(_score(row, metric), word_diff(truncate(reference), truncate(text)), ", ".join(notes))


def truncate(text: str) -> str:
    """The first MAX_TEXT characters, and how many more there are."""
    rest = len(text) - MAX_TEXT
    return text if rest <= 0 else f"{text[:MAX_TEXT]} … and {rest:,} more characters"


def word_diff(reference: str, prediction: str) -> list[DiffSpan]:
    """Compare prediction and reference word by word (difflib's Ratcliff-Obershelp matching).

    White space belongs to the word before it, and is not compared. If the texts are too long or their similarity
    is below MIN_SIMILARITY, the prediction is one `other` span.
    """
    a, b = (re.findall(r"\w+\s*|[^\w\s]\s*|\s+", text) for text in (reference, prediction))
    if not b:
        return []
    if len(a) > MAX_DIFF_WORDS or len(b) > MAX_DIFF_WORDS:
        return [DiffSpan("other", prediction)]
    matcher = SequenceMatcher(None, [w.strip() for w in a], [w.strip() for w in b], autojunk=False)
    if matcher.ratio() < MIN_SIMILARITY:
        return [DiffSpan("other", prediction)]
    found: list[DiffSpan] = []
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        missing, present = "".join(a[a1:a2]), "".join(b[b1:b2])
        if missing and a1 and a[a1 - 1][-1].isspace() and found and not found[-1].text[-1].isspace():
            found.append(DiffSpan("same", " "))  # its leading space belonged to the last word of the prediction
        if kind == "equal":
            found.append(DiffSpan("same", present))
            continue
        if missing:
            found.append(DiffSpan("missing", missing))
        if present:
            found.append(DiffSpan("extra", present))
    return found


def _count_words(text: object) -> int:
    return len(str(text or "").split())


def _lengths(
    texts: Mapping[str, list[tuple[int | None, int]]], ended: Mapping[str, Counter[str]]
) -> tuple[str, list[LengthStats]]:
    """`(unit, lengths)`: in tokens if the token count of every text is known, else in words."""
    present = {key: rows for key, rows in texts.items() if rows}
    in_tokens = all(tokens is not None for rows in present.values() for tokens, _ in rows)
    names = {"reference": "reference", "base": "base model", "tuned": "tuned model"}
    found: list[LengthStats] = []
    for key, rows in present.items():
        values = [int(tokens or 0) if in_tokens else words for tokens, words in rows]
        found.append(LengthStats(names[key], key, values, ended.get(key, Counter())))
    return ("tokens" if in_tokens else "words"), found
