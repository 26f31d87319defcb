"""Contamination: training rows that occur in the evaluation files, which would inflate scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..utils.files import sha256
from ..utils.logs import log
from ..utils.units import count
from .detect import options_of
from .duplicates import (
    BANDS,
    FINGERPRINT,
    KINDS,
    MAX_COMPARED,
    THRESHOLD,
    Fingerprints,
    Kind,
    Rows,
    fingerprints,
    jaccard,
    normalise,
    shingles_of,
)
from .eval_rows import AS_WRITTEN, Reading, evaluation_translation, parse_evaluation_row
from .formats import TEXT, Message, RowError
from .readers import read_values

Fingerprint = np.void  # of duplicates.FINGERPRINT


class HeldOutMatch(NamedTuple):
    file: str
    line: int
    kind: Kind
    similarity: float  # 1.0 unless near


class HeldOutText(NamedTuple):
    file: str
    line: int
    text: str


def exchanges(turns: Sequence[Message]) -> list[tuple[str, str]]:
    """`(request, answer)` of each answered request. A document counts as a request without an answer."""
    if turns[0]["role"] == TEXT:
        return [(turns[0]["content"], "")]
    pairs = pairwise(turns)
    return [(a["content"], b["content"]) for a, b in pairs if a["role"] == "user" and b["role"] == "assistant"]


def request_text(turns: Sequence[Message]) -> str:
    """What is asked by a conversation before its last answer: its user turns, or a document."""
    return "\n".join(turn["content"] for turn in turns if turn["role"] in ("user", TEXT))


def requests_of(turns: Sequence[Message], *, several: bool) -> list[tuple[str, str]]:
    """`exchanges` and, where `several` is set, each answer with all requests before it."""
    found = exchanges(turns)
    if not several or len(found) < 2:
        return found
    ends = [end for end in range(2, len(turns)) if turns[end - 1]["role"] == "user"]
    return found + [(request_text(turns[:end]), turns[end]["content"]) for end in ends[1:]]


def exchange_text(request: str, answer: str) -> str:
    return f"{request}\n{answer}" if answer else request


class HeldOutRows:
    """Rows that are evaluated, with which training rows are compared.

    A training row matches if one of its requests equals the request of an evaluation row, exactly or normalised,
    or if a request and its answer together are near those of an evaluation row. The request of an evaluation row
    with several is all of them.

    Args:
        rows: file, line and messages of each.
        dedup_threshold: least Jaccard similarity of near duplicates, 0 to 1.
    """

    def __init__(self, rows: Iterable[tuple[str, int, Sequence[Message]]], dedup_threshold: float) -> None:
        self._requests: dict[str, tuple[str, int, str]] = {}
        self._several = False
        pairs = []
        for file, line, turns in rows:
            request = request_text(turns)
            self._several |= sum(turn["role"] == "user" for turn in turns) > 1
            for key in (normalise(request), request):
                self._requests.setdefault(key, (file, line, request))
            pairs.append(HeldOutText(file, line, exchange_text(request, turns[-1]["content"])))
        self._pairs = HeldOutIndex(pairs, dedup_threshold) if pairs else None

    def matches(
        self, conversations: Sequence[Sequence[Message]], known: Mapping[str, Fingerprint]
    ) -> list[HeldOutMatch | None]:
        """For each conversation the evaluation row that it matches, by the strongest match of its exchanges.

        Args:
            known: fingerprints that were computed before, by text.
        """
        if not self._pairs:
            return [None] * len(conversations)
        pairs = [
            (i, *pair)
            for i, turns in enumerate(conversations)
            for pair in requests_of(turns, several=self._several)
        ]
        texts = [exchange_text(request, answer) for _, request, answer in pairs]
        unknown = [text for text in texts if text not in known]
        prints = {**known, **dict(zip(unknown, fingerprints(unknown), strict=True))}
        near = self._pairs.matches(np.array([prints[text] for text in texts], FINGERPRINT), texts)
        best: list[HeldOutMatch | None] = [None] * len(conversations)
        for (i, request, _), close in zip(pairs, near, strict=True):
            match, before = self._same_request(request) or close, best[i]
            if match and (before is None or _strength(match) > _strength(before)):
                best[i] = match
        return best

    def _same_request(self, request: str) -> HeldOutMatch | None:
        """The evaluation row with this request."""
        place = self._requests.get(request) or self._requests.get(normalise(request))
        return (
            HeldOutMatch(place[0], place[1], "exact" if place[2] == request else "normalised", 1.0)
            if place
            else None
        )


def _strength(match: HeldOutMatch) -> tuple[int, float]:
    return -KINDS.index(match.kind), match.similarity


class EvaluationRows(HeldOutRows):
    """The rows of the evaluation files, as an evaluation with `reading` reads them.

    identity: the path and the hash of each file, and how it is read.
    unreadable: how many rows of a file cannot be read, where there are any: no training row is compared with them.
    """

    def __init__(self, files: Sequence[Path], dedup_threshold: float, reading: Reading = AS_WRITTEN) -> None:
        self.identity = [[str(file), sha256(file), reading.identity] for file in files]
        self.unreadable: dict[str, int] = {}
        super().__init__((row for file in files for row in self._read(file, reading)), dedup_threshold)

    def _read(self, file: Path, reading: Reading) -> Iterator[tuple[str, int, list[Message]]]:
        translate = evaluation_translation(reading.columns)
        example: RowError | None = None
        for line, value in read_values(file, options_of(reading.columns)):
            try:
                yield str(file), line, parse_evaluation_row(value, reading, translate).messages
            except RowError as error:
                example = example or RowError(error.reason, f"line {line} {error.detail}")
                self.unreadable[str(file)] = self.unreadable.get(str(file), 0) + 1
        if example:
            fact = f"{count(self.unreadable[str(file)], 'row')} cannot be read"
            log.warning("%s: %s, and no training row was compared with it: %s", file, fact, example)


class HeldOutIndex:
    """An index of held-out texts (up to some hundred thousand) that finds the one that a text duplicates.

    Args:
        texts: each with its file and line; of equal texts the first is reported.
        threshold: least Jaccard similarity of near duplicates, 0 to 1.
    """

    def __init__(self, texts: Sequence[HeldOutText], threshold: float = THRESHOLD) -> None:
        self._texts, self._threshold = texts, threshold
        found = fingerprints([text.text for text in texts])
        numbers = range(len(texts) - 1, -1, -1)  # reversed, so that the first of equal texts stays
        self._exact = {int(found["exact"][number]): number for number in numbers}
        self._normalised = {int(found["normalised"][number]): number for number in numbers}
        owners = np.array(sorted(self._normalised.values()), np.int64)
        keys = found["bands"][owners]
        owners, keys = np.repeat(owners, BANDS)[keys.ravel() != 0], keys.ravel()[keys.ravel() != 0]
        order = np.argsort(keys, kind="stable")
        self._keys, self._owners = keys[order], owners[order]

    def matches(self, found: Fingerprints, texts: Sequence[str]) -> list[HeldOutMatch | None]:
        """For each text, with its fingerprint in `found`, the held-out text that it duplicates.

        The strongest kind wins, then the highest similarity, then the first text. MAX_COMPARED of the held-out
        texts that share a bucket are compared.
        """
        bands = np.ascontiguousarray(found["bands"])
        starts = np.searchsorted(self._keys, bands)
        ends = np.minimum(np.searchsorted(self._keys, bands, side="right"), starts + MAX_COMPARED)
        result: list[HeldOutMatch | None] = []
        for row, text in enumerate(texts):
            if (number := self._exact.get(int(found["exact"][row]))) is not None:
                result.append(self._match(number, "exact", 1.0))
            elif (number := self._normalised.get(int(found["normalised"][row]))) is not None:
                result.append(self._match(number, "normalised", 1.0))
            else:
                result.append(
                    self._nearest(starts[row], ends[row], text) if any(ends[row] > starts[row]) else None
                )
        return result

    def _nearest(self, starts: Rows, ends: Rows, text: str) -> HeldOutMatch | None:
        numbers = {int(n) for start, end in zip(starts, ends, strict=True) for n in self._owners[start:end]}
        if not numbers:
            return None
        shingles = shingles_of(text)
        scores = [(jaccard(shingles, shingles_of(self._texts[number].text)), -number) for number in numbers]
        score, number = max(scores)
        return self._match(-number, "near", score) if score >= self._threshold else None

    def _match(self, number: int, kind: Kind, score: float) -> HeldOutMatch:
        return HeldOutMatch(self._texts[number].file, self._texts[number].line, kind, score)
