"""The data report: what became of every row (rows in = trained + rejected + held out), as JSON and for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from .. import outcome
from ..errors import MAX_LISTED, DataError
from ..utils.files import sha256
from ..utils.logs import SafeConsole, log, silence_stdout
from ..utils.secrets import redact
from ..utils.units import count
from .chat import ChatTokenizer
from .duplicates import KINDS
from .store import Array, DuplicateMatch, Example, RowStore, TokenCounts, TokenStore
from .tokens import Dropped, TokenizeStats

HELD_OUT = "held_out"  # folder of a run, with the rows that are held out
EXPECTED_REASONS = {"not_sampled"}  # reasons that follow from a setting and are not findings
CONTAMINATION = re.compile(r"contamination$|rows occur in the evaluation (files|data)$")  # in a finding
LARGE = 0.1  # share of the rows from which contamination is reported by itself
MAX_SHOWN_CHARS = 1_500  # of an example
SHARES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}


def refuse_evaluation_files(files: Sequence[Path], eval_files: Sequence[Path]) -> None:
    """Raises: DataError if a training file is one of the evaluation files, by path or by content."""
    evaluation = {(p.stat().st_size, sha256(p)): p for p in eval_files}
    sizes = {size for size, _ in evaluation}  # only files of equal size need to be hashed
    candidates = [(f, f.stat().st_size) for f in files if f.stat().st_size in sizes]
    same = [(f, evaluation[key]) for f, size in candidates if (key := (size, sha256(f))) in evaluation]
    if same:
        raise DataError(
            *(f"training file {f} is the evaluation file {e}" for f, e in same),
            hint="set dataset_pattern so that it excludes evaluation data, or eval_path to a separate folder",
        )


def refuse_findings(report: dict[str, Any], *, strict: bool) -> None:
    """Raises: DataError if no row is left or, with `strict`, if there is any finding."""
    if "held_out" in report and not report["rows_held_out"]:
        raise DataError("no row is left to hold out", hint="the data report names the reason for each row")
    if not report["rows_trained"]:
        problems = [f"{r['file']}:{r['line']} {r['detail']}" for r in report["rejected"][:MAX_LISTED]]
        raise DataError(*problems, hint="no row is left to train on; raise max_length")
    if strict and report["findings"]:
        raise DataError(*report["findings"], hint="fix the data, or set strict_data=false")


def build_report(
    store: RowStore,
    dropped: Sequence[Dropped],
    stats: TokenizeStats,
    rows: Array,
    counts: TokenCounts,
    eval_files: Sequence[Path],
) -> dict[str, Any]:
    """The data report, as data_report.json holds it.

    Args:
        dropped: rows that the settings leave out.
        stats: what became of the other rows in tokenization.
        rows: (examples,), the row of each example.
        counts: tokens, and tokens with loss, of each example.
    """
    rejected = [*store.rejected(), *(store.rejection(*row) for row in (*dropped, *stats.rejected))]
    order = {file: number for number, file in enumerate(store.files)}
    rejected.sort(key=lambda r: (order[r.file], r.line))
    trained = np.unique(rows)
    per_file = np.bincount(store.file_indices(trained), minlength=len(store.files)).tolist()
    by_reason = dict(Counter(r.reason for r in rejected).most_common())
    found: dict[str, Any] = {
        "rows_in": sum(file["rows_in"] for file in store.about["files"]),
        "rows_trained": len(trained),
        "rows_held_out": 0,
        "examples": len(rows),
        "rejected": [
            {"file": str(r.file), "line": r.line, "reason": r.reason, "detail": r.detail} for r in rejected
        ],
        "rejected_by_reason": by_reason,
        "cut": [_location(store, row) | {"detail": row.detail} for row in stats.cut],
        "files": [
            {key: file[key] for key in ("file", "sha256", "format", "rows_in")} | {"rows_trained": count}
            for file, count in zip(store.about["files"], per_file, strict=True)
        ],
        "tokens": {
            "total": int(counts.tokens.sum()),
            "with_loss": int(counts.with_loss.sum()),
            "row_length": _percentiles(counts.tokens),
        },
        "duplicates": _matches(store, "duplicates"),
        "contamination": {"files": _overlaps(store, eval_files), **_matches(store, "contamination")},
        "mask": _mask(stats),
        "no_end_of_turn": stats.no_end_of_turn,
    }
    return found | {"findings": _findings(found)}


def add_held_out(
    found: dict[str, Any], store: RowStore, rows: Array, matches: Sequence[DuplicateMatch], split: dict[str, Any]
) -> None:
    """Add what `eval_split` holds out to a data report.

    Args:
        rows: (held out rows,), their indices.
        matches: other rows that match one of them: contamination.
        split: name of the split, the settings that it depends on, and the hash of its file.
    """
    found["rows_held_out"] = len(rows)
    places = [_location(store, Dropped(row, "", "")) for row in rows.tolist()]
    found["held_out"] = split | {"rows": places}
    counts = np.bincount(store.file_indices(rows), minlength=len(store.files)).tolist()
    for each, number in zip(found["files"], counts, strict=True):
        each["rows_held_out"] = number
    kinds = Counter(match.kind for match in matches)
    contamination = found["contamination"]
    contamination["files"][f"{HELD_OUT}/{split['split']}.jsonl"] = {kind: kinds[kind] for kind in KINDS}
    for kind in KINDS:
        contamination[kind] += kinds[kind]
    contamination["rows"] += [_match_row(store, match) for match in matches]
    found["findings"] = _findings(found)


def label_counts(tokens: Path, names: Sequence[str]) -> dict[str, Any]:
    """The number of examples of each label of a classification; empty for other tasks."""
    if not names:
        return {}
    ends = np.load(tokens / "ends.npy")
    last = np.memmap(tokens / "ids.bin", np.int32, "r")[ends - 1] if len(ends) else ends
    return {"labels": dict(zip(names, np.bincount(last, minlength=len(names)).tolist(), strict=True))}


def _location(store: RowStore, dropped: Dropped) -> dict[str, Any]:
    found = store.rejection(*dropped)
    return {"file": str(found.file), "line": found.line}


def _percentiles(lengths: Array) -> dict[str, int]:
    ordered = np.sort(lengths)
    last = len(ordered) - 1
    return {
        name: int(ordered[min(last, int(share * len(ordered)))]) if len(ordered) else 0
        for name, share in SHARES.items()
    }


def _matches(store: RowStore, what: str) -> dict[str, Any]:
    found = list(store.matches(what))
    kinds = Counter(match.kind for match in found)
    return {kind: kinds[kind] for kind in KINDS} | {"rows": [_match_row(store, match) for match in found]}


def _match_row(store: RowStore, match: DuplicateMatch) -> dict[str, Any]:
    return _location(store, Dropped(match.row, "", "")) | {
        "kind": match.kind,
        "similarity": round(match.similarity, 3),
        "of": f"{match.file}:{match.line}",
    }


def _overlaps(store: RowStore, eval_files: Sequence[Path]) -> dict[str, dict[str, int]]:
    """The number of training rows that occur in each evaluation file, by kind of match."""
    found = Counter((match.file, match.kind) for match in store.matches("contamination"))
    names = [str(redact(str(file))) for file in eval_files]  # matches are stored redacted
    return {name: {kind: found[name, kind] for kind in KINDS} for name in names}


def _mask(stats: TokenizeStats) -> dict[str, Any]:
    known = {"agrees", "disagrees"}
    return {
        "checked": sum(stats.mask.values()),
        "agree": stats.mask["agrees"],
        "disagree": stats.mask["disagrees"],
        "not_comparable": {why: count for why, count in stats.mask.items() if why not in known},
    }


def _findings(found: dict[str, Any]) -> list[str]:
    """What deserves a look before training, one sentence each."""
    rejected = [
        f"{count(n, 'row is', 'rows are')} rejected: {reason}"
        for reason, n in found["rejected_by_reason"].items()
        if reason not in EXPECTED_REASONS
    ]
    duplicates: dict[str, int] = {kind: found["duplicates"][kind] for kind in KINDS}
    overlap = sum(found["contamination"][kind] for kind in KINDS)
    more = [
        (len(found["cut"]), "row is", "rows are", "cut to max_length"),
        (
            sum(duplicates.values()), "row is a duplicate", "rows are duplicates",
            f"of earlier ones ({_kinds(duplicates)})",
        ),
        (
            overlap, "row occurs", "rows occur",
            f"in the evaluation {'data' if 'held_out' in found else 'files'}",
        ),
        (
            sum(found["mask"]["not_comparable"].values()), "mask", "masks",
            "could not be compared with a second derivation",
        ),
        (
            found["no_end_of_turn"], "row has", "rows have",
            "an answer without an end-of-turn token: the model does not learn to stop",
        ),
    ]  # fmt: skip
    return rejected + [f"{count(number, one, many)} {what}" for number, one, many, what in more if number]


def _kinds(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)


# Printed


def print_report(tokens: TokenStore, chat: ChatTokenizer, max_length: int) -> None:
    """Log the report of `tokens`, and print three of its examples."""
    lines = [("training data", ""), *_summary(tokens.report, max_length)]
    width = max(len(what) for what, _ in lines)
    for what, value in lines:
        log.info("%s", f"{what:<{width}}  {value}".rstrip())
    for line in _rejections(tokens.report):
        log.info("%s", line)
    console = SafeConsole()
    with console.capture() as captured:
        for number in _spread(len(tokens)):
            labels = list(tokens.report.get("labels", []))
            shown = _coloured(tokens[number], number, chat, labels, coloured=console.color_system is not None)
            console.print(shown, soft_wrap=not console.is_terminal)
    try:
        if not outcome.output.quiet:
            print(captured.get(), end="", flush=True)
    except BrokenPipeError:
        silence_stdout()
    large = _large_contamination(tokens.report)
    for finding in tokens.report["findings"]:
        if not (large and CONTAMINATION.search(finding)):
            log.warning("%s", finding)
    if large:
        log.warning("%s", large)


def _large_contamination(report: Mapping[str, Any]) -> str:
    """What contamination takes from the training rows, if it is more than LARGE of them."""
    lost = report["rejected_by_reason"].get("contamination", 0)
    if lost <= LARGE * report["rows_in"]:
        return ""
    found = [file for file, kinds in report["contamination"]["files"].items() if any(kinds.values())]
    rows = f"{lost:,} of {count(report['rows_in'], 'row')} ({100 * lost / report['rows_in']:.0f} %)"
    reason = f"they occur in {', '.join(found)}"
    return f"{rows} are not trained on, because {reason}; on_contamination=keep trains them"


def _summary(report: Mapping[str, Any], max_length: int) -> Iterator[tuple[str, str]]:
    for file in report["files"]:
        yield (
            "file",
            f"{file['file']}  {file['format']}, {count(file['rows_in'], 'row')} in, "
            f"{file['rows_trained']:,} trained"
            + (f", {file['rows_held_out']:,} held out" if "rows_held_out" in file else ""),
        )
    yield "rows", _equation(report)
    for reason, number in report["rejected_by_reason"].items():
        yield "  rejected", f"{number:,} {reason}"
    if "held_out" in report:
        held = report["held_out"]
        setting = f"eval_split={held['eval_split']:g} and seed={held['seed']}"
        yield "held out", f"{report['rows_held_out']:,} as the split {held['split']}, by {setting}"
    tokens = report["tokens"]
    share = 100 * tokens["with_loss"] / max(1, tokens["total"])
    with_loss = f", {tokens['with_loss']:,} of them with loss ({share:.1f} %)" if "labels" not in report else ""
    yield "tokens", f"{tokens['total']:,}{with_loss}"
    if "labels" in report:
        yield "labels", ", ".join(f"{label} {count:,}" for label, count in _most(report["labels"]))
    yield "row length", "  ".join(f"{name} {length:,}" for name, length in tokens["row_length"].items())
    over = report["rejected_by_reason"].get("over_length", 0)
    yield f"over max_length={max_length}", f"{over:,} rejected, {len(report['cut']):,} cut"
    yield "duplicates", _kind_counts(report["duplicates"])
    for file, kinds in report["contamination"]["files"].items():
        yield "also in", f"{file}: {_kind_counts(kinds)}"
    if report["mask"]["checked"]:
        yield "mask", _mask_line(report["mask"])


def _equation(report: Mapping[str, Any]) -> str:
    """Rows in = rows trained + rows rejected + rows held out."""
    several = f" ({report['examples']:,} examples)" if report["examples"] != report["rows_trained"] else ""
    equation = f"{report['rows_in']:,} in = {report['rows_trained']:,} trained{several}"
    equation += f" + {len(report['rejected']):,} rejected"
    return equation + (f" + {report['rows_held_out']:,} held out" if "held_out" in report else "")


def _most(labels: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent labels first, as many as are shown."""
    return sorted(labels.items(), key=lambda item: -item[1])[:MAX_LISTED]


