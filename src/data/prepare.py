"""Prepare the training data: fetch the files, read and check their rows, then tokenize them.

Both steps cache what they make, under a hash of everything that it depends on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import MAX_LISTED, DataError
from ..schema import RowArgs, Task, TrainDataArgs
from ..utils.files import sha256, write_json
from ..utils.logs import log
from . import loader, report, sources
from .chat import ChatTokenizer
from .contamination import EvaluationRows
from .detect import READING_REMEDIES, explain_misfit, options_of, telling
from .encode import EncodingOptions
from .eval_files import held_out_split, split_files
from .eval_rows import AS_WRITTEN, Reading, shared_columns
from .formats import FORMATS, Rejection
from .held_out import NOTHING, HeldOut, hold_out, write_held_out
from .readers import REST_OF_FILE
from .sources import DataPart
from .store import Array, RowStore, TokenCounts, TokenStore, build_once, content_key
from .task_encoding import trained_answers
from .tokens import Dropped, check_rows, rows_to_verify, write_tokens

HELD_OUT_FILE = "held_out.jsonl"  # in the folder of a token store
UNLIMITED = 10**9  # tokens


class TrainingRows(NamedTuple):
    """The rows of the training files, read and checked, before tokenization."""

    parts: list[DataPart]
    store: RowStore
    dropped: list[Dropped]  # usable rows that the settings leave out
    eval_files: list[Path]
    labels: tuple[str, ...] = ()  # of a classification, sorted
    held_out: HeldOut = NOTHING
    held_out_split: str = ""  # its name, with `eval_split`
    reading: Reading = AS_WRITTEN  # of evaluation rows
    uncompared: Mapping[str, int] = {}  # by evaluation file, its rows that cannot be read

    @property
    def version(self) -> dict[str, Any]:
        """Where the data comes from, for the run's manifest."""
        return {"sources": [part.version | {"weight": part.weight} for part in self.parts]}


def load_training_rows(
    args: TrainDataArgs, *, task: Task, eval_path: str | None, cache: Path, seed: int,
    reference_turn: int | None = None, versions: Sequence[sources.Version] = (),
) -> TrainingRows:  # fmt: skip
    """Fetch and read the training files, and find duplicates and contamination. Imports no heavy library.

    Args:
        reference_turn: the answer of an evaluation row that is its reference.
        versions: recorded versions of the data sets, to read instead of the newest ones.

    Raises: DataError if a file cannot be fetched or read.
    """
    eval_files = sorted(split_files(eval_path).values())
    parts = [_without_eval_files(part, eval_files) for part in sources.fetch_parts(args, cache, versions)]
    report.refuse_evaluation_files([file for part in parts for file in part.files], eval_files)
    reading = Reading(shared_columns([part.columns for part in parts]), reference_turn)
    _warn_of_several_system_texts(parts, eval_files)
    evaluation = EvaluationRows(eval_files, args.dedup_threshold, reading)
    store = loader.load_rows(parts, evaluation, args.dedup_threshold, cache, args.num_proc)
    unusable = list(_unusable_rows(store, args))
    excluded = {row.row for row in unusable} | {m.row for m in store.matches("contamination")}
    held = hold_out(store, excluded, args, task=task, cache=cache, seed=seed)
    dropped = [*unusable, *_left_out(parts, store, args, seed, held, unusable)]
    out = {row.row for row in dropped}.union(held.rows.tolist())
    labels = _labels(store, out) if task == "classification" else ()
    split = held_out_split(eval_path) if args.eval_split else ""
    return TrainingRows(parts, store, dropped, eval_files, labels, held, split, reading, evaluation.unreadable)


def _warn_of_several_system_texts(parts: Sequence[DataPart], eval_files: Sequence[Path]) -> None:
    if eval_files and len({part.columns.system_prompt for part in parts}) > 1:
        log.warning("the data sets have different system prompts: evaluation rows without one are asked without")


def _without_eval_files(part: DataPart, eval_files: Sequence[Path]) -> DataPart:
    """The part without the evaluation files that lie in its folder, unless it consists of them."""
    own = {file.resolve() for file in eval_files}
    part = replace(part, not_matched=tuple(file for file in part.not_matched if file.resolve() not in own))
    files = [file for file in part.files if file.resolve() not in own]
    if not files or len(files) == len(part.files):
        return part
    left_out = ", ".join(str(file) for file in part.files if file not in files)
    log.info("not trained on, since they are evaluation files: %s", left_out)
    return replace(part, files=files)


