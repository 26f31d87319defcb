"""Chat templates by name: what each trains on, with tokenizers that are built like those of its family."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src import chat_templates
from src.data.chat import ChatTokenizer
from src.data.conversation import Conversation, Row, RowError
from src.data.encode import EncodedRow, EncodingOptions, encode_chats
from src.data.formats import Message
from src.data.mask_check import MaskVerifier
from tests.data import tokenizers
from tests.data.tokenizers import TOOLS, assistant, row, user

ANYWHERE = ("mistral_v01", "llama3", "qwen2_5")
FAMILIES = {  # template -> tokenizers that it is used with
    "alpaca": ANYWHERE, "vicuna": ANYWHERE, "zephyr": ANYWHERE, "mistral": ("mistral_v01", "llama2"),
    "chatml": ("qwen2_5", "smollm2"), "gemma": ("gemma2",), "llama3": ("llama3", "llama3_1"),
    "phi3": ("phi3", "phi4_mini"),
}  # fmt: skip
PAIRS = [(name, family) for name, families in FAMILIES.items() for family in families]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TURNS: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": " And three? "},
    {"role": "assistant", "content": "Five,\n\nnaturally."},
]
WITH_CALLS: list[Message] = [
    {"role": "user", "content": "Rain in Bern?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "wet"},
    {"role": "tool", "content": "very wet"},
    {"role": "assistant", "content": "Yes."},
]


def chat_of(name: str, family: str) -> ChatTokenizer:
    tokenizer = copy.deepcopy(tokenizers.chat(family).tokenizer)
    tokenizer.chat_template = chat_templates.read(name)
    return ChatTokenizer(tokenizer)


def trained(chat: ChatTokenizer, turns: list[Message], tools: list[Any] | None = None) -> list[str]:
    """The texts with loss, after both derivations of the mask have agreed."""
    (found,) = encode_chats([row(turns, tools)], chat, EncodingOptions(100_000))
    assert isinstance(found, EncodedRow), found
    assert found.ends_turns
    for text, example in zip(found.texts, found.full_examples, strict=True):
        checked = MaskVerifier(chat).verify(Conversation(turns, tools), text, example)
        assert checked.agrees, checked.detail
    return [text.text[span.start : span.end] for text in found.texts for span in text.answer_spans]


def test_the_table_of_this_test_has_every_template() -> None:
    assert chat_templates.names() == sorted(FAMILIES)
    assert all(chat_templates.description(name) for name in FAMILIES)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_template_trains_answers_and_their_end_and_keeps_every_character(name: str, family: str) -> None:
    chat = chat_of(name, family)
    answers = ["Four.", "Five,\n\nnaturally."]
    assert [text.strip() for text in trained(chat, TURNS)] == [
        answer + chat.markup.end_of_turn for answer in answers
    ]
    text = chat.render(Conversation(TURNS))
    assert all(turn["content"] in text for turn in TURNS)
    assert text.startswith(chat.render(Conversation(TURNS[:-1]), prompt=True))
    start = chat.tokenizer.bos_token if chat.tokenizer("a")["input_ids"][0] == chat.tokenizer.bos_token_id else ""
    assert text.count(start) == 1 if start and name in ("vicuna", "mistral", "gemma", "llama3") else True


@pytest.mark.parametrize("name", ["chatml", "llama3"])
@pytest.mark.parametrize("arguments", [{"city": "Bern"}, '{"city": "Bern"}'])
def test_calls_tools_and_results_are_rendered(name: str, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns: list[Message] = [turn | {"tool_calls": [call, call]} if "tool_calls" in turn else turn
                            for turn in WITH_CALLS]  # type: ignore[misc]  # fmt: skip
    chat = chat_of(name, FAMILIES[name][0])
    first, last = trained(chat, turns, TOOLS)
    assert first.startswith("I look.\n") and first.count('{"city": "Bern"}') == 2 and first.count("weather") == 2
    assert last == "Yes." + chat.markup.end_of_turn
    text = chat.render(Conversation(turns, TOOLS))
    assert "\nwet" in text and "very wet" in text and TOOLS[0]["function"]["description"] in text


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("chatml", "llama3")])
def test_a_template_without_calls_refuses_their_results_by_role(name: str) -> None:
    (found,) = encode_chats([row(WITH_CALLS)], chat_of(name, FAMILIES[name][0]), EncodingOptions(100_000))
    assert not isinstance(found, EncodedRow)
    assert "tool" in str(found)


def test_chatml_trains_thoughts() -> None:
    turns: list[Message] = [*TURNS[:2], TURNS[2] | {"reasoning_content": "2+2"}]  # type: ignore[list-item]
    assert trained(chat_of("chatml", "qwen2_5"), turns) == ["<think>\n2+2\n</think>\n\nFour.<|im_end|>"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{% if enable_thinking is defined %}{% endif %}{{ messages }}", {"messages", "enable_thinking"}),
        ("{% set day = day | default('x') %}{% for m in messages %}{{ m }}{% endfor %}", {"messages", "day"}),
        ("{% set x = 1 %}{{ x }}{% generation %}{{ messages }}{% endgeneration %}", {"messages"}),
        ("{% macro show(a) %}{{ a }}{% endmacro %}{% for m in messages %}{% break %}{% endfor %}", {"messages"}),
    ],
)
def test_the_variables_of_a_template_are_those_that_a_caller_can_set(text: str, found: set[str]) -> None:
    assert chat_templates.variables(text) == found


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"chat_template": "chatm"}, "chat_template=chatm is neither a file nor a name; did you mean chatml?"),
        ({"chat_template": "no/such.jinja"}, "chat_template=no/such.jinja is neither a file nor a name; give"),
        ({"chat_template": "bad.jinja"}, "chat_template=bad.jinja: line 2 of bad.jinja is not Jinja"),
        ({"chat_template": "page.md"}, "chat_template=page.md: page.md is not a chat template: it does not read"),
        ({"chat_template": "bytes.jinja"}, "chat_template=bytes.jinja: bytes.jinja is not UTF-8 text"),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs.tools is not a variable of a template"),
        ({"chat_template": "chatml", "task": "seq2seq"}, "chat_template is not supported with task=seq2seq"),
    ],
)
def test_what_is_wrong_with_a_setting_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jinja").write_text("{{ messages }}\n{% if %}")
    Path("page.md").write_text("A page.")
    Path("bytes.jinja").write_bytes(b"{{ messages }}\xff")
    (found,) = chat_templates.problems(settings)
    assert found.startswith(sentence)


def test_a_template_of_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs" / "chat_templates"
    own.mkdir(parents=True)
    (own / "mine.jinja").write_text("{#- Mine -#}{{ messages }}\n")
    assert "mine" in chat_templates.names() and chat_templates.problems({"chat_template": "mine"}) == []
    assert chat_templates.description("mine") == "Mine"
    assert chat_templates.read("mine") == "{#- Mine -#}{{ messages }}\n"


def test_thoughts_are_refused_where_the_run_switches_thinking_off_and_train_where_a_row_switches_it_on() -> None:
    chat = ChatTokenizer(tokenizers.tokenizer(tokenizers.FAMILIES["qwen3"]), {"enable_thinking": False})
    turns = [user("q"), assistant("yes", reasoning_content="Let me see.")]
    switched = Row(Path("a"), 1, turns, None, {"enable_thinking": True})
    rows = [row([user("q"), assistant("yes")]), row(turns), switched]
    plain, off, on = encode_chats(rows, chat, EncodingOptions(1000))
    assert isinstance(off, RowError) and off.reason == "thinking_off"
    assert isinstance(plain, EncodedRow) and isinstance(on, EncodedRow)
    assert [text.text.partition("assistant")[2] for text in (plain.texts[0], on.texts[0])] == [
        "\n<think>\n\n</think>\n\nyes<|im_end|>\n", "\n<think>\nLet me see.\n</think>\n\nyes<|im_end|>\n"
    ]  # fmt: skip


def test_a_variable_of_a_row_that_the_template_does_not_read_is_left_out_by_it() -> None:
    chat = chat_of("chatml", "qwen2_5")
    variables = {"tone": "calm", "tone_": 1, "tools": [1]}
    plain, varied = row(TURNS), replace(row(TURNS), template_kwargs=variables)
    chat.tokenizer.chat_template = "{{ tone if tone is defined }}" + chat.tokenizer.chat_template
    found = encode_chats([plain, varied], ChatTokenizer(chat.tokenizer), EncodingOptions(100_000))
    dropped = [each.dropped for each in found if isinstance(each, EncodedRow)]
    assert dropped == [(), ("chat_template_kwargs.tone_", "chat_template_kwargs.tools")]
