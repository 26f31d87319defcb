"""Duplicate texts: exact, normalised and near.

A text is normalised, cut into shingles (words and pairs of neighbouring words), and sketched by MinHash
(Broder 1997, "On the resemblance and containment of documents"). Locality-sensitive hashing of the sketch in
bands (Indyk and Motwani 1998) finds candidates, and the true Jaccard similarity of their shingles decides.
"""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b, shake_128
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from ..utils.workers import map_ordered

# Scripts without spaces between words (Thai to Khmer, kana, Han): each letter counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_ASCII_WORDS = re.compile(r"\w+|[^\w\s]")
# Punctuation at the end of a word; "!" only after two letters, since 5! and n! are factorials.
_MARKS = re.compile(r"""[.,;:?!](?:(?<=[^\W\d_]{2}.)[.,;:?!]*|(?<=[\w)\]}"'][.,;:?])[.,;:?]*)(?=["']?(?:\s|\Z))""")
# Replaced before NFKC, which would make 10² equal 102, and 1½ equal 11/2, and drop the space of wide punctuation.
_BEFORE_NFKC = re.compile(
    "[\u00b2\u00b3\u00b9\u00bc-\u00be\u1d2c-\u1d6a\u2070-\u209c\u2150-\u215f\u2189\u2460-\u24ff"
    "\uff0c\uff0e\uff1a\uff1b\uff01\uff1f]"
)
_COMPATIBLE = {"<super>": "^{0}", "<sub>": "_{0}", "<wide>": "{0} "}
_EQUIVALENT = (
    {mark: "'" for mark in "\u2018\u2019\u201b\u2039\u203a"}
    | {mark: '"' for mark in "\u201c\u201d\u201e\u201f\u00ab\u00bb"}
    | {mark: "-" for mark in "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"}
    | {"\u3002": ". ", "\u0964": ". ", "\u3001": ", ", "\u060c": ",", "\u061b": ";", "\u061f": "?"}
    | {mark: "" for mark in "\u00bf\u00a1\u00ad\u200b\u200e\u200f\u2060\ufe0e\ufe0f\ufeff"}
)
_AFTER_NFKC = re.compile(f"[{''.join(_EQUIVALENT)}]")

