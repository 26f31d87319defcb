"""Rows to tokens: which of them carry loss, and what is done with a row that is too long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from src.data.chat import ChatTokenizer, RenderedChat, Tools
from src.data.formats import TEXT, Message, Row, RowError
from src.data.store import Example
from src.schema import OnOverlength, TrainOn


class EncodingOptions(NamedTuple):
    """What decides how rows become examples."""

    max_length: int
    train_on: TrainOn = "completion"
    on_overlength: OnOverlength = "reject"
    task: str = "causal_lm"
    labels: tuple[str, ...] = ()  # of a classification: an answer's id is its place here


class EncodedRow(NamedTuple):
    """The examples of one row: one, or several where the template or `split` makes it so.

    texts: the whole row as the template renders it, a text for each example before any cut; one in which
        nothing is taught is left out.
    whole: those texts as tokens with loss on every answer, whatever the rules say.
    note: what was cut, or nothing.
    ends: whether each answer ends with an end-of-turn token.
    """

    examples: list[Example]
    texts: list[RenderedChat]
    full_examples: list[Example]
    note: str
    ends_turns: bool


def encode_chats(rows: Sequence[Row], chat: ChatTokenizer, rules: EncodingOptions) -> list[EncodedRow | RowError]:
    """Tokenise `rows`, all their pieces in one call; a RowError stands for a row that cannot be trained on."""
    rendered = [_rendered(row, chat, rules) for row in rows]
    cuts = [[chat.segments(text) for text in texts] if isinstance(texts, list) else [] for texts in rendered]
    ids = iter(chat.tokenize([p for texts in cuts for text in texts for p in text]))
    found: list[EncodedRow | RowError] = []
    for row, texts, cut in zip(rows, rendered, cuts, strict=True):
        if isinstance(texts, RowError):
            found.append(texts)
            continue
        tokens = [[(next(ids), p.turn) for p in text] for text in cut]
        answers = {turn for text in texts for turn in text.answer_turns}
        taught = _taught(row.messages, rules.train_on)
        whole = [_example(pieces, answers) for pieces in tokens]
        examples = whole if taught == answers else [_example(pieces, taught) for pieces in tokens]
        try:
            ends = all(map(chat.has_end_of_turn, texts))
            found.append(_fitted(row, chat, rules, EncodedRow(examples, texts, whole, "", ends)))
        except RowError as error:
            found.append(error)
    return found


def _rendered(row: Row, chat: ChatTokenizer, rules: EncodingOptions) -> list[RenderedChat] | RowError:
    try:
        held = chat.find_control_token(row.messages)
        if held:
            raise RowError("control_token", f"holds the control token {held} as text in a message")
        texts = _texts(row.messages, row.tools, chat, rules)
        if not texts:
            raise RowError("no_loss", "has no token with loss: every answer has weight 0")
        return texts
    except RowError as error:
        return error


def _texts(
    turns: Sequence[Message], tools: Tools, chat: ChatTokenizer, rules: EncodingOptions
) -> list[RenderedChat]:
    """The texts of a conversation in which there is something to learn."""
    texts = chat.training_texts(turns, tools)
    if rules.train_on == "all":  # each later text holds the earlier turns: the last one is all of them
        return texts[-1:]
    taught = _taught(turns, rules.train_on)
    return [text for text in texts if not taught.isdisjoint(text.answer_turns)]


def _taught(turns: Sequence[Message], train_on: TrainOn) -> AbstractSet[int | None]:
    """Positions of the answers with loss; None stands for what lies between answers."""
    roles = ("assistant", TEXT)
    answers = [i for i, turn in enumerate(turns) if turn["role"] in roles and turn.get("weight") != 0]
    if train_on == "all":
        return {None, *answers}
    return set(answers[-1:] if train_on == "last_turn" else answers)


def _example(pieces: Sequence[tuple[list[int], int | None]], taught: AbstractSet[int | None]) -> Example:
    ids: list[int] = []
    learnt: list[bool] = []
    for piece, turn in pieces:
        ids += piece
        learnt += [turn in taught] * len(piece)
    return Example(ids, learnt)


def _fitted(row: Row, chat: ChatTokenizer, rules: EncodingOptions, encoded: EncodedRow) -> EncodedRow:
    """`encoded`, cut as the rules say where an example is longer than `max_length`.

    Raises: RowError if it is too long and may not or cannot be cut, or if no token of it carries loss.
    """
    longest = max(len(e.ids) for e in encoded.examples)
    if longest > rules.max_length:
        encoded = _cut(row, chat, rules, encoded, longest)
    examples = [e for e in encoded.examples if any(e.loss_mask)]
    if not examples:
        raise RowError("no_loss", "has no token with loss: every answer was cut off")
    return encoded._replace(examples=examples)


def _cut(row: Row, chat: ChatTokenizer, rules: EncodingOptions, encoded: EncodedRow, longest: int) -> EncodedRow:
    most = rules.max_length
    is_text = row.messages[0]["role"] == TEXT
    over = RowError("over_length", f"has {longest} tokens, over max_length={most}")
    if rules.on_overlength == "reject" or (is_text and rules.on_overlength == "truncate_prompt"):
        raise over
    if rules.on_overlength == "truncate":
        cut = [Example(e.ids[:most], e.loss_mask[:most]) for e in encoded.examples]
        return encoded._replace(examples=cut, note=f"cut from {longest} to {most} tokens")
    if is_text:
        edges = [(e, i, i + most) for e in encoded.examples for i in range(0, len(e.ids), most)]
        cut = [Example(e.ids[start:end], e.loss_mask[start:end]) for e, start, end in edges]
        return encoded._replace(examples=cut, note=f"split into {len(cut)} pieces")
    splits = rules.on_overlength == "split"
    parts = list(_exchanges(row, chat, rules) if splits else _short_prompts(row, chat, rules))
    shorter = [part for part in (_whole(turns, row.tools, chat, rules) for turns in parts) if part]
    if not shorter:
        raise RowError("over_length", f"{over.detail}, and its longest answer does not fit with its request")
    if rules.train_on == "last_turn":
        shorter = shorter[-1:]
    if splits:
        note = f"split into {len(shorter)} pieces"
    else:
        dropped = len(row.messages) - len(parts[0])
        said = f", and {dropped} earlier messages dropped" if dropped else ""
        note = f"prompt cut, {longest} tokens before{said}"
    return encoded._replace(examples=[example for part in shorter for example in part], note=note)


def _whole(turns: Sequence[Message], tools: Tools, chat: ChatTokenizer, rules: EncodingOptions) -> list[Example]:
    """The examples of `turns`, whatever their length; nothing where no answer has weight."""
    taught = _taught(turns, rules.train_on)
    cut = [chat.segments(text) for text in _texts(turns, tools, chat, rules)]
    return [_example(list(zip(chat.tokenize(c), (p.turn for p in c), strict=True)), taught) for c in cut]


def _fits(turns: Sequence[Message], row: Row, chat: ChatTokenizer, rules: EncodingOptions) -> bool:
    return all(len(e.ids) <= rules.max_length for e in _whole(turns, row.tools, chat, rules))


def _parts(turns: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system turn, and the exchanges: each a request with all that answers it."""
    system = [turn for turn in turns if turn["role"] == "system"]
    exchanges: list[list[Message]] = []
    for turn in turns[len(system) :]:
        if turn["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(turn)
    return system, exchanges


def _exchanges(row: Row, chat: ChatTokenizer, rules: EncodingOptions) -> Iterator[list[Message]]:
    """The conversation in pieces that fit, of as many exchanges as possible each; nothing if one is too long."""
    system, exchanges = _parts(row.messages)
    if not all(_fits([*system, *exchange], row, chat, rules) for exchange in exchanges):
        return
    piece = list(system)
    for exchange in exchanges:
        if len(piece) > len(system) and not _fits([*piece, *exchange], row, chat, rules):
            yield piece
            piece = list(system)
        piece += exchange
    yield piece


def _short_prompts(row: Row, chat: ChatTokenizer, rules: EncodingOptions) -> Iterator[list[Message]]:
    """The end of the conversation that fits: earlier exchanges are dropped, then the request's beginning is cut.

    No answer that is kept is ever cut. Nothing where the last answer does not fit even so.
    """
    system, exchanges = _parts(row.messages)
    while len(exchanges) > 1 and not _fits(_joined(system, exchanges), row, chat, rules):
        exchanges = exchanges[1:]
    request, *rest = exchanges[0]

    def with_tail(characters: int) -> list[Message]:
        content = request["content"]
        tail: Message = {**request, "content": content[len(content) - characters :]}
        return _joined(system, [[tail, *rest], *exchanges[1:]])

    fits, too_long = 0, len(request["content"]) + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if _fits(with_tail(middle), row, chat, rules):
            fits = middle
        else:
            too_long = middle
    if request["content"][len(request["content"]) - fits :].strip() and fits:
        yield with_tail(fits)


def _joined(system: list[Message], exchanges: list[list[Message]]) -> list[Message]:
    return [*system, *(turn for exchange in exchanges for turn in exchange)]
