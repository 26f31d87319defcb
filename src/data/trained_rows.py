"""Fingerprints of the rows that a run was trained on, so that any evaluation file can be compared with them later.

RUN/trained_rows.npz    requests: (requests, 2) uint64, hashes of each text and of its normalised form
                        bands: (requests, BANDS) uint32, the MinHash bands of each request with its answer

The texts are not kept. So a near duplicate is estimated: two texts with a Jaccard similarity s share a band with
probability s^BAND_SIZE, and NEAR_BANDS of the BANDS make a near duplicate: 0.92 at 0.8, 0.01 at 0.5.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..utils.workers import cores, map_ordered
from .contamination import exchange_text, request_text, requests_of
from .conversation import Message, Row
from .duplicates import BANDS, KINDS, Kind, fingerprints, hash_text, normalise
from .store import Array, RowStore, TokenStore, build_once

FILE = "trained_rows.npz"
NEAR_BANDS = 2
BATCH = 500  # rows that a process receives at once
SMALL = 4_000  # with fewer rows, further processes cost more than they save
LARGEST_BUCKET = 1_000  # trained texts with one band that an evaluation row is compared with


def write_trained_rows(store: RowStore, tokens: TokenStore, cache: Path, workers: int | None) -> Path:
    """The file of the fingerprints of all rows of a run's examples, from the cache where possible."""
    folder = cache / "trained_rows" / tokens.folder.name
    rows = tokens.row_indices

    def work(batch: Array) -> tuple[Array, Array]:
        return _fingerprints([store.row(int(number)).messages for number in batch])

    def build(temporary: Path) -> None:
        processes = 1 if len(rows) < SMALL else workers or cores()
        batches = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
        found = [_fingerprints([]), *map_ordered(work, batches, processes)]
        requests, bands = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        np.savez(temporary / FILE, requests=requests, bands=bands)

    build_once(folder, build)
    return folder / FILE


def keep_trained_rows(file: Path, run: Path, also: Path | None = None) -> None:
    """Give a run the file of its fingerprints: a hard link, so that the runs of a sweep share it, or a copy.

    also: the file of the run that this one goes on from, whose fingerprints are added.
    """
    target = run / FILE
    target.unlink(missing_ok=True)
    if also and also.is_file():
        with np.load(file) as mine, np.load(also) as theirs:
            requests, bands = (np.concatenate([mine[key], theirs[key]]) for key in ("requests", "bands"))
        np.savez(target, requests=requests, bands=bands)
        return
    try:
        os.link(file, target)
    except OSError:  # another file system
        shutil.copy2(file, target)


def _fingerprints(conversations: Sequence[Sequence[Message]]) -> tuple[Array, Array]:
    """(requests, 2) and (requests, BANDS) of all requests of `conversations`, each with its answer."""
    pairs = [pair for turns in conversations for pair in requests_of(turns, several=True)]
    return _arrays([request for request, _ in pairs], [exchange_text(*pair) for pair in pairs])


def _arrays(requests: list[str], exchanges: list[str]) -> tuple[Array, Array]:
    hashes = [(hash_text(request), hash_text(normalise(request))) for request in requests]
    bands = fingerprints(exchanges)["bands"].reshape(-1, BANDS).astype(np.uint32)
    return np.array(hashes, np.uint64).reshape(-1, 2), bands


class TrainedRows:
    """The fingerprints of the rows that a run was trained on."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as found:
            self._requests, self._bands = found["requests"], found["bands"]

    def matches(self, rows: Sequence[Row]) -> list[Kind | None]:
        """For each evaluation row, how it matches a trained one: by its request, or near with its answer."""
        requests = [request_text(row.messages) for row in rows]
        answers = [row.messages[-1]["content"] for row in rows]
        asked, bands = _arrays(requests, list(map(exchange_text, requests, answers)))
        exact, normalised = (np.isin(asked[:, column], self._requests[:, column]) for column in (0, 1))
        kinds = np.select([exact, normalised, self._near(bands)], range(len(KINDS)), len(KINDS)).tolist()
        return [(*KINDS, None)[kind] for kind in kinds]

    def _near(self, bands: Array) -> Array:
        """(rows,): whether a trained text shares NEAR_BANDS with the row."""
        pairs = [np.zeros(0, np.int64), *(_sharing(bands[:, i], self._bands[:, i]) for i in range(BANDS))]
        shared, times = np.unique(np.concatenate(pairs), return_counts=True)
        near = np.zeros(len(bands), bool)
        near[shared[times >= NEAR_BANDS] // max(len(self._bands), 1)] = True
        return near


def _sharing(ours: Array, theirs: Array) -> Array:
    """The pairs with an equal band that is not 0, as `row * len(theirs) + trained row`."""
    order = np.argsort(theirs, kind="stable")
    starts = np.searchsorted(theirs[order], ours)
    ends = np.minimum(np.searchsorted(theirs[order], ours, side="right"), starts + LARGEST_BUCKET)
    found = [
        row * len(theirs) + order[start:end]
        for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
        if ours[row] and end > start
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])