def refuse_bad_rows(data: TrainingRows, args: TrainDataArgs, task: Task) -> None:
    """Raises: DataError naming the rows that the settings do not accept, or if no row is left."""
    bad = list(data.store.rejected())
    rest = [row for row in bad if row.reason == REST_OF_FILE]
    if args.on_bad_row == "skip" and rest:
        loader.raise_rejected(rest, "", "fix the file; on_bad_row=skip skips rows, not the rest of a file")
    if bad and (args.on_bad_row == "refuse" or not len(data.store)):
        unusable = dict(_files_without_usable_rows(data, bad))
        others = [rejection for rejection in bad if rejection.file not in unusable]
        if not others:
            raise DataError(*unusable.values())
        reasons = [fix for reason, fix in READING_REMEDIES.items() if any(r.reason == reason for r in others)]
        hint = ", ".join(reasons) + (", or " if reasons else "") + "fix the rows"
        hint += "" if rest else " or set on_bad_row=skip"
        settings = {
            f["file"]: "data_format" if f["format"] in FORMATS else "strategy" for f in data.store.about["files"]
        }
        formats = {Path(f["file"]): f"{settings[f['file']]}={f['format']}" for f in data.store.about["files"]}
        loader.raise_rejected(others, formats, hint, also=unusable.values())
    if args.on_contamination == "refuse":
        matches = [*data.store.matches("contamination"), *data.held_out.matches]
        overlaps = [data.store.rejection(m.row, "contamination", m.detail) for m in matches]
        if overlaps:
            loader.raise_rejected(overlaps, "", "remove the rows, or set on_contamination=reject")
    if data.held_out.problem and len(data.store):
        raise data.held_out.problem
    if len(data.store) == len(data.dropped) + len(data.held_out.rows):
        files = ", ".join(str(f) for f in data.store.files)
        dropped = [str(data.store.rejection(*row)) for row in data.dropped[:MAX_LISTED]]
        raise DataError(*dropped, f"{files}: no row to train on", hint="set dataset_path and dataset_pattern")
    if task == "classification" and len(data.labels) < 2:
        raise DataError(
            f"every training row has the label {', '.join(data.labels)!r}",
            hint="a classification needs two or more",
        )


def tokenize(
    data: TrainingRows, chat: ChatTokenizer, args: TrainDataArgs, *, task: Task, cache: Path, seed: int
) -> TokenStore:
    """The tokenized training rows, from the cache where possible. `TokenStore.report` is the data report.

    Raises: DataError if no row is left to train on.
    """
    options = encoding_options(args, task, data.labels)
    not_matched = sorted({str(file) for part in data.parts for file in part.not_matched})
    key = content_key(
        rows=data.store.folder.name,
        left_out=[args.on_duplicate, args.on_contamination],
        weights=[part.weight for part in data.parts],
        rules=options,
        mask=args.check_mask,
        held_out=[data.held_out.identity, data.held_out_split],
        seed=seed,
        not_matched=not_matched,
        chat=[chat.identity, chat.template_date],
    )
    folder = cache / "tokens" / key

    def build(temporary: Path) -> None:
        out = [*(row.row for row in data.dropped), *data.held_out.rows.tolist()]
        kept = np.setdiff1d(np.arange(len(data.store)), out)
        verified = rows_to_verify(len(data.store), args.check_mask == "all", seed)
        stats, rows = write_tokens(temporary, data.store, kept, chat, options, verified, args.num_proc)
        np.save(temporary / "order.npy", _epoch_order(data, rows, seed))
        held, failed = check_rows(data.store, data.held_out.rows, chat, _uncut(options), args.num_proc)
        stats.rejected += failed
        write_held_out(temporary / HELD_OUT_FILE, map(data.store.row, held.tolist()))
        counts = TokenCounts.of(temporary)
        if data.labels:  # the last element of an example is the label's index, not a token
            counts = counts._replace(tokens=counts.tokens - 1)
        data_report = report.build_report(
            data.store, data.dropped, stats, rows, counts, data.eval_files, data.uncompared, not_matched
        )
        data_report |= report.label_counts(temporary, data.labels)
        if data.held_out.identity:
            split = {"split": data.held_out_split, "eval_split": args.eval_split, "seed": seed}
            split["sha256"] = sha256(temporary / HELD_OUT_FILE)
            report.add_held_out(data_report, data.store, held, data.held_out.matches, split)
        write_json(temporary / "data_report.json", data_report)

    build_once(folder, build)
    return TokenStore(folder)


