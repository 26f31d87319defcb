"""What each model family is trained on: every answer, nothing else, and nothing is lost without a word.

The truth comes from transformers' own rendering and from words that occur once in a conversation. The table of
docs/data.md is made of the results. If a family's cell changes, write the table again and review the difference:

    UPDATE_GOLDEN=1 python -m pytest tests/data/test_families.py
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest

from src.data.chat import ChatTokenizer
from src.data.conversation import Message, RowError
from src.data.encode import EncodedRow, EncodingOptions, encode_chats
from src.data.mask_check import MaskVerifier
from src.data.store import Example
from tests.data import families
from tests.data.families import TEMPLATES, template
from tests.data.tokenizers import assistant, row, system, user
from tests.fixtures import ROOT

PAGE = ROOT / "docs" / "data.md"
BEGIN, END = "<!-- the families, by tests/data/test_families.py -->\n", "<!-- end of the families -->\n"
THOUGHTS: dict[
    str, Callable[[str, str], dict[str, Any]]
] = {  # where templates read thoughts, besides what is said
    **{key: lambda thought, _, key=key: {key: thought} for key in ("reasoning_content", "reasoning", "thinking")},  # type: ignore[misc]
    "inline": lambda thought, said: {"content": f"<think>\n{thought}\n</think>\n\n{said}"},
    "part": lambda thought, said: {
        "content": [{"type": "thinking", "thinking": thought}, {"type": "text", "text": said}]
    },
}
TAG = (
    r"\[BEGINFINALRESPONSE\]|<\|?/?(?:\w+:)?(?:think|thinking|START_THINKING|END_THINKING|channel)\|?>|<channel\|>"
)
EMPTY_THOUGHT = re.compile(rf"(?:{TAG}|\[/?THINK\])(?:thought)?(?:{TAG}|\[/?THINK\])?")  # without white space

DESCRIPTION = "Reads the barometer."
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": DESCRIPTION,
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A town."}}},
    },
}


def calls(*cities: str, text: bool = False, **more: object) -> dict[str, list[Any]]:
    arguments = [json.dumps({"city": city}) if text else {"city": city, **more} for city in cities]
    functions = [{"name": "lookup", "arguments": each} for each in arguments]
    return {
        "tool_calls": [{"id": f"abcdefgh{n}", "type": "function", "function": f} for n, f in enumerate(functions)]
    }


def result(word: str, number: int = 0) -> Message:
    return {"role": "tool", "name": "lookup", "tool_call_id": f"abcdefgh{number}", "content": word}


ASKED, AGAIN = user("Ask Alpha now."), user("Ask Bravo now.")
FIRST, SECOND = "Say Charlie here.", "Say Delta here."
THOUGHT, OTHER_THOUGHT = "Ponder Echo slowly.", "Ponder Foxtrot slowly."
CALLED: list[Message] = [ASKED, assistant("", **calls("Golfville")), result("Hotel-result"), assistant(FIRST)]
CONVERSATIONS: dict[str, list[Message]] = {
    "plain": [ASKED, assistant(FIRST), AGAIN, assistant(SECOND)],
    "system": [system("Be India always."), ASKED, assistant(FIRST), AGAIN, assistant(SECOND)],
    "tools": [*CALLED, AGAIN, assistant(SECOND)],
    "thoughts": [
        ASKED, assistant(FIRST, reasoning_content=THOUGHT),
        AGAIN, assistant(SECOND, reasoning_content=OTHER_THOUGHT),
    ],
    "thoughts in the text": [
        ASKED, assistant(f"<think>\n{THOUGHT}\n</think>\n\n{FIRST}"), AGAIN, assistant(SECOND),
    ],
    "thoughts beside a call": [ASKED, assistant("", reasoning_content=THOUGHT, **calls("Golfville"))],
    "a call at the end": [ASKED, assistant("", **calls("Golfville"))],
    "a call that ends with short values": [ASKED, assistant("", **calls("Golfville", days=3, now=True, unit="e"))],
    "arguments as text": [ASKED, assistant("", **calls("Golfville", text=True)), *CALLED[2:]],
    "two calls": [
        ASKED, assistant("", **calls("Golfville", "Kiloville")), result("Hotel-result"), result("Lima-result", 1),
        assistant(FIRST),
    ],
    "text beside a call": [ASKED, assistant(FIRST, **calls("Golfville")), CALLED[2], assistant(SECOND)],
    "developer": [{"role": "developer", "content": "Be India always."}, ASKED, assistant(FIRST)],
    "white space": [
        user(" Ask Alpha now.\n"), assistant(f"\n {FIRST} \n"), AGAIN, assistant(f"{SECOND}\n\n"),
    ],
}  # fmt: skip
COLUMNS = list(CONVERSATIONS)[:4]
NEED_TOOLS = {"hermes3_tools"}  # their templates render no conversation without tools
NO = {"dropped_by_template": "no: left out", "template": "no: refused", "disputed_mask": "no: disputed"}


class Outcome(NamedTuple):
    """What became of a conversation, as the table of families says it, and what is wrong with its examples."""

    cell: str
    faults: list[str]


def words_of(turn: Message) -> dict[str, str]:
    """The words of a message that occur nowhere else in its conversation, by what they are."""
    said = turn["content"].rpartition("</think>")
    found = {"text": said[2].strip(), "thought": turn.get("reasoning_content") or (THOUGHT if said[1] else "")}
    for number, call in enumerate(turn.get("tool_calls", [])):
        arguments = call["function"]["arguments"]
        found[f"call {number}"] = (json.loads(arguments) if isinstance(arguments, str) else arguments)["city"]
    return {what: squeezed(word) for what, word in found.items() if word}


def squeezed(text: str) -> str:
    return "".join(text.split())


def forms(turns: list[Message]) -> Iterator[list[Any]]:
    """The forms in which a template may want a conversation."""
    called = (False, True) if any("tool_calls" in turn for turn in turns) else (False,)
    thought = any("thought" in words_of(turn) for turn in turns)
    for key, text, ids, parts in itertools.product(THOUGHTS if thought else [""], called, called, (False, True)):
        yield [as_form(turn, key, text, ids, parts) for turn in turns]


def as_form(turn: Message, key: str, text: bool, ids: bool, parts: bool) -> dict[str, Any]:
    """`turn` with its thoughts under `key` of THOUGHTS, arguments as text, ids as Kimi's, content as parts."""
    made: dict[str, Any] = {**turn, "role": turn["role"].replace("developer", "system")}
    thought = words_of(turn).get("thought") and (made.pop("reasoning_content", "") or THOUGHT)
    if thought:
        said = made["content"].rpartition("</think>")[2].strip()
        made |= {"content": said} | THOUGHTS[key](thought, said)
    for call in turn.get("tool_calls", []):
        value = call["function"]["arguments"]
        value = json.loads(value) if isinstance(value, str) else value
        function = {"name": "lookup", "arguments": json.dumps(value) if text else value}
        number = f"functions.lookup:{call['id'][-1]}" if ids else call["id"]
        made["tool_calls"] = [*made["tool_calls"][1:], {"id": number, "type": "function", "function": function}]
    if ids and "tool_call_id" in turn:
        made["tool_call_id"] = f"functions.lookup:{turn['tool_call_id'][-1]}"
    if parts and isinstance(made["content"], str):
        made["content"] = [{"type": "text", "text": made["content"]}]
    return made


