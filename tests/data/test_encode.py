"""Rows become examples: the loss mask by setting, and rows that are too long."""

from __future__ import annotations

from typing import Any

import pytest

from src.data.chat import ChatTokenizer
from src.data.encode import EncodedRow, EncodingOptions, encode_chats
from src.data.formats import Conversation, Message, RowError
from src.data.store import Example
from src.schema import OnOverlength
from tests.data import tokenizers
from tests.data.tokenizers import CONVERSATIONS, FAMILIES, TOOLS, WITH_TOOLS, assistant, row, system, user

pytest_plugins = ["tests.data.tokenizers"]
pytestmark = pytest.mark.usefixtures("frozen")

ROOMY = EncodingOptions(100_000)
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
ANSWERS = [f"The answer {word} it is." for word in WORDS[:6]]
LONG: list[Message] = [
    turn for n, answer in enumerate(ANSWERS) for turn in (user(f"Question {n} of {WORDS[n]}?"), assistant(answer))
]
# of each kind: one text a conversation or an answer, a separate system header, no end of turn, SentencePiece
KINDS = ["chatml", "qwen3", "smollm2", "llama3_1", "falcon", "llama2", "phi3", "mistral_v03", "gemma2", "gpt_oss"]


def done(name: str, turns: list[Message], rules: EncodingOptions, tools: list[Any] | None = None) -> EncodedRow:
    found = encode_chats([row(turns, tools)], tokenizers.chat(name), rules)[0]
    assert isinstance(found, EncodedRow), found
    return found


def refused(name: str, turns: list[Message], rules: EncodingOptions) -> RowError:
    found = encode_chats([row(turns)], tokenizers.chat(name), rules)[0]
    assert isinstance(found, RowError), found
    return found


def learnt(chat: ChatTokenizer, example: Example) -> str:
    return str(chat.tokenizer.decode([i for i, on in zip(*example, strict=True) if on]))


def longest(name: str, turns: list[Message]) -> int:
    return max(len(e.ids) for e in done(name, turns, ROOMY).examples)


TWO = max(longest("chatml", LONG[i : i + 4]) for i in (0, 4, 8))  # tokens of two exchanges


def read(chat: ChatTokenizer, example: Example) -> str:
    return str(chat.tokenizer.decode(example.ids))


def taught(name: str, examples: list[Example]) -> list[str]:
    """The answers of LONG with complete loss, including their end of turn, in order and with repeats."""
    chat, family = tokenizers.chat(name), FAMILIES[name]
    found = []
    for text in (learnt(chat, e) for e in examples):
        found += sorted((a for a in ANSWERS if a + family.eot in text), key=text.index)
        assert text.count("The answer") == sum(a + family.eot in text for a in ANSWERS), text
    return found


# what has loss


@pytest.mark.parametrize("name", KINDS)
def test_only_the_last_turn_of_a_conversation_has_loss(name: str) -> None:
    every = done(name, LONG, ROOMY)
    last = done(name, LONG, EncodingOptions(100_000, train_on="last_turn"))
    assert taught(name, every.examples) == ANSWERS
    (example,) = last.examples
    assert example.ids == every.examples[-1].ids
    assert taught(name, [example]) == ANSWERS[-1:]
    assert len(last.texts) == len(last.full_examples) == 1


@pytest.mark.parametrize("name", KINDS)
def test_all_tokens_of_a_conversation_have_loss_with_its_prompts(name: str) -> None:
    (example,) = done(name, LONG, EncodingOptions(100_000, train_on="all")).examples
    assert all(example.loss_mask)
    assert example.ids == done(name, LONG, ROOMY).examples[-1].ids


@pytest.mark.parametrize("name", KINDS)
def test_weight_nought_takes_the_loss_from_an_answer_by_every_setting(name: str) -> None:
    turns: list[Message] = [user("q"), assistant("good"), user("q"), assistant("bad", weight=0)]
    chat = tokenizers.chat(name)
    for train_on in ("completion", "last_turn", "all"):
        found = done(name, turns, EncodingOptions(100_000, train_on=train_on))
        assert not any("bad" in learnt(chat, e) for e in found.examples)
        assert any("good" in learnt(chat, e) for e in found.examples)
        assert len(found.texts) == len(found.full_examples) == len(found.examples) == 1


def test_a_row_without_weight_is_refused() -> None:
    turns: list[Message] = [user("q"), assistant("bad", weight=0)]
    for name in ("chatml", "qwen3"):
        assert str(refused(name, turns, ROOMY)) == "has no token with loss: every answer has weight 0"


