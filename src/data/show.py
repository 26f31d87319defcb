"""The data report for people: a table, and examples with the tokens that carry loss marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from src.data.chat import ChatTokenizer
from src.data.report import EXPECTED_REASONS, KINDS
from src.data.store import Example, TokenStore
from src.errors import MAX_LISTED
from src.utils.logs import SafeConsole, log, silence_stdout
from src.utils.secrets import redact

LONGEST = 1_500  # characters of an example that are shown


def print_report(tokens: TokenStore, chat: ChatTokenizer, max_length: int) -> None:
    """Log the report of `tokens`, and print three of its examples."""
    lines = [("training data", ""), *_lines(tokens.report, max_length)]
    width = max(len(what) for what, _ in lines)
    for what, value in lines:
        log.info("%s", f"{what:<{width}}  {value}".rstrip())
    for line in _rejections(tokens.report):
        log.warning("%s", line)
    console = SafeConsole()
    with console.capture() as captured:
        for number in _spread(len(tokens)):
            labels = list(tokens.report.get("labels", []))
            shown = _example(tokens[number], number, chat, labels, coloured=console.color_system is not None)
            console.print(shown, soft_wrap=True)
    try:
        print(captured.get(), end="", flush=True)
    except BrokenPipeError:
        silence_stdout()
    for finding in tokens.report["findings"]:
        log.warning("finding: %s", finding)


def _lines(report: Mapping[str, Any], max_length: int) -> Iterator[tuple[str, str]]:
    for file in report["files"]:
        yield (
            "file",
            f"{file['file']}  {file['format']}, {file['rows_in']:,} rows in, {file['rows_trained']:,} trained",
        )
    rejected = len(report["rejected"])
    several = f" ({report['examples']:,} examples)" if report["examples"] != report["rows_trained"] else ""
    yield "rows", f"{report['rows_in']:,} in = {report['rows_trained']:,} trained{several} + {rejected:,} rejected"
    for reason, count in report["rejected_by_reason"].items():
        yield "  rejected", f"{count:,} {reason}"
    tokens = report["tokens"]
    share = 100 * tokens["with_loss"] / max(1, tokens["total"])
    with_loss = f", {tokens['with_loss']:,} of them with loss ({share:.1f} %)" if "labels" not in report else ""
    yield "tokens", f"{tokens['total']:,}{with_loss}"
    if "labels" in report:
        yield "labels", ", ".join(f"{label} {count:,}" for label, count in _most(report["labels"]))
    yield "row length", "  ".join(f"{name} {length:,}" for name, length in tokens["row_length"].items())
    over = report["rejected_by_reason"].get("over_length", 0)
    yield f"over max_length={max_length}", f"{over:,} rejected, {len(report['cut']):,} cut"
    yield "duplicates", _kinds(report["duplicates"])
    for file, kinds in report["contamination"]["files"].items():
        yield "also in", f"{file}: {_kinds(kinds)}"
    if report["mask"]["checked"]:
        yield "mask", _mask(report["mask"])


def _most(labels: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent labels first, as many as are shown."""
    return sorted(labels.items(), key=lambda item: -item[1])[:MAX_LISTED]


def _kinds(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{counts[kind]:,} {kind}" for kind in KINDS)


def _mask(mask: Mapping[str, Any]) -> str:
    said = f"{mask['agree']:,} of {mask['checked']:,} checked are the same by a second derivation"
    said += f", {mask['disagree']:,} differ" if mask["disagree"] else ""
    return said + "".join(f"; {count:,}: {why}" for why, count in mask["not_comparable"].items())


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


def _example(example: Example, number: int, chat: ChatTokenizer, labels: Sequence[str], *, coloured: bool) -> Text:
    """The text of an example; what carries loss is green, or between ⟦ and ⟧ where there is no colour."""
    count = f"{len(example.ids) - 1} tokens" if labels else f"{len(example.ids)} tokens"
    with_loss = "the label" if labels else sum(example.loss_mask)
    heading = f"\nexample {number + 1}, {count}, {with_loss} with loss:\n"
    shown = Text().append(heading, style="bold")
    for learnt, tokens in groupby(zip(example.ids, example.loss_mask, strict=True), key=lambda pair: pair[1]):
        ids = [token for token, _ in tokens]
        text = str(redact(labels[ids[0]] if labels and learnt else chat.tokenizer.decode(ids)))
        if len(shown) + len(text) > LONGEST:
            text = f"{text[: max(0, LONGEST - len(shown))]} ... "
        shown.append(text if coloured or not learnt else f"⟦{text}⟧", style="green" if learnt else "dim")
        if len(shown) > LONGEST:
            break
    return shown
