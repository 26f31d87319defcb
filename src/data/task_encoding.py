"""Encoding by task: conversations for causal_lm (encode.py), and source and target for seq2seq and classification.

Without a chat template the source is the text of the turns before the answer, with the special tokens that the
tokenizer adds. The target is the decoder's text, or the index of the label. An Example holds the source without
loss, followed by the target with loss; a collator separates them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..errors import MAX_LISTED, DataError
from .chat import ChatTokenizer
from .encode import EncodedRow, EncodingOptions, encode_chats
from .formats import TEXT, Message, Row, RowError
from .store import Example

TEMPLATE_ONLY = ("tool_calls", "reasoning_content")  # keys of a turn that only a chat template can render


class SourceTarget(NamedTuple):
    """The text that is read, and the answer to it."""

    source: str
    target: str


def source_text(turns: Sequence[Message]) -> str:
    """The text of all `turns`, including a system turn, separated by empty lines."""
    return "\n\n".join(turn["content"] for turn in turns)


def trained_answers(row: Row) -> list[str]:
    """The answers with loss, without surrounding white space."""
    return [turn["content"].strip() for turn in row.messages if _has_loss(turn)]


def encode_pairs(
    rows: Sequence[Row], chat: ChatTokenizer, options: EncodingOptions
) -> list[EncodedRow | RowError]:
    """Encode `rows` as one example per answer. A RowError stands for a row that is rejected."""
    pairs = [_pairs(row, chat, options) for row in rows]
    flat = [pair for found in pairs if isinstance(found, list) for pair in found]
    sources = iter(_tokens(chat, text=[pair.source for pair in flat]))
    targets = iter(_targets([pair.target for pair in flat], chat, options))
    found: list[EncodedRow | RowError] = []
    for row_pairs in pairs:
        if isinstance(row_pairs, RowError):
            found.append(row_pairs)
            continue
        tokens = [(pair, next(sources), next(targets)) for pair in row_pairs]
        try:
            found.append(_encoded(tokens, chat, options))
        except RowError as error:
            found.append(error)
    return found


def prompt_ids(chat: ChatTokenizer, row: Row, max_tokens: int | None) -> list[int]:
    """The token ids of the source of the last answer, cut at the end to `max_tokens`.

    Raises: RowError if the row has content that only a chat template can render.
    """
    _check(row, chat)
    text = source_text(row.messages[:-1])
    ids = _tokens(chat, text=[text])[0]
    return ids if max_tokens is None or len(ids) <= max_tokens else _cut(chat, text, max_tokens, "right")


def refuse_unknown_labels(rows: Sequence[Row], labels: Sequence[str]) -> None:
    """Raises: DataError naming every row whose answer is not one of `labels`."""
    unknown = [(row, label) for row in rows for label in trained_answers(row) if label not in labels]
    if unknown:
        problems = [
            f"{row.file}:{row.line} has the label {label!r}, which no training row has" for row, label in unknown
        ]
        known = ", ".join(sorted(labels)[:MAX_LISTED])
        hint = f"fix the rows, or add such rows to the training data; the labels are: {known}"
        raise DataError(*problems[:MAX_LISTED], hint=hint)


def _has_loss(turn: Message) -> bool:
    return turn["role"] == "assistant" and turn.get("weight") != 0


def _pairs(row: Row, chat: ChatTokenizer, options: EncodingOptions) -> list[SourceTarget] | RowError:
    try:
        _check(row, chat)
        held = next(
            (token for token in _special_tokens(chat) for turn in row.messages if token in turn["content"]), None
        )
        if held:
            raise RowError("control_token", f"holds the control token {held} as text in a message")
        trained = [i for i, turn in enumerate(row.messages) if _has_loss(turn)]
        if not trained:
            raise RowError("no_loss", "has no token with loss: every answer has weight 0")
        found = [SourceTarget(source_text(row.messages[:i]), row.messages[i]["content"].strip()) for i in trained]
        unknown = [p.target for p in found if options.task == "classification" and p.target not in options.labels]
        if unknown:
            raise RowError("unknown_label", f"has the label {unknown[0]!r}, which no training row has")
        return found
    except RowError as error:
        return error


def _check(row: Row, chat: ChatTokenizer) -> None:
    """Raises: RowError if the row is a document, or has content that only a chat template can render."""
    if row.messages[0]["role"] == TEXT:
        raise RowError("no_answer", "is a text without an answer or a label")
    extra = [key for turn in row.messages for key in TEMPLATE_ONLY if turn.get(key)]
    if row.tools or extra:
        raise RowError("not_read", f"has {(extra or ['tools'])[0]}, which plain text cannot express")


def _special_tokens(chat: ChatTokenizer) -> list[str]:
    """The tokens that begin, end and pad a text. They must not occur inside one."""
    names = ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token")
    return [token for name in names if (token := getattr(chat.tokenizer, name, None))]


def _targets(texts: list[str], chat: ChatTokenizer, options: EncodingOptions) -> list[list[int]]:
    """The token ids of the answers; for a classification the index of each label."""
    if options.task == "classification":
        return [[options.labels.index(text)] for text in texts]
    return _tokens(chat, text_target=texts)


def _tokens(chat: ChatTokenizer, **texts: list[str]) -> list[list[int]]:
    """The token ids, with special tokens, of texts named `text` (encoder) or `text_target` (decoder)."""
    if not next(iter(texts.values())):
        return []
    return [list(ids) for ids in chat.tokenizer(**texts, verbose=False)["input_ids"]]


def _encoded(
    tokens: Sequence[tuple[SourceTarget, list[int], list[int]]], chat: ChatTokenizer, options: EncodingOptions
) -> EncodedRow:
    """The examples of a row. Source and target may have `max_length` tokens each.

    Raises: RowError if one of them has more, and must not or cannot be cut.
    """
    longest = max(len(ids) for _, *both in tokens for ids in both)
    examples = [_cut_to_length(*each, chat, options) for each in tokens]
    ends = options.task == "classification" or all(t[-1] == chat.tokenizer.eos_token_id for _, _, t in tokens)
    note = f"cut from {longest} to {options.max_length} tokens" if longest > options.max_length else ""
    return EncodedRow(examples, [], [], note, ends)


def _cut_to_length(
    pair: SourceTarget, source: list[int], target: list[int], chat: ChatTokenizer, options: EncodingOptions
) -> Example:
    max_length, rule = options.max_length, options.on_overlength
    if len(source) > max_length and rule == "reject":
        raise RowError("over_length", f"has a text of {len(source)} tokens, over max_length={max_length}")
    if len(target) > max_length and rule != "truncate":
        raise RowError("over_length", f"has an answer of {len(target)} tokens, over max_length={max_length}")
    if len(source) > max_length:
        source = _cut(chat, pair.source, max_length, "right" if rule == "truncate" else "left")
    target = target[:max_length]
    return Example(source + target, [False] * len(source) + [True] * len(target))


def _cut(chat: ChatTokenizer, text: str, max_tokens: int, side: str) -> list[int]:
    """The token ids of `text`, cut on `side` to `max_tokens`. Special tokens are kept."""
    before = chat.tokenizer.truncation_side
    chat.tokenizer.truncation_side = side
    try:
        return list(chat.tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"])
    finally:
        chat.tokenizer.truncation_side = before


def _chat_prompt(chat: ChatTokenizer, row: Row, _max_tokens: int | None) -> list[int]:
    return chat.prompt_ids(row.conversation)


class TaskEncoding(NamedTuple):
    """How a task encodes rows as examples, and a row as the prompt of its last answer, of a maximum length."""

    encode: Callable[[Sequence[Row], ChatTokenizer, EncodingOptions], list[EncodedRow | RowError]]
    prompt_ids: Callable[[ChatTokenizer, Row, int | None], list[int]]


TASK_ENCODINGS: dict[str, TaskEncoding] = {
    "causal_lm": TaskEncoding(encode_chats, _chat_prompt),
    "seq2seq": TaskEncoding(encode_pairs, prompt_ids),
    "classification": TaskEncoding(encode_pairs, prompt_ids),
}
