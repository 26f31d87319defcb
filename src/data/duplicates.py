"""Rows that say the same as an earlier row, or as a held-out text: exactly, when normalised, or nearly.

A text is normalised, cut into shingles (words and pairs of neighbouring words), and sketched by MinHash
(Broder 1997, "On the resemblance and containment of documents"). Locality-sensitive hashing of the sketch in
bands (Indyk and Motwani 1998) names candidates, and the true Jaccard similarity of the shingles decides.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b, shake_128
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from src.data.similarity import Shingles, jaccard, normalise, shingles_of, words_of
from src.utils.workers import map_ordered

Kind = Literal["exact", "normalised", "near"]
Hashes = NDArray[np.uint64]
Rows = NDArray[np.int64]
Fingerprints = NDArray[np.void]  # of FINGERPRINT

THRESHOLD = 0.8  # Jaccard similarity from which a text is a near duplicate
BANDS, BAND_SIZE = 18, 7  # similarity s makes a candidate with probability 1-(1-s^7)^18: 0.99 at 0.8, 0.13 at 0.5
FEWEST_WORDS = 10  # of a text with near duplicates: of "sort the list" and "sort the list twice" both are wanted
MOST_COMPARED = 16  # rows of a bucket that each other row of it is compared with
SEED = 1
BLOCK = 64  # texts hashed at once, and
PIECE = 32_768  # shingles: rensa starts threads, which no fork survives, from 256 texts or 65,536 shingles on
READ_ROWS = 65_536

FINGERPRINT = np.dtype([("exact", "<u8"), ("normalised", "<u8"), ("bands", "<u8", (BANDS,))])
_EXACT, _NORMALISED, _BAND = 0, 1, 2  # 64-bit columns of a fingerprint; a band each from _BAND on
_FACTORS = np.frombuffer(shake_128(b"bands").digest(8 * BANDS * BAND_SIZE), "<u8").reshape(BANDS, BAND_SIZE) | 1
_WORD_FACTOR, _PAIR_FACTOR = np.frombuffer(shake_128(b"shingles").digest(16), "<u8") | 1


class Duplicate(NamedTuple):
    row: int
    earlier: int
    kind: Kind
    similarity: float  # 1.0 unless near


class HeldOutMatch(NamedTuple):
    file: str
    line: int
    kind: Kind
    similarity: float  # 1.0 unless near


class HeldOutText(NamedTuple):
    file: str
    line: int
    text: str


TextOf = Callable[[int], str]


def fingerprints(texts: Sequence[str]) -> Fingerprints:
    """What finds the duplicates of each text: an array (len(texts),) of FINGERPRINT, 160 bytes a text.

    `exact` and `normalised` are the 64-bit BLAKE2b of the text and of its normalised form. `bands` are hashes of
    the MinHash, or zeros where the text is too short for near duplicates. The same in every process.
    Raises: UnicodeEncodeError for a surrogate, which is no character.
    """
    blocks = [_block(texts[start : start + BLOCK]) for start in range(0, len(texts), BLOCK)]
    return np.concatenate(blocks) if blocks else np.empty(0, FINGERPRINT)


class FingerprintSpool:
    """The fingerprints of the rows 0, 1, ... of a run, in a nameless file: about 70 bytes of memory a row.

    Args:
        directory: where the file lies; the system's temporary directory if None.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - the spool is the context
        self._rows = 0

    def __enter__(self) -> FingerprintSpool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._rows

    def add(self, found: Fingerprints) -> None:
        """Appends the fingerprints of the next rows. Raises: OSError if the disk is full."""
        self._file.seek(0, 2)
        self._file.write(found.tobytes())
        self._rows += len(found)

    def duplicates(self, text_of: TextOf, threshold: float = THRESHOLD, processes: int = 1) -> Iterator[Duplicate]:
        """Each row that duplicates an earlier one, once, in the order of rows.

        The strongest kind counts (exact, normalised, near), and of it the earliest row. That row may itself be
        reported as near an earlier one: near is not transitive. In a bucket of more than MOST_COMPARED rows a
        row is compared with the first ones that are unlike one another, so a row that is only near a later one
        may go unseen there.

        Args:
            text_of: the text of a row that was added; asked for rows that may be near duplicates only.
            threshold: least Jaccard similarity of near duplicates, 0 to 1. The bands are made for 0.8: of a
                lower similarity fewer are found.
            processes: that look for candidates.
        """
        self._file.flush()
        exact = _first_equal(self._column(_EXACT))
        normalised = _first_equal(self._column(_NORMALISED))
        apart = np.flatnonzero(normalised == np.arange(self._rows))
        near, score = self._near(apart, text_of, threshold, processes)
        # An earlier choice of np.select goes before a later one.
        own = np.arange(self._rows)
        earlier = np.select([exact != own, normalised != own], [exact, normalised], near)
        for row in np.flatnonzero(earlier != own).tolist():
            kind: Kind = "exact" if exact[row] != row else "normalised" if normalised[row] != row else "near"
            yield Duplicate(row, int(earlier[row]), kind, float(score[row]))

    def _column(self, number: int) -> Hashes:
        column = np.empty(self._rows, np.uint64)
        size = FINGERPRINT.itemsize
        for start in range(0, self._rows, READ_ROWS):
            # a read without a position, which processes would share
            words = np.frombuffer(os.pread(self._file.fileno(), READ_ROWS * size, start * size), "<u8")
            column[start : start + READ_ROWS] = words.reshape(-1, _BAND + BANDS)[:, number]
        return column

    def _near(
        self, rows: Rows, text_of: TextOf, threshold: float, processes: int
    ) -> tuple[Rows, NDArray[np.float64]]:
        """The earliest row that each row is near (itself if none), and their similarity."""
        earliest, score = np.arange(self._rows), np.ones(self._rows)
        shingles = lru_cache(2 * MOST_COMPARED)(lambda row: shingles_of(text_of(row)))

        def candidates(band: int) -> list[Rows]:
            return list(_buckets(self._column(_BAND + band)[rows], rows))

        for buckets in map_ordered(candidates, range(BANDS), processes):
            for bucket in buckets:
                _compare(bucket, earliest, score, shingles, threshold)
        return earliest, score


