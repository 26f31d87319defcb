"""Encode conversations as examples: which tokens carry loss, and how a row that is too long is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import takewhile
from typing import NamedTuple

from ..schema import OnDisputedMask, OnOverlength, TrainOn
from .chat import ChatTokenizer
from .content_check import DroppedContent
from .conversation import TEXT, Conversation, Message, Row, RowError
from .segments import RenderedChat
from .store import Example


class EncodingOptions(NamedTuple):
    """The settings that decide how rows become examples."""

    max_length: int
    train_on: TrainOn = "completion"
    on_overlength: OnOverlength = "reject"
    task: str = "causal_lm"
    labels: tuple[str, ...] = ()  # of a classification; the id of a label is its index
    on_disputed_mask: OnDisputedMask = "reject"


class EncodedRow(NamedTuple):
    """The examples of one row: one, or several if the template or `split` requires it.

    texts: the full row as rendered, one text for each example before any cut. Texts without loss are omitted.
    full_examples: these texts as tokens, with loss on every answer whatever `train_on` says.
    note: what was cut; empty if nothing was.
    ends_turns: whether each answer ends with an end-of-turn token.
    dropped: kinds of content that the template leaves out, none of it part of an answer with loss.
    changed: what was passed to the template in another form.
    with_thoughts: whether an answer with loss has thoughts.
    """

    examples: list[Example]
    texts: list[RenderedChat]
    full_examples: list[Example]
    note: str
    ends_turns: bool
    dropped: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    with_thoughts: bool = False


def encode_chats(
    rows: Sequence[Row], chat: ChatTokenizer, options: EncodingOptions
) -> list[EncodedRow | RowError]:
    """Encode `rows`, tokenizing all their segments in one call. A RowError stands for a row that is rejected."""
    rendered = [_render(row, chat, options) for row in rows]
    segments = [[chat.segments(text) for text in texts] if isinstance(texts, list) else [] for texts in rendered]
    ids = iter(chat.tokenize([segment for texts in segments for text in texts for segment in text]))
    found: list[EncodedRow | RowError] = []
    for row, texts, cuts in zip(rows, rendered, segments, strict=True):
        if isinstance(texts, RowError):
            found.append(texts)
            continue
        tokens = [[(next(ids), segment.turn) for segment in text] for text in cuts]
        answers = {turn for text in texts for turn in text.answer_turns}
        trained = _trained_turns(row.messages, options.train_on)
        dropped = chat.content_check.dropped(row.conversation, texts, trained)
        full = [_example(text, answers) for text in tokens]
        examples = full if trained == answers else [_example(text, trained) for text in tokens]
        try:
            if dropped.answers:
                raise DroppedContent(dropped.answers)
            changed = tuple(chat.profile(row.template_kwargs).changes(row.conversation))
            ends = all(map(chat.has_end_of_turn, texts))
            context = dropped.context + chat.unread_variables(row.conversation)
            thoughts = any(chat.markup.thought_of(row.messages[turn]) for turn in trained if turn is not None)
            encoded = EncodedRow(examples, texts, full, "", ends, context, changed, thoughts)
            found.append(_cut_to_length(row, chat, options, encoded))
        except RowError as error:
            found.append(error)
    return found


def _render(row: Row, chat: ChatTokenizer, options: EncodingOptions) -> list[RenderedChat] | RowError:
    try:
        chat.refuse_control_tokens(row.conversation)
        texts = _texts(row.conversation, chat, options)
        if not texts:
            raise RowError("no_loss", "has no token with loss: every answer has weight 0")
        return texts
    except RowError as error:
        return error


def _texts(conversation: Conversation, chat: ChatTokenizer, options: EncodingOptions) -> list[RenderedChat]:
    """The texts of a conversation that have loss."""
    texts = chat.training_texts(conversation)
    if options.train_on == "all":  # the last text contains all earlier turns
        return texts[-1:]
    trained = _trained_turns(conversation.messages, options.train_on)
    return [text for text in texts if not trained.isdisjoint(text.answer_turns)]


def _trained_turns(turns: Sequence[Message], train_on: TrainOn) -> AbstractSet[int | None]:
    """Indices of the messages with loss; None stands for the text between answers."""
    roles = ("assistant", TEXT)
    answers = [i for i, turn in enumerate(turns) if turn["role"] in roles and turn.get("weight") != 0]
    if train_on == "all":
        return {None, *answers}
    return set(answers[-1:] if train_on == "last_turn" else answers)


def _example(segments: Sequence[tuple[list[int], int | None]], trained: AbstractSet[int | None]) -> Example:
    ids: list[int] = []
    loss_mask: list[bool] = []
    for segment, turn in segments:
        ids += segment
        loss_mask += [turn in trained] * len(segment)
    return Example(ids, loss_mask)


def _cut_to_length(row: Row, chat: ChatTokenizer, options: EncodingOptions, encoded: EncodedRow) -> EncodedRow:
    """`encoded`, cut according to `on_overlength` if an example is longer than `max_length`.

    Raises: RowError if it is too long and must not or cannot be cut, or if no token with loss is left.
    """
    longest = max(len(e.ids) for e in encoded.examples)
    if longest > options.max_length:
        encoded = _cut(row, chat, options, encoded, longest)
    examples = [e for e in encoded.examples if any(e.loss_mask)]
    if not examples:
        raise RowError("no_loss", "has no token with loss: every answer was cut off")
    return encoded._replace(examples=examples)


def _cut(row: Row, chat: ChatTokenizer, options: EncodingOptions, encoded: EncodedRow, longest: int) -> EncodedRow:
    max_length = options.max_length
    is_text = row.messages[0]["role"] == TEXT
    over = RowError("over_length", f"has {longest} tokens, over max_length={max_length}")
    if options.on_overlength == "reject" or (is_text and options.on_overlength == "truncate_prompt"):
        raise over
    if options.on_overlength == "truncate":
        cut = [Example(e.ids[:max_length], e.loss_mask[:max_length]) for e in encoded.examples]
        return encoded._replace(examples=cut, note=f"cut from {longest} to {max_length} tokens")
    if is_text:
        edges = [(e, i, i + max_length) for e in encoded.examples for i in range(0, len(e.ids), max_length)]
        cut = [Example(e.ids[start:end], e.loss_mask[start:end]) for e, start, end in edges]
        return encoded._replace(examples=cut, note=f"split into {len(cut)} pieces")
    splits = options.on_overlength == "split"
    parts = list(_exchanges(row, chat, options) if splits else _short_prompts(row, chat, options))
    shorter = [part for part in (_full_examples(turns, row, chat, options) for turns in parts) if part]
    if not shorter:
        raise RowError("over_length", f"{over.detail}, and even its last exchange alone is too long")
    if options.train_on == "last_turn":
        shorter = shorter[-1:]
    if splits:
        note = f"split into {len(shorter)} pieces"
    else:
        dropped = len(row.messages) - len(parts[0])
        more = f", and {dropped} earlier messages dropped" if dropped else ""
        note = f"prompt cut, {longest} tokens before{more}"
    return encoded._replace(examples=[example for part in shorter for example in part], note=note)


def _full_examples(
    turns: Sequence[Message], row: Row, chat: ChatTokenizer, options: EncodingOptions
) -> list[Example]:
    """The uncut examples of `turns`, a part of the row; empty if no answer has loss."""
    trained = _trained_turns(turns, options.train_on)
    texts = [chat.segments(text) for text in _texts(row.conversation._replace(messages=turns), chat, options)]
    return [_example(list(zip(chat.tokenize(t), (s.turn for s in t), strict=True)), trained) for t in texts]


def _is_short_enough(turns: Sequence[Message], row: Row, chat: ChatTokenizer, options: EncodingOptions) -> bool:
    return all(len(e.ids) <= options.max_length for e in _full_examples(turns, row, chat, options))


def _parts(turns: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system turns, and the exchanges: each is a request with all turns that answer it."""
    system = list(takewhile(lambda turn: turn["role"] in ("system", "developer"), turns))
    exchanges: list[list[Message]] = []
    for turn in turns[len(system) :]:
        if turn["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(turn)
    return system, exchanges


def _exchanges(row: Row, chat: ChatTokenizer, options: EncodingOptions) -> Iterator[list[Message]]:
    """The conversation in pieces of as many exchanges as fit; empty if a single exchange is too long."""
    system, exchanges = _parts(row.messages)
    if not all(_is_short_enough([*system, *exchange], row, chat, options) for exchange in exchanges):
        return
    piece = list(system)
    for exchange in exchanges:
        if len(piece) > len(system) and not _is_short_enough([*piece, *exchange], row, chat, options):
            yield piece
            piece = list(system)
        piece += exchange
    yield piece


def _short_prompts(row: Row, chat: ChatTokenizer, options: EncodingOptions) -> Iterator[list[Message]]:
    """The longest end of the conversation that fits, as one item; empty if the last answer does not fit.

    Earlier exchanges are dropped first, then the beginning of the request is cut. Answers are not cut.
    """
    system, exchanges = _parts(row.messages)
    while len(exchanges) > 1 and not _is_short_enough(_joined(system, exchanges), row, chat, options):
        exchanges = exchanges[1:]
    request, *rest = exchanges[0]

    def with_tail(characters: int) -> list[Message]:
        content = request["content"]
        tail: Message = {**request, "content": content[len(content) - characters :]}
        return _joined(system, [[tail, *rest], *exchanges[1:]])

    fits, too_long = 0, len(request["content"]) + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if _is_short_enough(with_tail(middle), row, chat, options):
            fits = middle
        else:
            too_long = middle
    if request["content"][len(request["content"]) - fits :].strip() and fits:
        yield with_tail(fits)


def _joined(system: list[Message], exchanges: list[list[Message]]) -> list[Message]:
    return [*system, *(turn for exchange in exchanges for turn in exchange)]