def encoding_options(args: TrainDataArgs, task: Task, labels: tuple[str, ...]) -> EncodingOptions:
    """The settings that decide how training rows become examples."""
    return EncodingOptions(
        args.max_length,
        args.train_on,
        args.on_overlength,
        task,
        labels,
        args.on_disputed_mask,
    )


def _files_without_usable_rows(data: TrainingRows, bad: Sequence[Rejection]) -> Iterator[tuple[Path, str]]:
    """Each file without a usable row, with one sentence that explains why."""
    by_file: dict[Path, list[Rejection]] = {}
    for rejection in bad:
        by_file.setdefault(rejection.file, []).append(rejection)
    for file in data.store.about["files"]:
        if file["rows_in"] and not file["usable"]:
            path, options = Path(file["file"]), options_of(data.parts[file["part"]].columns)
            yield path, explain_misfit(telling(by_file[path]), file["rows_in"], file["format"], options)


def _uncut(options: EncodingOptions) -> EncodingOptions:
    """The rules for rows that are held out, which are not cut: an evaluation reads them completely."""
    if options.on_overlength == "reject":
        return options
    return options._replace(on_overlength="reject", max_length=UNLIMITED)


def _labels(store: RowStore, out: set[int]) -> tuple[str, ...]:
    """The distinct labels of the rows that are trained on, all except `out`; sorted."""
    kept = (number for number in range(len(store)) if number not in out)
    return tuple(sorted({label for number in kept for label in trained_answers(store.row(number))}))


def _unusable_rows(store: RowStore, args: RowArgs) -> Iterator[Dropped]:
    """The rows that are neither trained on nor held out, each once, with the first reason that applies."""
    dropped: set[int] = set()
    if args.on_contamination != "keep":
        dropped |= {m.row for m in store.matches("contamination")}
        yield from (Dropped(m.row, "contamination", m.detail) for m in store.matches("contamination"))
    if args.on_duplicate == "reject":
        found = [m for m in store.matches("duplicates") if m.row not in dropped]
        dropped |= {m.row for m in found}
        yield from (Dropped(m.row, "duplicate", m.detail) for m in found)


def _left_out(
    parts: Sequence[DataPart],
    store: RowStore,
    args: RowArgs,
    seed: int,
    held: HeldOut,
    unusable: Sequence[Dropped],
) -> Iterator[Dropped]:
    """The other rows that are not trained on, without those that are held out."""
    dropped = {row.row for row in unusable}.union(held.rows.tolist())
    if args.on_contamination != "keep":
        found = [m for m in held.matches if m.row not in dropped]
        dropped |= {m.row for m in found}
        yield from (Dropped(m.row, "contamination", f"{m.detail}, which is held out") for m in found)
    weights = [parts[file["part"]].weight for file in store.about["files"]]
    unseen = np.flatnonzero(_repeats(parts, store, seed) == 0)
    for row, file in zip(unseen.tolist(), store.file_indices(unseen).tolist(), strict=True):
        if row not in dropped:
            yield Dropped(row, "not_sampled", f"is left out by weight={weights[file]:g}")


def _repeats(parts: Sequence[DataPart], store: RowStore, seed: int) -> Array:
    """How often each row occurs in an epoch, (rows,): its weight, with the fraction decided by a seeded draw."""
    weights = np.concatenate(
        [np.zeros(0), *(np.full(f["usable"], parts[f["part"]].weight) for f in store.about["files"])]
    )
    drawn = np.random.default_rng(seed).random(len(weights))
    return np.floor(weights).astype(np.int64) + (drawn < weights % 1)


def _epoch_order(data: TrainingRows, rows: Array, seed: int) -> Array:
    """Indices of an epoch's examples, ordered by row; `rows` is the row of each example."""
    return np.repeat(np.arange(len(rows)), _repeats(data.parts, data.store, seed)[rows])