def tools_for(name: str, turns: list[Message]) -> list[Any] | None:
    return [TOOL] if name in NEED_TOOLS or any("tool_calls" in turn for turn in turns) else None


def encode(name: str, turns: list[Message]) -> EncodedRow | RowError:
    """The examples of a conversation, whose masks the second derivation does not dispute."""
    given = row(turns, tools_for(name, turns))
    encoded = encode_chats([given], families.chat(name), EncodingOptions(100_000))[0]
    if isinstance(encoded, EncodedRow):
        verifier = MaskVerifier(families.chat(name))
        for text, example in zip(encoded.texts, encoded.full_examples, strict=True):
            verdict = verifier.verify(given.conversation, text, example)
            if verdict.agrees is False:
                return RowError("disputed_mask", verdict.detail)
    return encoded


@cache
def outcome(name: str, kind: str) -> Outcome:
    turns = CONVERSATIONS[kind]
    encoded = encode(name, turns)
    if isinstance(encoded, RowError):
        disputed = [str(encoded)] if encoded.reason == "disputed_mask" else []
        return Outcome(NO.get(encoded.reason, f"no: {encoded.reason}"), disputed)
    regions = [region for example in encoded.examples for region in regions_of(name, example)]
    faults = [fault for before, answer in regions for fault in faults_of(name, turns, before, answer, encoded)]
    trained = [turn for before, _ in regions if (turn := turn_of(name, turns, before)) is not None]
    if trained != [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]:
        faults.append(f"trains the messages {trained}")
    if (lost := lost_words(name, turns, encoded)) and not encoded.dropped:
        faults.append(f"loses {lost} without a word")
    how = "per answer" if len(encoded.examples) > 1 else "no end" if not encoded.ends_turns else ""
    how = f"without {', '.join(encoded.dropped)}" if encoded.dropped else how
    return Outcome(f"yes, {how}" if how else "yes", faults)


