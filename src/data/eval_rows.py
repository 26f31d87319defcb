"""Rows of evaluation files: in every format that has an answer, asked as the run asks its training rows.

A row that has the columns of the training data is read by them. Any other is read by its own format, with the
prompt template and the system text of the training. The last answer is the reference, unless another is named.

Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..schema import ColumnArgs
from .column_mapping import choose_translation, fill_template, required_columns, with_system
from .conversation import TEXT, Message, RowError
from .formats import FORMATS, ParsedRow, Translation, parse_row, prompt_completion
from .source_row import SourceRow, has_value

REFERENCE_TURN = "reference_turn"  # setting, and column of a row, which wins
COLUMN_KEYS = tuple(ColumnArgs.__dataclass_fields__)
MAPPING = ("strategy", "question_key", "answer_key", "label_key", "user_prompt")  # they make sense together only


class Reading(NamedTuple):
    """How the rows of evaluation files are read.

    columns: those of the training data, with its prompt template and system text.
    reference_turn: the answer that is the reference: 1 is the first, -1 the last; None: the last.
    """

    columns: ColumnArgs
    reference_turn: int | None = None

    @classmethod
    def of(cls, settings: Any) -> Reading:
        """The reading that a stage's settings ask for. Raises: ConfigError if there can be no such answer."""
        if settings.reference_turn == 0:
            raise ConfigError("reference_turn=0 names no answer", hint="1 is the first answer, -1 the last")
        return cls(ColumnArgs(**{key: getattr(settings, key) for key in COLUMN_KEYS}), settings.reference_turn)

    @property
    def identity(self) -> dict[str, Any]:
        """Whatever is set, for cache keys and records."""
        values = asdict(self.columns) | {REFERENCE_TURN: self.reference_turn}
        return {key: value for key, value in values.items() if value is not None}


AS_WRITTEN = Reading(ColumnArgs())  # of rows that a run held out, which are conversations as it trains them


def shared_columns(parts: Sequence[ColumnArgs]) -> ColumnArgs:
    """The columns by which evaluation rows are read, of several data sets.

    Those of the data sets that name columns, if they are the same; and the system text if all have the same.
    """
    ways: list[dict[str, Any]] = []
    for part in parts:
        way = {key: value for key, value in asdict(part).items() if key in MAPPING and value is not None}
        ways += [way] if way and way not in ways else []
    values = {key: [getattr(part, key) for part in parts] for key in COLUMN_KEYS if key not in MAPPING}
    agreed = {key: found[0] for key, found in values.items() if found and found.count(found[0]) == len(found)}
    return ColumnArgs(**agreed, **(ways[0] if len(ways) == 1 else {}))


def parse_evaluation_row(value: object, reading: Reading, translate: Translation) -> ParsedRow:
    """A row of an evaluation file, up to the answer that is the reference.

    Args:
        translate: `evaluation_translation` of the columns of `reading`.
    Raises: RowError if the row cannot be used, or has no such answer.
    """
    if isinstance(value, RowError):
        raise value
    found = parse_row(value, translate)
    number = _own_reference(value, reading.reference_turn)
    found.unread.discard(REFERENCE_TURN)
    if number is None or found.messages[0]["role"] == TEXT:
        return found
    answers = [i for i, turn in enumerate(found.messages) if turn["role"] == "assistant"]
    if not -len(answers) <= number <= len(answers) or number == 0:
        there = "one answer" if len(answers) == 1 else f"{len(answers)} answers"
        raise RowError("no_reference", f"has {there}, and reference_turn={number} names none of them")
    end = answers[number - 1 if number > 0 else number]
    return found._replace(messages=found.messages[: end + 1])


def evaluation_translation(columns: ColumnArgs) -> Translation:
    """The translation of evaluation rows, row by row: by these columns if the row has them, else by its format."""
    mapped = choose_translation(replace(columns, system_prompt=None), "messages")
    names = required_columns(columns)

    def translate(row: SourceRow) -> list[Message]:
        probe = SourceRow(row)
        if names and all(has_value(probe.at(name)) for name in names):
            return mapped(row)
        turns = _by_format(row)
        for turn in turns if columns.user_prompt else ():
            if turn["role"] == "user":
                turn["content"] = _asked(columns, row, turn["content"])
        return turns

    return with_system(translate, columns.system_prompt) if columns.system_prompt else translate


def _by_format(row: SourceRow) -> list[Message]:
    """Prompt and completion first, as the documents show evaluation files; then the first format that matches."""
    first = [name for name in ("prompt_completion",) if "prompt" in row and "message_tree_id" not in row]
    order = [*first, "classification", *FORMATS]
    found = (FORMATS[name].translate for name in order if FORMATS[name].matches(row))
    return next(found, prompt_completion)(row)


def _asked(columns: ColumnArgs, row: SourceRow, request: str) -> str:
    """A request in the prompt template of the training."""
    template = columns.user_prompt or ""
    if columns.question_key:
        template = template.replace(f"{{{columns.question_key}}}", "{question}")
    return fill_template(template, row, request)


def _own_reference(value: object, setting: int | None) -> int | None:
    """The reference that a row names, as a number or as the text of a table's cell; else the setting."""
    own = value.get(REFERENCE_TURN) if isinstance(value, dict) else None
    if not has_value(own):
        return setting
    try:
        return int(str(own))  # which a fraction and a truth value are not
    except ValueError:
        raise RowError("no_reference", f"has a {REFERENCE_TURN} that is not a whole number") from None