Kind = Literal["exact", "normalised", "near"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # strongest first
Hashes = NDArray[np.uint64]
Rows = NDArray[np.int64]
Fingerprints = NDArray[np.void]  # of FINGERPRINT

THRESHOLD = 0.8  # least Jaccard similarity of near duplicates
BANDS, BAND_SIZE = 18, 7  # similarity s makes a candidate with probability 1-(1-s^7)^18: 0.99 at 0.8, 0.13 at 0.5
FEWEST_WORDS = 10  # shorter texts have no near duplicates: "sort the list" and "sort the list twice" differ
MAX_COMPARED = 16  # rows of a bucket that each of its rows is compared with
SEED = 1
# rensa starts threads, which do not survive a fork, from 256 texts or 65,536 shingles on
BLOCK = 64  # texts hashed at once
PIECE = 32_768  # shingles hashed at once
READ_ROWS = 65_536

FINGERPRINT = np.dtype([("exact", "<u8"), ("normalised", "<u8"), ("bands", "<u8", (BANDS,))])
_EXACT, _NORMALISED, _BAND = 0, 1, 2  # 64-bit columns of a fingerprint; a band each from _BAND on
_FACTORS = np.frombuffer(shake_128(b"bands").digest(8 * BANDS * BAND_SIZE), "<u8").reshape(BANDS, BAND_SIZE) | 1
_WORD_FACTOR, _PAIR_FACTOR = np.frombuffer(shake_128(b"shingles").digest(16), "<u8") | 1


class Shingles(NamedTuple):
    words: frozenset[str]
    pairs: frozenset[tuple[str, str]]


class Duplicate(NamedTuple):
    row: int
    earlier: int
    kind: Kind
    similarity: float  # 1.0 unless near


TextOf = Callable[[int], str]


def fingerprints(texts: Sequence[str], structures: Sequence[str] = ()) -> Fingerprints:
    """The fingerprint of each text: an array (len(texts),) of dtype FINGERPRINT, 160 bytes a text.

    A text has a structure as well, or an empty one. Texts with different structures match in no column.

    `exact` and `normalised` are the 64-bit BLAKE2b of the text and of its normalised form. `bands` are hashes of
    the MinHash, or zeros if the text is too short for near duplicates. The result is the same in every process.

    Raises: UnicodeEncodeError if a text holds a surrogate, which is not a character.
    """
    blocks = [_block(texts[start : start + BLOCK]) for start in range(0, len(texts), BLOCK)]
    found = np.concatenate(blocks) if blocks else np.empty(0, FINGERPRINT)
    for number, structure in enumerate(structures):
        if structure:
            words = found[number : number + 1].view("<u8")
            words[words != 0] ^= np.uint64(hash_text(structure))
    return found


class FingerprintSpool:
    """The fingerprints of rows 0, 1, ... in an anonymous file. It takes about 70 bytes of memory a row.

    Args:
        directory: of the file; None is the system's temporary directory.
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
        """Append the fingerprints of the next rows. Raises: OSError if the disk is full."""
        self._file.seek(0, 2)
        self._file.write(found.tobytes())
        self._rows += len(found)

    def duplicates(self, text_of: TextOf, threshold: float = THRESHOLD, processes: int = 1) -> Iterator[Duplicate]:
        """Each row that duplicates an earlier one, once, ordered by row.

        The strongest kind is reported, with the earliest row of that kind. That row may itself be a near
        duplicate: near is not transitive. In a bucket of more than MAX_COMPARED rows, a row is compared with the
        first rows that are not near one another, so that a row that is near a later one only may be missed.

        Args:
            text_of: returns the text of a row; called for candidates of near duplicates only.
            threshold: least Jaccard similarity of near duplicates, 0 to 1. The bands are tuned for 0.8: at a
                lower similarity fewer near duplicates are found.
            processes: number of processes that find candidates.
        """
        self._file.flush()
        exact = _first_equal(self._column(_EXACT))
        normalised = _first_equal(self._column(_NORMALISED))
        distinct = np.flatnonzero(normalised == np.arange(self._rows))
        near, score = self._near(distinct, text_of, threshold, processes)
        own = np.arange(self._rows)
        earlier = np.select([exact != own, normalised != own], [exact, normalised], near)
        for row in np.flatnonzero(earlier != own).tolist():
            kind: Kind = "exact" if exact[row] != row else "normalised" if normalised[row] != row else "near"
            yield Duplicate(row, int(earlier[row]), kind, float(score[row]))

    def _column(self, number: int) -> Hashes:
        column = np.empty(self._rows, np.uint64)
        size = FINGERPRINT.itemsize
        for start in range(0, self._rows, READ_ROWS):
            # pread, since forked processes share the position of the file
            words = np.frombuffer(os.pread(self._file.fileno(), READ_ROWS * size, start * size), "<u8")
            column[start : start + READ_ROWS] = words.reshape(-1, _BAND + BANDS)[:, number]
        return column

    def _near(
        self, rows: Rows, text_of: TextOf, threshold: float, processes: int
    ) -> tuple[Rows, NDArray[np.float64]]:
        """(rows,) twice: the earliest row that each row is near, itself if none, and their similarity."""
        earliest, score = np.arange(self._rows), np.ones(self._rows)
        shingles = lru_cache(2 * MAX_COMPARED)(lambda row: shingles_of(text_of(row)))

        def candidates(band: int) -> list[Rows]:
            return list(_buckets(self._column(_BAND + band)[rows], rows))

        for buckets in map_ordered(candidates, range(BANDS), processes):
            for bucket in buckets:
                _compare(bucket, earliest, score, shingles, threshold)
        return earliest, score


def hash_text(text: str) -> int:
    """A 64-bit hash, the same in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _block(texts: Sequence[str]) -> Fingerprints:
    found = np.zeros(len(texts), FINGERPRINT)
    normalised = [normalise(text) for text in texts]
    found["exact"] = [hash_text(text) for text in texts]
    found["normalised"] = [hash_text(text) for text in normalised]
    words = [words_of(text) for text in normalised]
    long = [number for number, row in enumerate(words) if len(row) >= FEWEST_WORDS]
    if long:
        found["bands"][long] = _bands([words[number] for number in long])
    return found


def _bands(words: list[list[str]]) -> Hashes:
    """Hashes (len(words), BANDS) of the MinHash of the shingles. Each row has at least one word."""
    ends = np.cumsum([len(row) for row in words])
    (hashes,) = RMinHash.hash_token_sets([[word for row in words for word in row]])
    shingles = np.empty((len(hashes), 3), np.uint64)
    shingles[:, 0] = hashes
    shingles[:, 1] = shingles[:, 0] * _WORD_FACTOR  # a word weighs as much as two pairs
    shingles[:-1, 2] = shingles[:-1, 0] * _PAIR_FACTOR + shingles[1:, 1]
    shingles[ends - 1, 2] = shingles[ends - 1, 0]  # the last word of a row begins no pair
    sketch = _minhash(shingles.ravel(), 3 * np.concatenate([[0], ends[:-1]]))
    bands: Hashes = (sketch.reshape(-1, BANDS, BAND_SIZE) * _FACTORS).sum(axis=2, dtype=np.uint64)
    return bands


def _minhash(shingles: Hashes, starts: Rows) -> Hashes:
    """MinHash (len(starts), BANDS * BAND_SIZE) of the rows that begin at `starts` of `shingles`.

    A row may span several pieces: the MinHash of a union is the minimum over its parts.
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
    """(hashes,): for each position the first position of an equal hash, which may be itself."""
    order = np.argsort(hashes, kind="stable")
    new = np.concatenate([[True], np.diff(hashes[order]) != 0])[: len(hashes)]
    first = np.empty(len(hashes), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


def _buckets(hashes: Hashes, rows: Rows) -> Iterator[Rows]:
    """Groups of two or more rows with equal, non-zero hashes, each in ascending order."""
    order = np.argsort(hashes, kind="stable")
    # zeros sort first; prepending a 0 to the difference keeps them out of every bucket
    bounds = np.flatnonzero(np.diff(hashes[order], prepend=np.uint64(0), append=np.uint64(0)))
    several = np.flatnonzero(np.diff(bounds) > 1)
    for start, end in zip(bounds[several].tolist(), bounds[several + 1].tolist(), strict=True):
        yield rows[order[start:end]]


def _compare(
    bucket: Rows, earliest: Rows, score: NDArray[np.float64], shingles: Callable[[int], Shingles], threshold: float
) -> None:
    """Compare the rows of a bucket and update `earliest` and `score` in place."""
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
        if len(compared) < MAX_COMPARED and (alone or len(bucket) <= MAX_COMPARED):
            compared.append(row)


# Similarity of two texts


def normalise(text: str) -> str:
    """`text` without what rarely changes its meaning: case, width and form of letters, quotes and dashes
    (Unicode NFKC and case folding), amount of white space, punctuation that ends a phrase.

    Operators, digits and separators within a word are kept.

    >>> normalise("Is  it 3.5, or 35?!")
    'is it 3.5 or 35?!'
    >>> normalise("Yes!") == normalise("yes")
    True
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _BEFORE_NFKC.sub(_compatible, text))
        text = _AFTER_NFKC.sub(lambda found: _EQUIVALENT[found[0]], text)
        text = unicodedata.normalize("NFKC", text.casefold())
    return " ".join(_MARKS.sub("", text.casefold()).split())


