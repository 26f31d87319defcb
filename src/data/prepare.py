"""Training data made ready: files fetched, rows read and judged as texts, then tokenised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.data import loader, report, sources
from src.data.chat import ChatTokenizer
from src.data.contamination import EvaluationRows
from src.data.encode import EncodingOptions
from src.data.formats import Rejection
from src.data.sources import DataPart, cache_of
from src.data.store import Array, RowStore, TokenCounts, TokenStore, build_once, content_key
from src.data.task_encoding import trained_answers
from src.data.tokens import Dropped, rows_to_verify, write_tokens
from src.errors import MAX_LISTED, DataError
from src.schema import TrainConfig
from src.utils.files import write_json


class TrainingRows(NamedTuple):
    """Training files that have been read and judged, before anything is tokenised."""

    parts: list[DataPart]
    store: RowStore
    rejected: list[Dropped]  # of the store's rows, by the settings
    eval_files: list[Path]
    labels: tuple[str, ...] = ()  # of a classification, sorted

    @property
    def version(self) -> dict[str, Any]:
        """What the manifest says of where the data comes from."""
        return {"sources": [part.version | {"weight": part.weight} for part in self.parts]}


def load_training_rows(cfg: TrainConfig) -> TrainingRows:
    """Fetch and read the training files, and judge their rows as texts. Nothing heavy is imported.

    Raises: DataError if they cannot be had or read.
    """
    parts = sources.fetch_parts(cfg)
    report.refuse_evaluation_files([file for part in parts for file in part.files], cfg.eval_path)
    held_out = EvaluationRows(cfg.eval_path, cfg.dedup_threshold)
    store = loader.load_rows(parts, held_out, cfg.dedup_threshold, cache_of(cfg), cfg.num_proc)
    left_out = list(_left_out(parts, store, cfg))
    labels = _labels(store, left_out) if cfg.task == "classification" else ()
    return TrainingRows(parts, store, left_out, held_out.files, labels)


def refuse_bad_rows(data: TrainingRows, cfg: TrainConfig) -> None:
    """Raises: DataError naming the rows that the settings do not let pass, or if no row is left."""
    bad = list(data.store.rejected())
    if bad and (cfg.on_bad_row == "refuse" or not len(data.store)):
        misfits = dict(_misfits(data.store, bad))
        others = [rejection for rejection in bad if rejection.file not in misfits]
        if not others:
            raise DataError(*misfits.values())
        hint = "fix the rows or set on_bad_row=skip"
        loader.raise_rejected(others, f"data_format={cfg.data_format}", hint, also=misfits.values())
    if cfg.on_contamination == "refuse":
        found = (
            data.store.rejection(m.row, "contamination", m.detail) for m in data.store.matches("contamination")
        )
        if overlaps := list(found):
            loader.raise_rejected(overlaps, "", "remove the rows, or set on_contamination=reject")
    if len(data.store) == len(data.rejected):
        names = ", ".join(str(f) for f in data.store.files)
        left_out = [str(data.store.rejection(*left)) for left in data.rejected[:MAX_LISTED]]
        raise DataError(*left_out, f"{names}: no row to train on", hint="set dataset_path and dataset_pattern")
    if cfg.task == "classification" and len(data.labels) < 2:
        raise DataError(
            f"every training row has the label {', '.join(data.labels)!r}",
            hint="a classification needs two or more",
        )


def _misfits(store: RowStore, bad: Sequence[Rejection]) -> Iterator[tuple[Path, str]]:
    """Each file none of whose rows can be used, with a sentence about it."""
    first = {rejection.file: rejection for rejection in reversed(bad)}
    for file in store.about["files"]:
        if file["rows_in"] and not file["usable"]:
            path = Path(file["file"])
            yield path, loader.explain_misfit(first[path], file["rows_in"], file["format"])


def tokenize(data: TrainingRows, chat: ChatTokenizer, cfg: TrainConfig) -> TokenStore:
    """The tokens of all rows that are trained on, from the cache where they were made before.

    Its `report` is the data report.
    Raises: DataError if no row is left to train on.
    """
    rules = encoding_options(cfg, data.labels)
    key = content_key(
        rows=data.store.folder.name,
        left_out=[cfg.on_duplicate, cfg.on_contamination],
        weights=[part.weight for part in data.parts],
        rules=rules,
        mask=cfg.check_mask,
        seed=cfg.seed,
        chat=[chat.identity, chat.template_date],
    )
    folder = cache_of(cfg) / "tokens" / key

    def make(temporary: Path) -> None:
        kept = np.setdiff1d(np.arange(len(data.store)), [left.row for left in data.rejected])
        proven = rows_to_verify(len(data.store), cfg.check_mask == "all", cfg.seed)
        outcome, rows = write_tokens(temporary, data.store, kept, chat, rules, proven, cfg.num_proc)
        np.save(temporary / "order.npy", _order(data, rows, cfg.seed))
        counts = TokenCounts.of(temporary)
        if data.labels:  # the last element of an example is no token
            counts = counts._replace(tokens=counts.tokens - 1)
        data_report = report.build_report(data.store, data.rejected, outcome, rows, counts, data.eval_files)
        data_report |= report.label_counts(temporary, data.labels)
        write_json(temporary / "data_report.json", data_report)

    build_once(folder, make)
    return TokenStore(folder)


def encoding_options(cfg: TrainConfig, labels: tuple[str, ...]) -> EncodingOptions:
    """What decides how the rows of a training become examples."""
    return EncodingOptions(cfg.max_length, cfg.train_on, cfg.on_overlength, cfg.task, labels)


def _labels(store: RowStore, left_out: Sequence[Dropped]) -> tuple[str, ...]:
    """The distinct answers of the rows that are trained on, sorted."""
    out = {left.row for left in left_out}
    found = {
        label for number in range(len(store)) if number not in out for label in trained_answers(store.row(number))
    }
    return tuple(sorted(found))


def _left_out(parts: Sequence[DataPart], store: RowStore, cfg: TrainConfig) -> Iterator[Dropped]:
    """Rows that the settings leave out, each once."""
    left: set[int] = set()
    if cfg.on_contamination != "keep":
        left |= {m.row for m in store.matches("contamination")}
        yield from (Dropped(m.row, "contamination", m.detail) for m in store.matches("contamination"))
    if cfg.on_duplicate == "reject":
        found = [m for m in store.matches("duplicates") if m.row not in left]
        left |= {m.row for m in found}
        yield from (Dropped(m.row, "duplicate", m.detail) for m in found)
    times = _times(parts, store, cfg.seed)
    weights = [parts[file["part"]].weight for file in store.about["files"]]
    unseen = np.flatnonzero(times == 0)
    for row, file in zip(unseen.tolist(), store.file_indices(unseen).tolist(), strict=True):
        if row not in left:
            yield Dropped(row, "not_sampled", f"is left out by weight={weights[file]:g}")


def _times(parts: Sequence[DataPart], store: RowStore, seed: int) -> Array:
    """How often an epoch sees each row: its weight, a fraction of one by a seeded draw."""
    weights = np.concatenate(
        [np.zeros(0), *(np.full(f["usable"], parts[f["part"]].weight) for f in store.about["files"])]
    )
    drawn = np.random.default_rng(seed).random(len(weights))
    return np.floor(weights).astype(np.int64) + (drawn < weights % 1)


def _order(data: TrainingRows, rows: Array, seed: int) -> Array:
    """The examples of an epoch, in the order of their rows, each as often as its row is seen."""
    times = _times(data.parts, data.store, seed)
    return np.repeat(np.arange(len(rows)), times[rows])
