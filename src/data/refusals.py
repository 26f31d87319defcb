"""Rows that are no supervised text: preference pairs, pictures, prompts alone. Each is refused by what it is.

A kind is one entry in KINDS: the columns that tell it, what it is, and the way out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .columns import ANSWERS, TURNS
from .conversation import Message, RowError
from .media import is_media, place_of_media
from .source_row import SourceRow, has_value, parsed
from .turns import ROLE_NAMES


class UnsupportedKind(NamedTuple):
    """A kind of row. `fact` follows "is", `remedy` is an imperative.

    columns: they tell the kind by holding a value that is no number, or any value for those in NUMBERS.
    beside: a column that the row has as well, with or without a value; empty if none is needed.
    """

    columns: frozenset[str]
    fact: str
    remedy: str
    beside: str = ""


# fmt: off
KINDS: dict[str, UnsupportedKind] = {
    "preference_data": UnsupportedKind(
        frozenset((
            "chosen", "rejected", "chosen_messages", "rejected_messages", "chosen_response", "rejected_response",
            "preferred_output", "non_preferred_output", "better_response_id", "safer_response_id", "kto_tag",
            "desirable", "is_desirable", "is_chosen", "is_preferred", "kto_label", "thumbs_up", "thumbs_down",
            "chosen_answer", "rejected_answer", "chosen_completion", "rejected_completion", "chosen_text",
            "rejected_text", "response_chosen", "response_rejected", "chosen_conversations",
            "rejected_conversations", "dispreferred",
        )),
        "preference data, which is not supported: supervised training would train on the rejected answers as well",
        "to train on the preferred answers, name their column with answer_key (question_key, where it holds the "
        "turns with them), or keep the rows whose label is true and remove that column",
    ),
    "multimodal": UnsupportedKind(
        frozenset(),  # media.py tells them
        "about images, audio or video, which are not supported: its text speaks of what the model does not see",
        "remove these rows or, where the text stands alone, their media columns",
    ),
    "tokenized": UnsupportedKind(
        frozenset(("input_ids",)),
        "tokenized already, for a tokenizer and template that the file does not name",
        "give the texts from which it was made",
    ),
    "embedding_data": UnsupportedKind(
        frozenset((
            "anchor", "positive", "negative", "positives", "negatives", "positive_messages", "negative_messages",
        )),
        "made of texts to compare, as for an embedding model or a reranker, and has no answer to train on",
        "give rows with a request and an answer",
    ),
    "single_messages": UnsupportedKind(
        frozenset(("role",)),
        "one message of a tree of messages, not a conversation",
        "give the export with one tree a row, or one conversation a row as a list under messages",
        beside="parent_id",
    ),
}
# fmt: on
REMEDIES = {reason: kind.remedy for reason, kind in KINDS.items()}
TELLTALE = frozenset[str]().union(*(kind.columns for kind in KINDS.values())) | {"label"}
NUMBERS = {  # columns that tell by a number or a truth value too
    "better_response_id", "safer_response_id", "kto_tag", "kto_label", "desirable", "is_desirable", "is_chosen",
    "is_preferred", "thumbs_up", "thumbs_down",
}  # fmt: skip
VERDICTS = {  # of a label beside an answer, in lower case
    "true", "false", "0", "1", "0.0", "1.0", "-1", "good", "bad", "desirable", "undesirable", "chosen", "rejected",
    "accepted", "thumbs_up", "thumbs_down",
}  # fmt: skip
ASKING = ("user", "system", "developer")


def refuse_unsupported(row: SourceRow, named: Collection[str] = ()) -> None:
    """Raises: RowError if the columns of a row tell that it is no supervised text.

    Args:
        named: columns that the user has named as question or answer. They are taken at the user's word.
    """
    if not TELLTALE.isdisjoint(row) or not TELLTALE.isdisjoint(str(name).lower() for name in row):
        _refuse_kinds(row, named)
    media = sorted(str(name) for name, value in row.items() if is_media(name, value))
    if media and set(media).isdisjoint(named):
        raise RowError("multimodal", f"is {KINDS['multimodal'].fact} (it has {', '.join(media)})")


def _refuse_kinds(row: SourceRow, named: Collection[str]) -> None:
    for reason, kind in KINDS.items():
        told = [name for name in sorted(kind.columns) if _tells(name, row.get(row.find(name) or ""))]
        chosen = not kind.columns.isdisjoint(named) or (reason == "preference_data" and {*TURNS} & {*named})
        if told and not chosen and (not kind.beside or row.find(kind.beside)):
            raise RowError(reason, f"is {kind.fact} (it has {', '.join(told)})")
    label = row.get(row.find("label") or "")
    judged = bool(named) or _has_answer(row)
    if judged and "label" not in named and str(label).strip().lower() in VERDICTS:
        raise RowError(
            "preference_data", f"is {KINDS['preference_data'].fact} (its label is {str(label).lower()})"
        )


def _tells(name: str, value: object) -> bool:
    return has_value(value) and (name in NUMBERS or not isinstance(value, int | float))


def _has_answer(row: SourceRow) -> bool:
    """Whether a row has an answer beside its label, which then judges it and is not the answer itself."""
    turns = parsed(row.get(row.find(*TURNS) or ""))
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        return ROLE_NAMES.get(str(turns[-1].get("role", turns[-1].get("from"))).lower()) != "user"
    return row.find(*ANSWERS) is not None


def refuse_media(turns: Collection[Message]) -> None:
    """Raises: RowError if a text that is asked has a mark in the place of an image, audio or a video."""
    for turn in turns:
        place = place_of_media(turn["content"]) if turn["role"] in ASKING else None
        if place:
            raise RowError("multimodal", f"is {KINDS['multimodal'].fact} (it has {place[:60]})")
