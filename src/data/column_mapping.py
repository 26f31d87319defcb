"""Rows taken by column: a question and an answer, or a list of turns, put into a template of the user's.

The keys are those of the aiDAPTIV charts: strategy, question_key, answer_key, label_key, user_prompt,
system_prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from src.data.formats import (
    FORMATS,
    TEXT,
    Message,
    RawRow,
    RowError,
    Translation,
    conversations,
    single_turn,
    text_of,
    turns_of,
)
from src.errors import ConfigError
from src.schema import ColumnArgs

PLACE = re.compile(r"\{(\w+)\}")


def strategy_of(args: ColumnArgs) -> str | None:
    """The strategy asked for; naming a column asks for QA."""
    return args.strategy or ("QA" if args.question_key or args.answer_key or args.user_prompt else None)


def choose_translation(args: ColumnArgs, data_format: str) -> Translation:
    """How a row becomes messages: by its columns where they are named, else by its format.

    Raises: ConfigError if the columns contradict each other.
    """
    strategy = strategy_of(args)
    if args.label_key not in (None, args.answer_key):
        raise ConfigError(
            f"label_key={args.label_key} is not answer_key={args.answer_key}: what is learnt is the answer",
            hint="name the same column in both, or leave label_key out",
        )
    if strategy == "Chat" and args.answer_key:
        raise ConfigError(
            "answer_key has no meaning with strategy=Chat, which takes every turn from question_key",
            hint="leave answer_key out, or set strategy=QA",
        )
    found = STRATEGIES[strategy](args) if strategy else FORMATS[data_format].translate
    return _with_system(found, args.system_prompt) if args.system_prompt else found


def _qa(args: ColumnArgs) -> Translation:
    question, answer = args.question_key or "question", args.answer_key or "answer"
    whole = args.user_prompt and not args.question_key and "question" not in PLACE.findall(args.user_prompt)

    def translate(row: RawRow) -> list[Message]:
        columns = row if whole else {**row, "question": text_of(row, question)}
        asked = _filled(args.user_prompt, columns) if args.user_prompt else columns["question"]
        return single_turn(asked, text_of(row, answer))

    return translate


def _chat(args: ColumnArgs) -> Translation:
    key = args.question_key or "messages"

    def translate(row: RawRow) -> list[Message]:
        turns = conversations({**row, "conversations": turns_of(row, key)})
        if args.user_prompt:
            for turn in turns:
                if turn["role"] == "user":
                    turn["content"] = _filled(args.user_prompt, {**row, "question": turn["content"]})
        return turns

    return translate


STRATEGIES: dict[str, Callable[[ColumnArgs], Translation]] = {"QA": _qa, "Chat": _chat}


def _filled(template: str, columns: Mapping[str, Any]) -> str:
    """`template` with each `{column}` replaced; other braces stay as they are."""

    def value(place: re.Match[str]) -> str:
        if not isinstance(columns.get(place[1]), str):
            raise RowError(f"no_{place[1]}", f"has no text under {place[1]!r}, which user_prompt names")
        return str(columns[place[1]])

    return PLACE.sub(value, template)


def _with_system(translate: Translation, system: str) -> Translation:
    def translate_with_system(row: RawRow) -> list[Message]:
        turns = translate(row)
        if turns[0]["role"] in ("system", TEXT):
            return turns
        return [{"role": "system", "content": system}, *turns]

    return translate_with_system
