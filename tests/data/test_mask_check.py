"""The second derivation of the loss mask agrees with the first, and finds every kind of error in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from src.data.answer_text import CharSpan
from src.data.chat import ChatTokenizer
from src.data.encode import EncodedRow, EncodingOptions, encode_chats
from src.data.formats import Conversation, Message
from src.data.mask_check import MaskCheck, MaskVerifier
from src.data.segments import RenderedChat
from src.data.store import Example
from tests.data import tokenizers
from tests.data.tokenizers import CONVERSATIONS, FAMILIES, TOOLS, WITH_TOOLS, assistant, row, user

pytest_plugins = ["tests.data.tokenizers"]
pytestmark = pytest.mark.usefixtures("frozen")

# What the second derivation cannot judge: a template that rewrites what a message says, or refuses the stand-ins.
NOT_COMPARABLE = {("falcon", "empty thoughts"), ("falcon", "thoughts")}
MARKED = ["chatml_marked", "llama3_marked", "smollm3"]


def encoded(name: str, title: str) -> EncodedRow:
    turns = CONVERSATIONS[title]
    found = encode_chats([row(turns, tools_of(turns))], tokenizers.chat(name), EncodingOptions(100_000))[0]
    assert isinstance(found, EncodedRow), found
    return found


def tools_of(turns: list[Message]) -> list[Any] | None:
    return TOOLS if turns is WITH_TOOLS else None


def proofs(name: str, title: str, wrong: Callable[[Example], Example] = lambda e: e) -> list[MaskCheck]:
    prover, turns = MaskVerifier(tokenizers.chat(name)), CONVERSATIONS[title]
    found = encoded(name, title)
    pairs = zip(found.texts, found.full_examples, strict=True)
    return [prover.verify(Conversation(turns, tools_of(turns)), text, wrong(example)) for text, example in pairs]


def accepted(name: str) -> list[str]:
    return [title for title in CONVERSATIONS if FAMILIES[name].renders(title)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_two_derivations_agree_or_report_why_they_cannot_be_compared(name: str) -> None:
    for title in accepted(name):
        found = {verdict.agrees for verdict in proofs(name, title)}
        assert (None in found) is ((name, title) in NOT_COMPARABLE), title
        assert False not in found, title


def test_generation_marks_are_used_where_a_template_has_them() -> None:
    assert [n for n in FAMILIES if MaskVerifier(tokenizers.chat(n)).method == "generation marks"] == MARKED


def test_a_document_needs_no_second_derivation() -> None:
    chat = tokenizers.chat("llama2")
    turns: list[Message] = [{"role": "text", "content": "Once."}]
    found = encode_chats([row(turns)], chat, EncodingOptions(100))[0]
    assert isinstance(found, EncodedRow)
    assert MaskVerifier(chat).verify(Conversation(turns), found.texts[0], found.full_examples[0]).agrees


# wrong tokens: the places are right, the mask made of them is not


def shifted_right(example: Example) -> Example:
    return example._replace(loss_mask=[False, *example.loss_mask[:-1]])


def shifted_left(example: Example) -> Example:
    return example._replace(loss_mask=[*example.loss_mask[1:], False])


def with_what_precedes(example: Example) -> Example:
    at = example.loss_mask.index(True)
    return example._replace(loss_mask=[on or i == at - 1 for i, on in enumerate(example.loss_mask)])


def without_its_last_token(example: Example) -> Example:
    last = max(i for i, on in enumerate(example.loss_mask) if on)
    return example._replace(loss_mask=[on and i != last for i, on in enumerate(example.loss_mask)])


def with_the_prompt(example: Example) -> Example:
    return example._replace(loss_mask=[True] * len(example.loss_mask))


def without_the_last_answer(example: Example) -> Example:
    last = max(i for i, on in enumerate(example.loss_mask) if on)
    begins = max(i for i in range(last) if not example.loss_mask[i])
    return example._replace(loss_mask=[on and i < begins for i, on in enumerate(example.loss_mask)])


def without_any(example: Example) -> Example:
    return example._replace(loss_mask=[False] * len(example.loss_mask))


WRONG_TOKENS = [
    shifted_right,
    shifted_left,
    with_what_precedes,
    without_its_last_token,
    with_the_prompt,
    without_the_last_answer,
    without_any,
]


@pytest.mark.parametrize("wrong", WRONG_TOKENS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_mask_is_found(name: str, wrong: Callable[[Example], Example]) -> None:
    for title in ("single turn", "several turns", "words of the template", "unicode"):
        found = proofs(name, title, wrong)
        assert [verdict.agrees for verdict in found] == [False] * len(found), title
        assert all(verdict.detail for verdict in found)


@pytest.mark.parametrize("wrong", [shifted_right, with_the_prompt, without_the_last_answer, without_any])
@pytest.mark.parametrize("name", ["chatml", "chatml_marked", "qwen2_5", "smollm2", "olmo2"])
def test_a_wrong_mask_is_found_where_one_pass_gives_other_tokens(
    name: str, wrong: Callable[[Example], Example]
) -> None:
    for title in ("space around", "newlines before"):
        found = encoded(name, title)
        whole = tokenizers.chat(name).tokenizer(found.texts[0].text, add_special_tokens=False)["input_ids"]
        assert whole != found.examples[0].ids
        assert [verdict.agrees for verdict in proofs(name, title, wrong)] == [False]


# wrong places: the mask is made of them faithfully


def made_of(chat: ChatTokenizer, text: RenderedChat) -> Example:
    pieces = chat.segments(text)
    ids = chat.tokenize(pieces)
    learnt = [piece.turn is not None for piece, of_it in zip(pieces, ids, strict=True) for _ in of_it]
    return Example([token for of_it in ids for token in of_it], learnt)


def moved(text: RenderedChat, start: int, end: int) -> RenderedChat:
    return text._replace(answer_spans=tuple(CharSpan(s.start + start, s.end + end) for s in text.answer_spans))


def without_ends(family: str) -> Callable[[RenderedChat], RenderedChat]:
    return lambda text: moved(text, 0, -len(FAMILIES[family].eot))


PLACES: dict[str, Callable[[str], Callable[[RenderedChat], RenderedChat]]] = {
    "two letters late": lambda name: lambda text: moved(text, 2, 0),
    "three letters early": lambda name: lambda text: moved(text, -3, 0),
    "without its end": without_ends,
    "from the very beginning": lambda name: (
        lambda text: text._replace(answer_spans=(CharSpan(0, text.answer_spans[0].end), *text.answer_spans[1:]))
    ),
}


@pytest.mark.parametrize("wrong", PLACES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_place_is_found(name: str, wrong: str) -> None:
    if not FAMILIES[name].eot and wrong == "without its end":
        return  # it has none
    chat, turns = tokenizers.chat(name), CONVERSATIONS["several turns"]
    prover = MaskVerifier(chat)
    # its answers are long enough to be mistaken by three letters
    for text in encoded(name, "several turns").texts:
        mistaken = PLACES[wrong](name)(text)
        verdict = prover.verify(Conversation(turns), mistaken, made_of(chat, mistaken))
        assert verdict.agrees is False, mistaken
        assert verdict.detail.startswith("has ")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.one_text])
def test_a_lost_answer_is_found(name: str) -> None:
    chat, turns = tokenizers.chat(name), CONVERSATIONS["several turns"]
    text = encoded(name, "several turns").texts[0]
    lost = text._replace(answer_spans=text.answer_spans[1:], answer_turns=text.answer_turns[1:])
    assert MaskVerifier(chat).verify(Conversation(turns), lost, made_of(chat, lost)).agrees is False


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_in_a_text(name: str) -> None:
    for title in accepted(name):
        turns = CONVERSATIONS[title]
        taught = [turn for text in encoded(name, title).texts for turn in text.answer_turns]
        weighted = [i for i, t in enumerate(turns) if t["role"] == "assistant" and t.get("weight") != 0]
        assert [turn for turn in taught if turns[turn].get("weight") != 0] == weighted


def test_generation_marks_at_the_wrong_position_are_found() -> None:
    """The template marks the user's words: the two derivations differ, and the row is not trusted."""
    chat = ChatTokenizer(tokenizers.tokenizer(FAMILIES["chatml_marked"]))
    chat.tokenizer.chat_template = chat.tokenizer.chat_template.replace("== 'assistant'", "== 'user'")
    turns = [user("Hi"), assistant("Hello")]
    found = encode_chats([row(turns)], chat, EncodingOptions(100))[0]
    assert isinstance(found, EncodedRow)
    verdict = MaskVerifier(chat).verify(Conversation(turns), found.texts[0], found.full_examples[0])
    assert verdict == (
        False,
        "has loss on 'Hello<|im_end|>' by prefix rendering, on 'Hi' by generation marks",
    )


