"""Rows for models that read a text and answer apart from it: with an encoder, or by a label.

No chat template is put around such a text: it is what was said before the answer, joined plainly, with the marks
that the tokenizer puts around a text. The answer is the decoder's text, or one of the labels; it stands at the end
of an Example, learnt, where a collator finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from src.data import encode as conversations
from src.data.chat import ChatTokenizer
from src.data.encode import EncodedRow, EncodingOptions
from src.data.formats import TEXT, Message, Row, RowError
from src.data.store import Example
from src.errors import MAX_LISTED, DataError

TEMPLATE_ONLY = (
    "tool_calls",
    "reasoning_content",
)  # what a turn may carry, and only a chat template has a place for


class SourceTarget(NamedTuple):
    """What is read, and what is answered."""

    source: str
    target: str


def source_text(turns: Sequence[Message]) -> str:
    """The text of `turns`, system turn and all, with an empty line between two."""
    return "\n\n".join(turn["content"] for turn in turns)


def trained_answers(row: Row) -> list[str]:
    """The answers with loss, without white space around them."""
    return [turn["content"].strip() for turn in row.messages if _is_taught(turn)]


def encode_pairs(rows: Sequence[Row], chat: ChatTokenizer, rules: EncodingOptions) -> list[EncodedRow | RowError]:
    """Tokenise `rows`, an example an answer; a RowError stands for a row that cannot be trained on."""
    pairs = [_pairs(row, chat, rules) for row in rows]
    flat = [pair for found in pairs if isinstance(found, list) for pair in found]
    sources = iter(_tokens(chat, text=[pair.source for pair in flat]))
    targets = iter(_targets([pair.target for pair in flat], chat, rules))
    found: list[EncodedRow | RowError] = []
    for given in pairs:
        if isinstance(given, RowError):
            found.append(given)
            continue
        tokens = [(pair, next(sources), next(targets)) for pair in given]
        try:
            found.append(_encoded(tokens, chat, rules))
        except RowError as error:
            found.append(error)
    return found


def prompt_ids(chat: ChatTokenizer, row: Row, most: int | None) -> list[int]:
    """Token ids of what stands before the last answer, at most `most` of them: the end is cut off.

    Raises: RowError if the row has what cannot be read.
    """
    _check(row, chat)
    text = source_text(row.messages[:-1])
    ids = _tokens(chat, text=[text])[0]
    return ids if most is None or len(ids) <= most else _cut(chat, text, most, "right")


def refuse_unknown_labels(rows: Sequence[Row], labels: Sequence[str]) -> None:
    """Raises: DataError naming every row whose answer is not one of `labels`."""
    unknown = [(row, label) for row in rows for label in trained_answers(row) if label not in labels]
    if unknown:
        told = [
            f"{row.file}:{row.line} has the label {label!r}, which no training row has" for row, label in unknown
        ]
        known = ", ".join(sorted(labels)[:MAX_LISTED])
        raise DataError(*told[:MAX_LISTED], hint=f"mend the rows, or train on such ones; the labels are: {known}")


def _is_taught(turn: Message) -> bool:
    return turn["role"] == "assistant" and turn.get("weight") != 0


def _pairs(row: Row, chat: ChatTokenizer, rules: EncodingOptions) -> list[SourceTarget] | RowError:
    try:
        _check(row, chat)
        held = next((token for token in _marks(chat) for turn in row.messages if token in turn["content"]), None)
        if held:
            raise RowError("control_token", f"holds the control token {held} as text in a message")
        taught = [i for i, turn in enumerate(row.messages) if _is_taught(turn)]
        if not taught:
            raise RowError("no_loss", "has no token with loss: every answer has weight 0")
        found = [SourceTarget(source_text(row.messages[:i]), row.messages[i]["content"].strip()) for i in taught]
        unknown = [p.target for p in found if rules.task == "classification" and p.target not in rules.labels]
        if unknown:
            raise RowError("unknown_label", f"has the label {unknown[0]!r}, which no training row has")
        return found
    except RowError as error:
        return error


def _check(row: Row, chat: ChatTokenizer) -> None:
    """Raises: RowError if the row is a document, or has what only a chat template could write."""
    if row.messages[0]["role"] == TEXT:
        raise RowError("no_answer", "is a text without an answer or a label")
    carried = [key for turn in row.messages for key in TEMPLATE_ONLY if turn.get(key)]
    if row.tools or carried:
        raise RowError("not_read", f"has {(carried or ['tools'])[0]}, which plain text cannot say")


def _marks(chat: ChatTokenizer) -> list[str]:
    """The tokens that begin, end and fill up a text; inside one they would do so there."""
    names = ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token")
    return [token for name in names if (token := getattr(chat.tokenizer, name, None))]


def _targets(texts: list[str], chat: ChatTokenizer, rules: EncodingOptions) -> list[list[int]]:
    """Token ids of the answers; of a classification the place of each among the labels."""
    if rules.task == "classification":
        return [[rules.labels.index(text)] for text in texts]
    return _tokens(chat, text_target=texts)


def _tokens(chat: ChatTokenizer, **texts: list[str]) -> list[list[int]]:
    """Token ids with the marks around them; `text_target` for what a decoder writes."""
    if not next(iter(texts.values())):
        return []
    return [list(ids) for ids in chat.tokenizer(**texts, verbose=False)["input_ids"]]


def _encoded(
    tokens: Sequence[tuple[SourceTarget, list[int], list[int]]], chat: ChatTokenizer, rules: EncodingOptions
) -> EncodedRow:
    """The examples of a row. A source and an answer may each have `max_length` tokens.

    Raises: RowError if one of them has more, and may not or cannot be cut.
    """
    longest = max(len(ids) for _, *both in tokens for ids in both)
    examples = [_fitted(*each, chat, rules) for each in tokens]
    ends = rules.task == "classification" or all(t[-1] == chat.tokenizer.eos_token_id for _, _, t in tokens)
    note = f"cut from {longest} to {rules.max_length} tokens" if longest > rules.max_length else ""
    return EncodedRow(examples, [], [], note, ends)


def _fitted(
    pair: SourceTarget, read: list[int], target: list[int], chat: ChatTokenizer, rules: EncodingOptions
) -> Example:
    most, rule = rules.max_length, rules.on_overlength
    if len(read) > most and rule == "reject":
        raise RowError("over_length", f"has a text of {len(read)} tokens, over max_length={most}")
    if len(target) > most and rule != "truncate":
        raise RowError("over_length", f"has an answer of {len(target)} tokens, over max_length={most}")
    if len(read) > most:
        read = _cut(chat, pair.source, most, "right" if rule == "truncate" else "left")
    target = target[:most]
    return Example(read + target, [False] * len(read) + [True] * len(target))


def _cut(chat: ChatTokenizer, text: str, most: int, side: str) -> list[int]:
    """At most `most` tokens of `text`, the marks around it kept; what is on `side` goes."""
    before = chat.tokenizer.truncation_side
    chat.tokenizer.truncation_side = side
    try:
        return list(chat.tokenizer(text, truncation=True, max_length=most)["input_ids"])
    finally:
        chat.tokenizer.truncation_side = before


def _chat_prompt(chat: ChatTokenizer, row: Row, most: int | None) -> list[int]:
    return chat.prompt_ids(row.messages[:-1], row.tools)


class TaskEncoding(NamedTuple):
    """How a task's rows become examples, and the tokens before an answer (at most so many, or all for None)."""

    encode: Callable[[Sequence[Row], ChatTokenizer, EncodingOptions], list[EncodedRow | RowError]]
    prompt_ids: Callable[[ChatTokenizer, Row, int | None], list[int]]


TASK_ENCODINGS: dict[str, TaskEncoding] = {
    "causal_lm": TaskEncoding(conversations.encode_chats, _chat_prompt),
    "seq2seq": TaskEncoding(encode_pairs, prompt_ids),
    "classification": TaskEncoding(encode_pairs, prompt_ids),
}