def lost_words(name: str, turns: list[Message], encoded: EncodedRow) -> list[str]:
    decode = template(name).tokenizer.decode
    everything = squeezed("".join(decode(example.ids) for example in encoded.examples))
    said = [word for turn in turns for word in words_of(turn).values()]
    said += [squeezed(DESCRIPTION)] if tools_for(name, turns) else []
    return [word for word in said if word not in everything]


def regions_of(name: str, example: Example) -> Iterator[tuple[str, str]]:
    """For each run of tokens with loss: the text before it, and its text."""
    decode = template(name).tokenizer.decode
    start = 0
    for on, group in itertools.groupby(example.loss_mask):
        end = start + len(list(group))
        if on:
            yield squeezed(decode(example.ids[:start])), squeezed(decode(example.ids[start:end]))
        start = end


def turn_of(name: str, turns: list[Message], before: str) -> int | None:
    """The answer whose inference prompt is the text before the loss. An empty think block may follow it."""
    for number in (n for n, turn in enumerate(turns) if turn["role"] == "assistant"):
        for prompt in prompts(name, turns, number):
            rest = before.removeprefix(prompt)
            if before == prompt or (before.startswith(prompt) and EMPTY_THOUGHT.fullmatch(rest)):
                return number
    return None


def prompts(name: str, turns: list[Message], number: int) -> Iterator[str]:
    """The inference prompts of an answer: with thinking switched on too if it has thoughts."""
    switches = [{"enable_thinking": True, "thinking": True}, {"reasoning_effort": "high"}]
    thinking = [{}, *switches] if "thought" in words_of(turns[number]) else [{}]
    for variables, form in itertools.product(thinking, forms(turns)):
        tools = tools_for(name, turns)
        if prompt := families.render(name, form[:number], tools, add_generation_prompt=True, **variables):
            yield squeezed(prompt)


def faults_of(name: str, turns: list[Message], before: str, answer: str, encoded: EncodedRow) -> Iterator[str]:
    number = turn_of(name, turns, before)
    if number is None:
        yield f"{before[-80:]!r} before {answer!r} is no inference prompt"
        return
    words = words_of(turns[number])
    for what, word in words.items():
        if answer.count(word) != 1:
            yield f"has the {what} {answer.count(word)} times in {answer!r}"
    others = {word for n, turn in enumerate(turns) if n != number for word in words_of(turn).values()}
    if strange := [word for word in others - {*words.values()} if word in answer]:
        yield f"has loss on {strange} of other messages: {answer!r}"
    if '\\"' in answer:
        yield f"has arguments that are encoded twice: {answer!r}"
    if "thought" not in words and (found := EMPTY_THOUGHT.match(answer)) and "think" in found[0].lower():
        yield f"has loss on empty thoughts: {answer!r}"
    tail = answer[max((answer.rfind(word) + len(word) for word in words.values() if word in answer), default=0) :]
    yield from faults_of_end(name, turns[: number + 1], tail, encoded.ends_turns)


def faults_of_end(name: str, turns: list[Message], tail: str, ends_turns: bool) -> Iterator[str]:
    """What is wrong with the end of an answer: `tail` is what has loss after its last word."""
    stops = [squeezed(stop) for stop in template(name).stops]
    ended = next((stop for stop in stops if tail.endswith(stop)), "")
    shown = tail.removesuffix(ended)
    if ends_turns and (not ended or any(stop in shown for stop in stops)):
        yield f"ends with {tail!r}, not with one of {stops}"
    texts = [families.render(name, form, tools_for(name, turns)) for form in forms(turns)]
    if not any(tail in text or text.endswith(shown) for text in map(squeezed, filter(None, texts))):
        yield f"ends with {tail!r}, which the template does not write"