def _kind_counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{counts[kind]:,} {kind}" for kind in KINDS)


def _mask_line(mask: Mapping[str, Any]) -> str:
    line = f"{mask['agree']:,} of {mask['checked']:,} checked are the same by a second derivation"
    line += f", {mask['disagree']:,} differ" if mask["disagree"] else ""
    return line + "".join(f"; {count:,}: {why}" for why, count in mask["not_comparable"].items())


def _rejections(report: Mapping[str, Any]) -> Iterator[str]:
    rejected = [r for r in report["rejected"] if r["reason"] not in EXPECTED_REASONS]
    for r in rejected[:MAX_LISTED]:
        yield f"rejected: {r['file']}:{r['line']} {r['detail']}"
    if len(rejected) > MAX_LISTED:
        yield f"... and {len(rejected) - MAX_LISTED} more, all in data_report.json"
    for cut in report["cut"][:MAX_LISTED]:
        yield f"cut: {cut['file']}:{cut['line']} {cut['detail']}"
    if len(report["cut"]) > MAX_LISTED:
        yield f"... and {len(report['cut']) - MAX_LISTED} more, all in data_report.json"


def _spread(count: int) -> list[int]:
    """The first, the middle and the last of `count`."""
    return sorted({0, count // 2, count - 1}) if count else []


def _coloured(
    example: Example, number: int, chat: ChatTokenizer, labels: Sequence[str], *, coloured: bool
) -> Text:
    """The text of an example. Tokens with loss are green or, without colour, between ⟦ and ⟧."""
    length = count(len(example.ids) - bool(labels), "token")
    with_loss = "the label" if labels else sum(example.loss_mask)
    heading = f"\nexample {number + 1:,}, {length}, {with_loss} with loss:\n"
    shown = Text().append(heading, style="bold")
    for trained, tokens in groupby(zip(example.ids, example.loss_mask, strict=True), key=lambda pair: pair[1]):
        ids = [token for token, _ in tokens]
        text = str(redact(labels[ids[0]] if labels and trained else chat.tokenizer.decode(ids)))
        if len(shown) + len(text) > MAX_SHOWN_CHARS:
            text = f"{text[: max(0, MAX_SHOWN_CHARS - len(shown))]} ... "
        shown.append(text if coloured or not trained else f"⟦{text}⟧", style="green" if trained else "dim")
        if len(shown) > MAX_SHOWN_CHARS:
            break
    return shown