def test_tokens_of_another_conversation_are_found() -> None:
    other = encoded("chatml", "several turns").full_examples[0]
    (verdict,) = proofs("chatml", "single turn", lambda _: other)
    assert verdict == (False, "has other special tokens than its text")


def test_a_tokenizer_without_offsets_is_not_comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizers.chat("chatml").tokenizer), "is_fast", False)
    assert proofs("chatml", "single turn") == [MaskCheck(None, "the tokenizer gives no offsets")]


@pytest.mark.parametrize("wrong", [None, shifted_right, shifted_left, without_any])
def test_a_token_that_one_pass_makes_across_the_edge_is_no_dispute(
    wrong: Callable[[Example], Example] | None,
) -> None:
    chat = ChatTokenizer(tokenizers.tokenizer(FAMILIES["llama3"]))
    chat.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    chat.tokenizer.add_tokens([":Hi"])
    turns = [user("q"), assistant("Hi there"), user("q"), assistant("Hi")]
    found = encode_chats([row(turns)], chat, EncodingOptions(100))[0]
    assert isinstance(found, EncodedRow)
    text, example = found.texts[0], found.full_examples[0]
    assert chat.tokenizer(text.text, add_special_tokens=False)["input_ids"] != example.ids
    verdict = MaskVerifier(chat).verify(Conversation(turns), text, wrong(example) if wrong else example)
    assert verdict.agrees is (wrong is None)
