"""The data report: what became of every row (rows in = trained + rejected + held out), as JSON and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MAX_LISTED, DataError
from ..utils.files import sha256
from ..utils.secrets import redact_secrets
from ..utils.units import count
from .duplicates import KINDS
from .file_report import file_findings
from .loss_flags import FLAGS
from .source_row import is_harmless
from .store import Array, DuplicateMatch, RowStore, TokenCounts
from .tokens import Dropped, TokenizeStats

HELD_OUT = "held_out"  # folder of a run, with the rows that are held out
EXPECTED_REASONS = {"not_sampled"}  # reasons that follow from a setting and are not findings
REMEDIES = {
    "not_utf8": " (encoding=cp1252 reads most files that Excel writes)",
    "rest_of_file": " (a file breaks off; the row rejected before them says where)",
    "dropped_by_template": " (chat_template and chat_template_kwargs choose how a row is rendered)",
}
UNREAD_REMEDY = "; user_prompt puts columns into the request"
LAST_ROW = {  # reason -> remedy, if no row is left to train on
    "over_length": "raise max_length",
    "dropped_by_template": "change the data, or choose another chat_template or chat_template_kwargs",
}
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
        main_reason = next(iter(report["rejected_by_reason"]), "")  # the most frequent comes first
        remedy = LAST_ROW.get(main_reason, "change the data or the model")
        raise DataError(*problems, hint=f"no row is left to train on; {remedy}")
    if strict and report["findings"]:
        raise DataError(*report["findings"], hint="fix the data, or set strict_data=false")


def build_report(
    store: RowStore,
    dropped: Sequence[Dropped],
    stats: TokenizeStats,
    rows: Array,
    counts: TokenCounts,
    eval_files: Sequence[Path],
    uncompared: Mapping[str, int],
    not_matched: Sequence[str] = (),
) -> dict[str, Any]:
    """The data report, as data_report.json holds it.

    Args:
        dropped: rows that the settings leave out.
        stats: what became of the other rows in tokenization.
        rows: (examples,), the row of each example.
        counts: tokens, and tokens with loss, of each example.
        uncompared: by evaluation file, the rows that cannot be read.
        not_matched: data files that lie beside the training files.
    """
    rejected = [*store.rejected(), *(store.rejection(*row) for row in (*dropped, *stats.rejected))]
    order = {file: number for number, file in enumerate(store.files)}
    rejected.sort(key=lambda r: (order[r.file], r.line))
    trained = np.unique(rows)
    per_file = np.bincount(store.file_indices(trained), minlength=len(store.files)).tolist()
    by_reason: Counter[str] = Counter()
    for row in rejected:
        by_reason[row.reason] += row.rows
    found: dict[str, Any] = {
        "rows_in": sum(file["rows_in"] for file in store.about["files"]),
        "rows_trained": len(trained),
        "rows_held_out": 0,
        "examples": len(rows),
        "rejected": [
            {"file": str(r.file), "line": r.line, "reason": r.reason, "detail": r.detail}
            | ({"rows": r.rows} if r.rows > 1 else {})
            for r in rejected
        ],
        "rejected_by_reason": dict(by_reason.most_common()),
        "cut": [_location(store, row) | {"detail": row.detail} for row in stats.cut],
        "files": [
            {key: file[key] for key in ("file", "sha256", "format", "rows_in")}
            | {"rows_trained": count}
            | {key: file[key] for key in ("read_as", "like_held_out") if file[key]}
            for file, count in zip(store.about["files"], per_file, strict=True)
        ],
        "tokens": {
            "total": int(counts.tokens.sum()),
            "with_loss": int(counts.with_loss.sum()),
            "row_length": _percentiles(counts.tokens),
        },
        "duplicates": _matches(store, "duplicates"),
        "contamination": {"files": _overlaps(store, eval_files), **_matches(store, "contamination")}
        | ({"not_compared": dict(uncompared)} if uncompared else {}),
        "unread": [
            each | ({"harmless": True} if is_harmless(each["key"]) else {}) for each in store.about["unread"]
        ],
        "mask": _mask(stats),
        "no_end_of_turn": stats.no_end_of_turn,
        "rows_with_thoughts": stats.with_thoughts,
        "dropped_by_template": [
            {"what": what, "rows": n.rows, "rejected": n.rejected, "example": store.location(n.first)}
            for what, n in stats.dropped.items()
        ],
        "passed_to_template": [
            {"what": what, "rows": n.rows, "example": store.location(n.first)} for what, n in stats.changed.items()
        ],
    }
    found |= {"not_matched": list(not_matched)} if not_matched else {}
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
    names = [str(redact_secrets(str(file))) for file in eval_files]  # matches are stored redacted
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
        f"{count(n, 'row is', 'rows are')} rejected: {reason}{REMEDIES.get(reason, '')}"
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
            sum(found["contamination"].get("not_compared", {}).values()),
            "evaluation row is", "evaluation rows are",
            "unreadable: training rows were compared with the others only",
        ),
        (
            found["mask"]["disagree"] - found["rejected_by_reason"].get("disputed_mask", 0), "mask", "masks",
            "differ from their second derivation and are trained on (on_disputed_mask=warn)",
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
    lost = [
        f"{count(n, 'row has', 'rows have')} {each['what']} that the chat template leaves out ({each['example']})"
        for each in found["dropped_by_template"]
        if (n := each["rows"] - each["rejected"])
    ]
    return [
        *rejected,
        *file_findings(found),
        *_unread(found.get("unread", [])),
        *(f"{count(number, one, many)} {what}" for number, one, many, what in more if number),
        *lost,
    ]


def _unread(unread: Sequence[dict[str, Any]]) -> list[str]:
    """That values of the rows are not read, all keys in one sentence; empty if none matters."""
    named = [f"{each['key']} ({count(each['rows'], 'row')})" for each in unread if not each.get("harmless")]
    if not named:
        return []
    more = f" and {len(named) - MAX_LISTED} more" if len(named) > MAX_LISTED else ""
    columns = [each for each in named if "[]" not in each and each.partition(" ")[0].lower() not in FLAGS]
    remedy = UNREAD_REMEDY if columns else ""
    return [f"not read, and so not trained on: {', '.join(named[:MAX_LISTED])}{more}{remedy}"]


def _kinds(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
