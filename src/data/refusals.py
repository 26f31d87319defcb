"""Rows that are no supervised text: preference pairs, pictures, prompts alone. Each is refused by what it is.

A kind is one entry in KINDS: the columns that tell it, what it is, and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from .conversation import Message, RowError
from .source_row import SourceRow, has_value


class UnsupportedKind(NamedTuple):
    """A kind of row. `fact` follows "is", `remedy` is an imperative.

    columns: they tell the kind by holding a value that is no number.
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
        )),
        "preference data, which is not supported: supervised training would train on the rejected answers as well",
        "to train on the preferred answers, name their column with answer_key, or keep the rows whose label is "
        "true and remove that column",
    ),
    "multimodal": UnsupportedKind(
        frozenset(("image", "images", "video", "videos", "audio", "audios", "image_path", "image_url")),
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
VERDICTS = ("true", "false")
MEDIA = re.compile(r"<(img|image|audio|video)>[^<>\s]+</\1>")  # a path or address in a text, as Qwen-VL has it


def refuse_unsupported(row: SourceRow, named: Collection[str] = ()) -> None:
    """Raises: RowError if the columns of a row tell that it is no supervised text.

    Args:
        named: columns that the user has named as question or answer. They are taken at the user's word.
    """
    if TELLTALE.isdisjoint(row) and TELLTALE.isdisjoint(str(name).lower() for name in row):
        return
    for reason, kind in KINDS.items():
        told = [name for name in sorted(kind.columns) if _tells(row.get(row.find(name) or ""))]
        if told and kind.columns.isdisjoint(named) and (not kind.beside or row.find(kind.beside)):
            raise RowError(reason, f"is {kind.fact} (it has {', '.join(told)})")
    label = row.get(row.find("label") or "")
    verdict = isinstance(label, bool) or (isinstance(label, str) and label.strip().lower() in VERDICTS)
    if verdict and "label" not in named and "text" not in row:
        raise RowError(
            "preference_data", f"is {KINDS['preference_data'].fact} (its label is {str(label).lower()})"
        )


def _tells(value: object) -> bool:
    return has_value(value) and not isinstance(value, int | float)


def refuse_media(turns: Collection[Message]) -> None:
    """Raises: RowError if a text holds the address of an image, audio or video between tags."""
    for turn in turns:
        found = MEDIA.search(turn["content"]) if "</" in turn["content"] else None
        if found and turn["role"] == "user":
            raise RowError("multimodal", f"is {KINDS['multimodal'].fact} (it has {found[0][:60]})")
