"""The data report as people read it: lines of the log, and three examples with the tokens that carry loss."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from .. import outcome
from ..errors import MAX_LISTED
from ..utils.logs import SafeConsole, log, silence_stdout
from ..utils.secrets import redact_secrets
from ..utils.units import count
from .chat import ChatTokenizer
from .duplicates import KINDS
from .report import EXPECTED_REASONS
from .store import Example, TokenStore

CONTAMINATION = re.compile(r"contamination$|rows occur in the evaluation (files|data)$")  # in a finding
FEW = 20  # rows: the default of gate.min_examples, below which a verdict is inconclusive
LARGE = 0.1  # share of the rows from which contamination is reported by itself
MAX_SHOWN_CHARS = 1_500  # of an example


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
            print(captured.get(), end="", file=console.file, flush=True)
    except BrokenPipeError:
        silence_stdout()
    large = _large_contamination(tokens.report)
    for finding in tokens.report["findings"]:
        if not (large and CONTAMINATION.search(finding)):
            log.warning("%s", finding)
    for line in filter(None, (_odd_labels(tokens.report), _few_held_out(tokens.report), large)):
        log.warning("%s", line)


def _odd_labels(report: Mapping[str, Any]) -> str:
    """The labels that differ in case or white space only, or have one row; empty if there are none."""
    labels: Mapping[str, int] = report.get("labels", {})
    alike = Counter("".join(name.casefold().split()) for name in labels)
    facts = {
        "differ in case only": [name for name in labels if alike["".join(name.casefold().split())] > 1],
        "occur once": [name for name, number in labels.items() if number == 1],
    }
    found = [f"{', '.join(names[:MAX_LISTED])} {fact}" for fact, names in facts.items() if names]
    return f"labels: {'; '.join(found)}; each is a class of its own" if found else ""


def _few_held_out(report: Mapping[str, Any]) -> str:
    """That `eval_split` holds out too few rows for a verdict; else empty."""
    rows, setting = report["rows_held_out"], report.get("held_out", {}).get("eval_split")
    few = setting is not None and rows < FEW
    return (
        f"eval_split={setting:g} holds out {count(rows, 'row')}, and a verdict needs {FEW} or more" if few else ""
    )


def _large_contamination(report: Mapping[str, Any]) -> str:
    """What contamination takes from the training rows, if it is more than LARGE of them."""
    lost = report["rejected_by_reason"].get("contamination", 0)
    if lost <= LARGE * report["rows_in"]:
        return ""
    rows = f"{lost:,} of {count(report['rows_in'], 'row')} ({100 * lost / report['rows_in']:.0f} %)"
    found = [
        f"{file} ({', '.join(f'{number:,} {kind}' for kind, number in kinds.items() if number)})"
        for file, kinds in report["contamination"]["files"].items()
        if any(kinds.values())
    ]
    reason = f"they repeat rows of {' and '.join(found)}"
    remedy = "on_contamination=keep trains them, and no verdict is valid then; eval_path names other questions"
    return f"{rows} are not trained on: {reason}; {remedy}"


def _summary(report: Mapping[str, Any], max_length: int) -> Iterator[tuple[str, str]]:
    for file in report["files"]:
        yield (
            "file",
            f"{file['file']}  {file['format']}, {count(file['rows_in'], 'row')} in, "
            f"{file['rows_trained']:,} trained"
            + (f", {file['rows_held_out']:,} held out" if "rows_held_out" in file else "")
            + (f"; {file['read_as']}" if "read_as" in file else ""),
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
    if report.get("unread"):
        yield "not read", ", ".join(f"{each['key']} {each['rows']:,}" for each in report["unread"])
    for key, title in (("dropped_by_template", "left out"), ("passed_to_template", "rendered")):
        if report.get(key):
            yield title, "; ".join(f"{each['what']} {each['rows']:,}" for each in report[key])
    if report["mask"]["checked"]:
        yield "mask", _mask_line(report["mask"])


def _equation(report: Mapping[str, Any]) -> str:
    """Rows in = rows trained + rows rejected + rows held out."""
    several = f" ({report['examples']:,} examples)" if report["examples"] != report["rows_trained"] else ""
    equation = f"{report['rows_in']:,} in = {report['rows_trained']:,} trained{several}"
    equation += f" + {sum(report['rejected_by_reason'].values()):,} rejected"
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
        text = str(redact_secrets(labels[ids[0]] if labels and trained else chat.tokenizer.decode(ids)))
        if len(shown) + len(text) > MAX_SHOWN_CHARS:
            text = f"{text[: max(0, MAX_SHOWN_CHARS - len(shown))]} ... "
        shown.append(text if coloured or not trained else f"⟦{text}⟧", style="green" if trained else "dim")
        if len(shown) > MAX_SHOWN_CHARS:
            break
    return shown