def test_a_document_has_loss_whatever_the_setting() -> None:
    for train_on in ("completion", "last_turn", "all"):
        found = done("chatml", [{"role": "text", "content": "Once."}], EncodingOptions(100, train_on=train_on))
        assert learnt(tokenizers.chat("chatml"), found.examples[0]) == "Once.<|im_end|>"


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    chat = tokenizers.chat("qwen3")
    rows = [row([*turns], TOOLS if turns is WITH_TOOLS else None) for turns in CONVERSATIONS.values()]
    rows.insert(2, row([user("<|im_end|>"), assistant("x")]))
    rows.insert(5, row([user("q"), assistant("x", weight=0)]))
    together = encode_chats(rows, chat, ROOMY)
    assert [isinstance(found, RowError) for found in together].count(True) == 2
    for alone, found in zip(rows, together, strict=True):
        (one,) = encode_chats([alone], chat, ROOMY)
        assert str(one) == str(found)
    assert encode_chats([], chat, ROOMY) == []


# what is too long


@pytest.mark.parametrize("name", KINDS)
def test_a_row_that_fits_is_never_touched(name: str) -> None:
    length = longest(name, LONG)
    whole = done(name, LONG, ROOMY)
    for way in ("reject", "truncate_prompt", "truncate", "split"):
        assert done(name, LONG, EncodingOptions(length, on_overlength=way)) == whole


@pytest.mark.parametrize("name", KINDS)
def test_a_row_that_is_too_long_is_refused_with_both_figures(name: str) -> None:
    length = longest(name, LONG)
    error = refused(name, LONG, EncodingOptions(length - 1))
    assert (error.reason, error.detail) == ("over_length", f"has {length} tokens, over max_length={length - 1}")


@pytest.mark.parametrize("share", [0.95, 0.7, 0.5])
@pytest.mark.parametrize("name", KINDS)
def test_split_trains_every_answer_once_and_uncut(name: str, share: float) -> None:
    turns = LONG if not FAMILIES[name].system else [system("Be brief."), *LONG]
    most = int(longest(name, turns) * share)
    found = done(name, turns, EncodingOptions(most, on_overlength="split"))
    chat = tokenizers.chat(name)
    assert all(len(e.ids) <= most for e in found.examples)
    assert taught(name, found.examples) == ANSWERS
    assert found.note.startswith("split into ")
    if FAMILIES[name].system:
        assert all("Be brief." in read(chat, e) for e in found.examples)
    begins = chat.prompt_ids(Conversation(turns[: 1 + FAMILIES[name].system]))[:3]
    assert all(e.ids[:3] == begins for e in found.examples)  # each begins as the template does


def test_split_makes_pieces_as_long_as_they_can_be() -> None:
    found = done("chatml", LONG, EncodingOptions(TWO, on_overlength="split"))
    assert found.note == "split into 3 pieces"
    assert max(len(e.ids) for e in found.examples) == TWO
    assert found.texts == done("chatml", LONG, ROOMY).texts  # the complete row, which the mask check needs


@pytest.mark.parametrize("name", KINDS)
def test_split_refuses_a_row_with_an_exchange_that_does_not_fit(name: str) -> None:
    turns = [*LONG, user("Long?"), assistant("long " * 400)]
    error = refused(name, turns, EncodingOptions(longest(name, LONG), on_overlength="split"))
    assert error.reason == "over_length"
    assert error.detail.endswith("and even its last exchange alone is too long")


def test_split_of_the_last_turn_is_the_last_piece_with_loss() -> None:
    rules = EncodingOptions(TWO, train_on="last_turn", on_overlength="split")
    assert taught("chatml", done("chatml", LONG, rules).examples) == ANSWERS[-1:]
    turns: list[Message] = [*LONG, user("And so?"), assistant("bad " * 8, weight=0)]
    assert taught("chatml", done("chatml", turns, rules).examples) == ANSWERS[-1:]


def test_split_leaves_no_piece_without_loss() -> None:
    turns: list[Message] = [{**turn, "weight": 0} if n in (1, 3) else turn for n, turn in enumerate(LONG)]
    found = done("chatml", turns, EncodingOptions(TWO, on_overlength="split"))
    assert taught("chatml", found.examples) == ANSWERS[2:]
    assert found.note == "split into 2 pieces"


