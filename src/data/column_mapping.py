"""Column mapping: rows whose columns the user names, with an optional prompt template.

The settings are those of aiDAPTIV charts: strategy, question_key, answer_key, label_key, user_prompt and
system_prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError
from ..schema import ColumnArgs
from .columns import ANSWERS, REQUESTS, SYSTEMS, TURNS, history_of, turns_in, turns_of
from .conversation import TEXT, Message, RowError
from .formats import FORMATS, Translation
from .refusals import refuse_unsupported
from .source_row import SourceRow, as_text, has_value, parsed, reason_name, text_of
from .turns import ROLE_NAMES, read_turns

PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
NAME = re.compile(
    r"\w+(?:[ .\-/]+\w+|\[\d+\])*"
)  # what is taken for the name of a column, although no column has it


def strategy_of(args: ColumnArgs) -> str | None:
    """The strategy of the settings. A named column implies QA; None if no column is named."""
    return args.strategy or ("QA" if args.question_key or args.answer_key or args.user_prompt else None)


def choose_translation(args: ColumnArgs, data_format: str) -> Translation:
    """The translation of a row into messages: by columns if they are named, else by its format.

    Raises: ConfigError if the column settings contradict each other.
    """
    strategy = strategy_of(args)
    if args.label_key not in (None, args.answer_key):
        raise ConfigError(
            f"label_key={args.label_key} differs from answer_key={args.answer_key}: the loss is on the answer",
            hint="name the same column in both, or leave label_key out",
        )
    if strategy == "Chat" and args.answer_key:
        raise ConfigError(
            "answer_key is not supported with strategy=Chat, which reads all turns from question_key",
            hint="leave answer_key out, or set strategy=QA",
        )
    found = STRATEGIES[strategy](args) if strategy else FORMATS[data_format].translate
    return with_system(found, args.system_prompt) if args.system_prompt else found


def required_columns(args: ColumnArgs) -> list[str]:
    """The columns or paths without which no row can be read by these settings; empty if they name none."""
    if strategy_of(args) == "Chat":
        return [args.question_key or "messages"]
    if strategy_of(args) is None:
        return []
    named = [key for key in (args.question_key, args.answer_key) if key]
    needs_question = not args.question_key and not named and not _asks_without_question(args)
    return [*(["question"] if needs_question else []), *named, *([] if named else ["answer"])]


def _asks_without_question(args: ColumnArgs) -> bool:
    """Whether the prompt template makes the request of other columns than the question."""
    template = args.user_prompt
    return bool(template) and not args.question_key and "question" not in PLACEHOLDER.findall(template or "")


def _qa(args: ColumnArgs) -> Translation:
    no_question = _asks_without_question(args)

    def translate(row: SourceRow) -> list[Message]:
        question = args.question_key or _known(
            row, ("question", *REQUESTS, "instruction", *TURNS), args.answer_key
        )
        answer = args.answer_key or _known(row, ("answer", *ANSWERS), question)
        refuse_unsupported(row, (question, answer))
        alone = question if not args.answer_key else answer if row.find(question) is None else ""
        if alone and not args.user_prompt and _is_conversation(row.at(alone)):
            return read_turns(parsed(row.at(alone)), row)
        if args.user_prompt:
            asked = None if no_question else text_of(row, question)
            request: list[Any] = [{"role": "user", "content": fill_template(args.user_prompt, row, asked)}]
        else:
            request = _turns_at(row, question, "user")
        answers = _turns_at(row, answer, "assistant")
        if len(answers) > 1 and read_turns(answers, row)[0]["role"] != "assistant":
            return read_turns(answers, row)  # a preferred answer with all that was said before it
        return [*history_of(row), *read_turns([*request, *answers], row)]

    return translate


def _known(row: SourceRow, names: tuple[str, ...], other: str | None) -> str:
    """The column of a request or an answer that the user does not name: one of `names`, but not the `other`."""
    return row.find(*(name for name in names if name != other)) or names[0]


def _is_conversation(value: object) -> bool:
    """Whether the value of a column is a list of turns that ends with an answer."""
    turns = parsed(value)
    last = turns[-1] if isinstance(turns, list) and len(turns) > 1 else None
    return (
        isinstance(last, dict) and ROLE_NAMES.get(str(last.get("role", last.get("from"))).lower()) == "assistant"
    )


def _turns_at(row: SourceRow, path: str, role: str) -> list[Any]:
    """The turns in a column: a list of them, one, or a text as the turn of `role`."""
    value = row.at(path)
    turns = [value] if isinstance(value, dict) else turns_in(value)
    if turns and all(isinstance(turn, dict) for turn in turns):
        return turns
    return [{"role": role, "content": text_of(row, path)}]


def _chat(args: ColumnArgs) -> Translation:
    key = args.question_key or "messages"

    def translate(row: SourceRow) -> list[Message]:
        refuse_unsupported(row, (key,))
        turns = read_turns(turns_of(row, key), row)
        for turn in turns if args.user_prompt else ():
            if turn["role"] == "user":
                turn["content"] = fill_template(args.user_prompt or "", row, turn["content"])
        return turns

    return translate


STRATEGIES: dict[str, Callable[[ColumnArgs], Translation]] = {"QA": _qa, "Chat": _chat}


def fill_template(template: str, row: SourceRow, question: str | None) -> str:
    """`template` with each `{column}` replaced, and `{question}` by `question` unless that is None.

    Braces around what is neither a column nor a name are kept.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name == "question" and question is not None:
            return question
        if row.find(name) is None and not NAME.fullmatch(name):
            return found[0]
        text = as_text(row.at(name))
        if text is None:
            raise RowError(f"no_{reason_name(name)}", f"has no text under {name!r}, which user_prompt names")
        return text

    return PLACEHOLDER.sub(value, template)


def with_system(translate: Translation, system: str) -> Translation:
    """`translate`, with a system turn for rows that have no system text of their own."""

    def translate_with_system(row: SourceRow) -> list[Message]:
        turns = translate(row)
        own = row.find(*SYSTEMS)
        if turns[0]["role"] in ("system", "developer", TEXT) or (own and has_value(row[own])):
            return turns
        return [{"role": "system", "content": system}, *turns]

    return translate_with_system