def cell(name: str, column: str) -> str:
    """A cell of the table. Where thoughts under their own key are left out, those in the text may be trained."""
    found = outcome(name, column).cell
    in_text = column == "thoughts" and found.startswith("no") and outcome(name, "thoughts in the text").cell
    return "in the text" if in_text and in_text.startswith("yes") else found


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_family_is_trained_on_its_answers_alone_and_loses_nothing_unsaid(name: str) -> None:
    faults = {kind: found for kind in CONVERSATIONS if (found := outcome(name, kind).faults)}
    assert not faults
    assert outcome(name, "a call that ends with short values").cell == outcome(name, "a call at the end").cell


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_of_any_text_are_trained_alike(name: str) -> None:
    texts = [
        ("e", "|"),  # both are in the names of most control tokens
        ("Use <reasoning>steps</reasoning> tags.", "`<think>` opens, `</thinking>` closes."),
        ("<reasoning>One step.</reasoning> Two.", "<thinking>Three.</thinking> Four."),
    ]
    long = CONVERSATIONS["plain"]
    for first, second in texts:
        said = {FIRST: first, SECOND: second}
        turns: list[Message] = [{**turn, "content": said.get(turn["content"], turn["content"])} for turn in long]
        expected = [
            answer.replace(squeezed(FIRST), squeezed(first)).replace(squeezed(SECOND), squeezed(second))
            for answer in answers_of(name, long)
        ]
        assert answers_of(name, turns) == expected


@pytest.mark.parametrize("name", ["qwq", "deepseek_r1", "gemma4", "nemotron3_nano", "qwen3", "llama3"])
def test_an_empty_think_block_in_a_row_is_no_thought(name: str) -> None:
    block = "<think>\n\n</think>\n\n"
    (answer,) = answers_of(name, [ASKED, assistant(f"{block}{FIRST}")])
    (bare,) = answers_of(name, [ASKED, assistant(FIRST)])
    opened = name in ("qwq", "deepseek_r1", "nemotron3_nano")  # by the prompt, which for Gemma closes it too
    learnt = "" if name == "gemma4" else "</think>" if opened else squeezed(block)
    assert answer == learnt + bare


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_ends_where_its_turn_ends_whatever_its_arguments(name: str) -> None:
    def after(arguments: dict[str, Any]) -> str:
        turn = assistant("", **calls("Golfville"))
        turn["tool_calls"][0]["function"] = {"name": "lookup", "arguments": arguments}
        encoded = encode(name, [ASKED, turn])
        assert isinstance(encoded, EncodedRow), encoded
        (text,) = encoded.texts
        return text.text[text.answer_spans[0].end :]

    if outcome(name, "a call at the end").cell.startswith("yes"):
        expected = after({"city": "Golfville"})
        for arguments in ({}, {"city": None}, {"city": ""}, {"cities": []}, {"there": True, "days": 3}):
            assert after(arguments) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ends_of_answers_are_the_same_beside_another_end_of_sequence_token(name: str) -> None:
    own, turns = template(name).tokenizer, CONVERSATIONS["plain"]
    other = copy.deepcopy(own)
    other.add_special_tokens({"eos_token": "<|doc_end|>"})
    as_own = {other.eos_token_id: own.eos_token_id}  # where the template leaves the end to the tokenizer
    found = encode_chats([row(turns, tools_for(name, turns))], ChatTokenizer(other), EncodingOptions(100_000))[0]
    expected = encode(name, turns)
    assert isinstance(found, EncodedRow) and isinstance(expected, EncodedRow)
    assert [[as_own.get(i, i) for i in e.labels] for e in found.examples] == [e.labels for e in expected.examples]


def answers_of(name: str, turns: list[Message]) -> list[str]:
    """The texts with loss."""
    encoded = encode(name, turns)
    assert isinstance(encoded, EncodedRow), encoded
    return [answer for example in encoded.examples for _, answer in regions_of(name, example)]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "{%- set _ = messages.append(1) -%}",
            "transformers forbids it: set chat_template to a template without it",
        ),
        ("{%- macro deeper() -%}{{ deeper() }}{%- endmacro -%}{{ deeper() }}", "maximum recursion depth exceeded"),
    ],
)
def test_any_error_of_a_template_rejects_the_row(source: str, sentence: str) -> None:
    tokenizer = copy.deepcopy(template("qwen3").tokenizer)
    tokenizer.chat_template = source
    found = encode_chats([row(CONVERSATIONS["plain"])], ChatTokenizer(tokenizer), EncodingOptions(100))[0]
    assert isinstance(found, RowError) and found.reason == "template" and sentence in found.detail


def test_the_table_of_families_is_true() -> None:
    assert len(TEMPLATES) >= 60
    rows = sorted((template(name).title, *(cell(name, kind) for kind in COLUMNS)) for name in TEMPLATES)
    lines = [f"| {' | '.join(cells)} |\n" for cells in [("Family", *COLUMNS), ("---",) * 5, *rows]]
    page = PAGE.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE} has no place for the table of families"
    made = before + begin + "".join(lines) + end + after
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(made, encoding="utf-8")
    assert page == made or os.environ.get("UPDATE_GOLDEN"), "UPDATE_GOLDEN=1 writes the table"