class HeldOutIndex:
    """Held-out texts, up to some hundred thousand, against which training rows are held.

    Args:
        texts: each with its place; of equal ones the first is named.
        threshold: least Jaccard similarity of near duplicates, 0 to 1.
    """

    def __init__(self, texts: Sequence[HeldOutText], threshold: float = THRESHOLD) -> None:
        self._texts, self._threshold = texts, threshold
        found = fingerprints([text.text for text in texts])
        numbers = range(len(texts) - 1, -1, -1)  # backwards, so that the first of equals stays
        self._exact = {int(found["exact"][number]): number for number in numbers}
        self._normalised = {int(found["normalised"][number]): number for number in numbers}
        owners = np.array(sorted(self._normalised.values()), np.int64)
        keys = found["bands"][owners]
        owners, keys = np.repeat(owners, BANDS)[keys.ravel() != 0], keys.ravel()[keys.ravel() != 0]
        order = np.argsort(keys, kind="stable")
        self._keys, self._owners = keys[order], owners[order]

    def matches(self, found: Fingerprints, texts: Sequence[str]) -> list[HeldOutMatch | None]:
        """For each text, with its fingerprint in `found`, the held-out text that it duplicates.

        The strongest kind counts, then the highest similarity, then the first text. Of the held-out texts that
        share a bucket MOST_COMPARED are compared.
        """
        bands = np.ascontiguousarray(found["bands"])
        starts = np.searchsorted(self._keys, bands)
        ends = np.minimum(np.searchsorted(self._keys, bands, side="right"), starts + MOST_COMPARED)
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


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _block(texts: Sequence[str]) -> Fingerprints:
    found = np.zeros(len(texts), FINGERPRINT)
    normalised = [normalise(text) for text in texts]
    found["exact"] = [_hash(text) for text in texts]
    found["normalised"] = [_hash(text) for text in normalised]
    words = [words_of(text) for text in normalised]
    long = [number for number, row in enumerate(words) if len(row) >= FEWEST_WORDS]
    if long:
        found["bands"][long] = _bands([words[number] for number in long])
    return found