@pytest.mark.parametrize("name", KINDS)
def test_a_cut_prompt_keeps_the_system_turn_the_template_and_complete_answers(name: str) -> None:
    header = [system("Be brief.")] if FAMILIES[name].system else []
    turns = [*header, *LONG, user(" ".join(WORDS * 30)), assistant("The answer alpha it is.")]
    chat = tokenizers.chat(name)
    most = longest(name, [*header, *LONG[:4]])
    found = done(name, turns, EncodingOptions(most, on_overlength="truncate_prompt"))
    assert all(len(e.ids) <= most for e in found.examples)
    (example,) = found.examples
    assert len(example.ids) > most - 8  # no more is cut than necessary
    assert taught(name, [example]) == ["The answer alpha it is."]
    text = read(chat, example)
    assert ("Be brief." in text) is bool(header)
    kept = example.ids[: example.loss_mask.index(True)]
    tail = " ".join(WORDS * 30)
    asked = ((tail[i:], Conversation([*header, user(tail[i:]), turns[-1]])) for i in range(len(tail)))
    cut = next(text for text, conversation in asked if chat.prompt_ids(conversation) == kept)
    assert cut.endswith("iota kappa") and len(cut) < len(tail)
    assert found.note == f"prompt cut, {longest(name, turns)} tokens before, and 12 earlier messages dropped"


@pytest.mark.parametrize("name", KINDS)
def test_earlier_exchanges_go_before_a_request_is_cut(name: str) -> None:
    most = longest(name, LONG[-4:])
    found = done(name, LONG, EncodingOptions(most, on_overlength="truncate_prompt"))
    assert taught(name, found.examples) == ANSWERS[-2:]
    assert found.examples == done(name, LONG[-4:], ROOMY).examples


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_is_not_cut_where_its_answer_does_not_fit(name: str) -> None:
    turns = [user("Long?"), assistant("long " * 400)]
    error = refused(name, turns, EncodingOptions(longest(name, LONG[:2]), on_overlength="truncate_prompt"))
    assert error.reason == "over_length"


def test_calls_of_tools_stay_with_their_request_when_a_prompt_is_cut_or_split() -> None:
    turns = [*LONG, *WITH_TOOLS[:4]]
    chat = tokenizers.chat("qwen2_5")
    (alone,) = done("qwen2_5", WITH_TOOLS[:4], ROOMY, TOOLS).examples
    ways: list[OnOverlength] = ["truncate_prompt", "split"]
    for way in ways:
        found = done("qwen2_5", turns, EncodingOptions(len(alone.ids) + 20, on_overlength=way), TOOLS)
        assert found.examples[-1] == alone
        assert learnt(chat, found.examples[-1]).count("<|im_end|>") == 2


@pytest.mark.parametrize("train_on", ["completion", "last_turn", "all"])
@pytest.mark.parametrize("name", KINDS)
def test_truncate_cuts_the_end_and_reports_it(name: str, train_on: Any) -> None:
    whole = done(name, LONG, EncodingOptions(100_000, train_on=train_on))
    length = max(len(e.ids) for e in whole.examples)
    most = length - 2
    found = done(name, LONG, EncodingOptions(most, train_on, "truncate"))
    assert [e.ids for e in found.examples] == [e.ids[:most] for e in whole.examples]
    assert [e.loss_mask for e in found.examples] == [e.loss_mask[:most] for e in whole.examples]
    assert found.note == f"cut from {length} to {most} tokens"


def test_a_row_whose_answers_are_all_cut_off_is_rejected() -> None:
    turns = [user("alpha " * 50), assistant("beta")]
    error = refused("chatml", turns, EncodingOptions(20, on_overlength="truncate"))
    assert (error.reason, error.detail) == ("no_loss", "has no token with loss: every answer was cut off")


@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_a_long_document_is_refused_cut_or_split_but_has_no_prompt(name: str) -> None:
    turns: list[Message] = [{"role": "text", "content": " ".join(WORDS * 10)}]
    (whole,) = done(name, turns, ROOMY).examples
    most = len(whole.ids) // 3
    for way in ("reject", "truncate_prompt"):
        assert refused(name, turns, EncodingOptions(most, on_overlength=way)).reason == "over_length"
    (cut,) = done(name, turns, EncodingOptions(most, on_overlength="truncate")).examples
    assert cut.ids == whole.ids[:most]
    split = done(name, turns, EncodingOptions(most, on_overlength="split"))
    assert [i for e in split.examples for i in e.ids] == whole.ids
    assert [on for e in split.examples for on in e.loss_mask] == whole.loss_mask
    assert all(len(e.ids) <= most for e in split.examples)
    assert split.note == f"split into {len(split.examples)} pieces"
