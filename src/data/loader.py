"""From files to rows to tokens. Every row is trained on, or rejected by file, line and reason.

One tokenisation serves training and evaluation: a conversation is cut where an answer begins and where
it ends, and each piece is tokenised by itself. So the tokens of an evaluation prompt are, token by token,
what the model saw before that answer in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.config import DataArgs
from src.data.formats import Message, RowError, translate
from src.errors import DataError

IGNORED = -100  # label of a token without loss, as torch.nn.CrossEntropyLoss takes it
MOST_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """One training row: its messages and where they stand."""

    file: Path
    line: int
    messages: list[Message]


@dataclass(frozen=True)
class Rejection:
    """A row that is not trained on, and why."""

    file: Path
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.detail}"


@dataclass(frozen=True)
class Example:
    """Token ids of a row, and its labels: the id where there is loss, IGNORED elsewhere. Equal lengths."""

    row: Row
    input_ids: list[int]
    labels: list[int]


def read_lines(path: Path) -> Iterator[tuple[int, object | RowError]]:
    """`(line, value)` of each non-blank line of a JSONL file; a RowError stands for a line that is not JSON."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, json.loads(text)
            except UnicodeDecodeError as error:
                yield number, RowError("not_utf8", f"is not UTF-8 at byte {error.start + 1}")
            except json.JSONDecodeError as error:
                yield number, RowError("not_json", f"is not JSON: {error.msg} at column {error.colno}")
            except RecursionError:
                yield number, RowError("not_json", "is not JSON that can be read: nested too deeply")


def read_rows(files: Sequence[Path], args: DataArgs) -> tuple[list[Row], list[Rejection]]:
    """Rows of JSONL `files`, in order.

    Raises: DataError naming every bad row, unless `on_bad_row=skip` has them rejected and counted.
    """
    rows: list[Row] = []
    rejected: list[Rejection] = []
    for path in files:
        for line, value in read_lines(path):
            try:
                if isinstance(value, RowError):
                    raise value
                rows.append(Row(path, line, translate(value, args.data_format)))
            except RowError as error:
                rejected.append(Rejection(path, line, error.reason, error.detail))
    if rejected and args.on_bad_row == "refuse":
        told = [f"{r} (data_format={args.data_format})" for r in rejected[:MOST_SHOWN]]
        more = len(rejected) - len(told)
        raise DataError(
            *told, *([f"... and {more} more"] if more else []), hint="fix the rows or set on_bad_row=skip"
        )
    if not rows:
        names = ", ".join(str(f) for f in files)
        raise DataError(f"{names}: no row to train on", hint="set dataset_path and dataset_pattern")
    return rows, rejected


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int) -> tuple[list[Example], list[Rejection]]:
    """Tokenise rows; one that the template refuses or that is longer than `max_length` is rejected."""
    examples: list[Example] = []
    rejected: list[Rejection] = []
    for row in rows:
        try:
            ids, labels = encode_messages(row.messages, tokenizer)
            if len(ids) > max_length:
                raise RowError("over_length", f"has {len(ids)} tokens, over max_length={max_length}")
            examples.append(Example(row, ids, labels))
        except RowError as error:
            rejected.append(Rejection(row.file, row.line, error.reason, error.detail))
    return examples, rejected


def encode_messages(turns: Sequence[Message], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation: loss on every answer, its end-of-turn token included.

    Raises: RowError if the chat template refuses the turns, or does not render a longer conversation as a
    continuation of the shorter one.
    """
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for position, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if position == 0:
            raise RowError("no_request", "begins with an answer: there is nothing that it answers")
        before = render(turns[:position], tokenizer, prompt=True)
        after = render(turns[: position + 1], tokenizer)
        if not before.startswith(done) or not after.startswith(before):
            raise RowError("template", "is rendered by the chat template in a way that hides where answers begin")
        asked = _tokens(before[len(done) :], tokenizer)
        answered = _tokens(after[len(before) :], tokenizer)
        learned = _through_end_of_turn(answered, tokenizer.eos_token_id)
        ids += asked + answered
        labels += [IGNORED] * len(asked) + learned + [IGNORED] * (len(answered) - len(learned))
        done = after
    return ids, labels


def encode_prompt(turns: Sequence[Message], tokenizer: Any) -> list[int]:
    """Token ids of a conversation up to the point where the next answer begins."""
    pieces = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not pieces:
        return _tokens(render(turns, tokenizer, prompt=True), tokenizer)
    ids, _ = encode_messages(turns[: pieces[-1] + 1], tokenizer)
    done = render(turns[: pieces[-1] + 1], tokenizer)
    return ids + _tokens(render(turns, tokenizer, prompt=True)[len(done) :], tokenizer)


def render(turns: Sequence[Message], tokenizer: Any, prompt: bool = False) -> str:
    """The text of a conversation; with `prompt`, up to where the next answer begins.

    Raises: RowError if the chat template refuses the turns.
    """
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise RowError("template", f"is refused by the chat template: {error}") from error


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _through_end_of_turn(answered: list[int], eos: int | None) -> list[int]:
    """The answer's tokens up to its last end-of-turn token: what a template writes after it is no answer."""
    if eos is None or eos not in answered:
        return answered
    return answered[: len(answered) - answered[::-1].index(eos)]