def _bands(words: list[list[str]]) -> Hashes:
    """Hashes (len(words), BANDS) of the MinHash of the shingles; each row has a word or more."""
    ends = np.cumsum([len(row) for row in words])
    (hashes,) = RMinHash.hash_token_sets([[word for row in words for word in row]])
    shingles = np.empty((len(hashes), 3), np.uint64)
    shingles[:, 0] = hashes
    shingles[:, 1] = shingles[:, 0] * _WORD_FACTOR  # its second weight
    shingles[:-1, 2] = shingles[:-1, 0] * _PAIR_FACTOR + shingles[1:, 1]
    shingles[ends - 1, 2] = shingles[ends - 1, 0]  # the last word of a row has no pair
    sketch = _minhash(shingles.ravel(), 3 * np.concatenate([[0], ends[:-1]]))
    bands: Hashes = (sketch.reshape(-1, BANDS, BAND_SIZE) * _FACTORS).sum(axis=2, dtype=np.uint64)
    return bands


def _minhash(shingles: Hashes, starts: Rows) -> Hashes:
    """MinHash (len(starts), BANDS * BAND_SIZE) of rows that begin at `starts` of `shingles`.

    A row may lie in several pieces: the MinHash of a union is the least of the parts'.
    """
    cuts = np.arange(0, len(shingles), PIECE)
    bounds = np.unique(np.concatenate([starts, cuts, [len(shingles)]]))
    digests: list[Any] = []
    for cut in cuts:
        inside = bounds[(bounds >= cut) & (bounds <= cut + PIECE)] - cut
        piece = shingles[cut : cut + PIECE]
        digests += RMinHash.digest_matrix_from_flat_token_hashes(
            piece, inside.astype(np.uint64), BANDS * BAND_SIZE, SEED
        ).to_rows()
    return np.minimum.reduceat(np.array(digests, np.uint64), np.searchsorted(bounds, starts), axis=0)


def _first_equal(hashes: Hashes) -> Rows:
    """For each place the first place that holds an equal hash, which may be itself."""
    order = np.argsort(hashes, kind="stable")
    new = np.concatenate([[True], np.diff(hashes[order]) != 0])[: len(hashes)]
    first = np.empty(len(hashes), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


def _buckets(hashes: Hashes, rows: Rows) -> Iterator[Rows]:
    """Rows of equal hashes, other than 0, in ascending order; two or more a bucket."""
    order = np.argsort(hashes, kind="stable")
    # The difference to a 0 put before leaves the zeros, which come first, outside of all buckets.
    bounds = np.flatnonzero(np.diff(hashes[order], prepend=np.uint64(0), append=np.uint64(0)))
    several = np.flatnonzero(np.diff(bounds) > 1)
    for start, end in zip(bounds[several].tolist(), bounds[several + 1].tolist(), strict=True):
        yield rows[order[start:end]]


def _compare(
    bucket: Rows,
    earliest: Rows,
    score: NDArray[np.float64],
    shingles: Callable[[int], Shingles],
    threshold: float,
) -> None:
    """Enters into `earliest` and `score` what the rows of a bucket are near."""
    compared: list[int] = []
    for row in bucket.tolist():
        for other in compared:
            if other >= earliest[row]:
                break
            found = jaccard(shingles(row), shingles(other))
            if found >= threshold:
                earliest[row], score[row] = other, found
                break
        alone = earliest[row] == row
        if len(compared) < MOST_COMPARED and (alone or len(bucket) <= MOST_COMPARED):
            compared.append(row)