def similarity(one: str, other: str) -> float:
    """Weighted Jaccard similarity of the shingles of two texts, 0 to 1. A word weighs as much as two pairs.

    Replacing k non-adjacent words in a text of n distinct words leaves (3n-1-4k)/(3n-1+4k): 0.82 for 3 of 40.
    Pairs alone would leave 0.73; words alone would ignore their order.
    """
    return jaccard(shingles_of(one), shingles_of(other))


def shingles_of(text: str) -> Shingles:
    """The distinct words and pairs of neighbouring words of a text, normalised."""
    words = words_of(normalise(text))
    return Shingles(frozenset(words), frozenset(pairwise(words)))


def jaccard(one: Shingles, other: Shingles) -> float:
    """Weighted intersection over weighted union. A word weighs as much as two pairs."""
    words, pairs = len(one.words & other.words), len(one.pairs & other.pairs)
    either = 2 * (len(one.words) + len(other.words) - words) + len(one.pairs) + len(other.pairs) - pairs
    return (2 * words + pairs) / either if either else 1.0


def words_of(normalised: str) -> list[str]:
    """The words and symbols of a normalised text, in order."""
    return (_ASCII_WORDS if normalised.isascii() else _WORDS).findall(normalised)


def _compatible(found: re.Match[str]) -> str:
    return _COMPATIBLE.get(unicodedata.decomposition(found[0]).split(" ")[0], " {0}").format(found[0])
