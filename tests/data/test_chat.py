"""Answers are located, and tokenized alike in training and evaluation, for every model family."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
import torch
from tokenizers import AddedToken
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from src.data.chat import ChatTokenizer
from src.data.encode import EncodedRow, EncodingOptions, encode_chats
from src.data.formats import Conversation, Message, RowError
from src.data.segments import RenderedChat
from src.data.store import IGNORE_INDEX
from src.data.thoughts import EMPTY_THOUGHT
from tests.data import tokenizers
from tests.data.tokenizers import (
    CONVERSATIONS,
    FAMILIES,
    REFUSED,
    TOOLS,
    WITH_TOOLS,
    Family,
    assistant,
    prepended,
    qwen,
    row,
    system,
    texts,
    user,
)

pytest_plugins = ["tests.data.tokenizers"]
pytestmark = pytest.mark.usefixtures("frozen")

ROOT = Path(__file__).resolve().parents[2]
SPOKEN = {name: turns for name, turns in CONVERSATIONS.items() if name not in ("system", "tools", "weights")}
MANY = EncodingOptions(100_000)


def encoded(
    name: str, turns: list[Message], rules: EncodingOptions = MANY, tools: list[Any] | None = None
) -> EncodedRow:
    found = encode_chats([row(turns, tools)], tokenizers.chat(name), rules)[0]
    assert isinstance(found, EncodedRow), found
    return found


def refused(name: str, turns: list[Message], tools: list[Any] | None = None) -> RowError:
    found = encode_chats([row(turns, tools)], tokenizers.chat(name), MANY)[0]
    assert isinstance(found, RowError), found
    return found


def written(family: Family, turn: Message) -> str:
    """The text with loss of an answer, from the description of the family."""
    content, thought = turn["content"], turn.get("reasoning_content")
    if thought and family.name in ("qwen3", "smollm3"):
        content = f"<think>\n{thought}\n</think>\n\n{content}"
    before = ""
    if thought and family.name == "gpt_oss":
        before = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
    return before + family.writes(content) + family.eot


def accepted(family: Family) -> list[str]:
    return [title for title in CONVERSATIONS if family.renders(title)]


def stretches(chat: ChatTokenizer, ids: list[int], learnt: list[bool]) -> list[str]:
    """The text of each run of tokens with loss, decoded in its context."""
    found, start = [], None
    for at, on in enumerate([*learnt, False]):
        if on and start is None:
            start = at
        elif not on and start is not None:
            before = chat.tokenizer.decode(ids[:start])
            found.append(chat.tokenizer.decode(ids[:at]).removeprefix(before))
            start = None
    return found


# what has loss


@pytest.mark.parametrize(
    ("name", "title"), [(name, t) for name, f in FAMILIES.items() for t in SPOKEN if f.renders(t)]
)
def test_answers_and_their_end_of_turn_have_loss_and_nothing_else(name: str, title: str) -> None:
    family, chat, turns = FAMILIES[name], tokenizers.chat(name), SPOKEN[title]
    found = encoded(name, turns)
    wanted = [written(family, turn) for turn in turns if turn["role"] == "assistant"]
    spans = [text.text[span.start : span.end] for text in found.texts for span in text.answer_spans]
    assert spans == wanted
    # what a special token swallows, and the space that SentencePiece puts behind one, is in no token's text
    loose = bool(family.swallows) or family.make is prepended
    shown = [s for e in found.examples for s in stretches(chat, e.ids, e.loss_mask)]
    composed = [normalize("NFC", w) if family.make is qwen else w for w in wanted]
    assert [s.lstrip() if loose else s for s in shown] == [w.lstrip() if loose else w for w in composed]
    one = family.one_text and title != "reasoning"  # inference does not see the thoughts of an earlier answer
    assert len(found.texts) == (1 if one else len(wanted))
    assert found.ends_turns is (family.eot.strip() in chat.special_tokens or name == "command_r7b")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_with_weight_0_has_no_loss(name: str) -> None:
    family = FAMILIES[name]
    found = encoded(name, CONVERSATIONS["weights"])
    learnt = [s for e in found.examples for s in stretches(tokenizers.chat(name), e.ids, e.loss_mask)]
    assert [s.strip() for s in learnt] == [(family.writes("good") + family.eot).strip()]
    assert len(found.examples) == len(found.texts) == len(found.full_examples)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools])
def test_tool_calls_have_loss_and_tool_output_has_not(name: str) -> None:
    found = encoded(name, WITH_TOOLS, tools=TOOLS)
    chat = tokenizers.chat(name)
    learnt = [s for e in found.examples for s in stretches(chat, e.ids, e.loss_mask)]
    assert len(learnt) == 3
    assert "weather" in learnt[0] and "Bern" in learnt[0]
    assert learnt[0].endswith(FAMILIES[name].eot)
    assert not any("rain<" in text or "window" in text for text in learnt)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.tools])
def test_calls_of_tools_that_a_template_leaves_out_are_refused(name: str) -> None:
    error = refused(name, WITH_TOOLS, TOOLS)
    if error.reason != "dropped_by_template":
        assert error.reason == "template"
        assert "must alternate" in error.detail or "not supported" in error.detail


@pytest.mark.parametrize("name", FAMILIES)
def test_an_end_of_turn_has_loss_even_if_it_is_the_padding_token(name: str) -> None:
    family = FAMILIES[name]
    chat = ChatTokenizer(tokenizers.tokenizer(family))
    chat.tokenizer.pad_token = chat.tokenizer.eos_token
    short, long = (
        encode_chats([row(CONVERSATIONS[title])], chat, MANY)[0] for title in ("single turn", "several turns")
    )
    assert isinstance(short, EncodedRow) and isinstance(long, EncodedRow)
    examples = [short.examples[0], long.examples[-1]]
    for example in examples:
        last = max(i for i, on in enumerate(example.loss_mask) if on)
        assert example.labels[last] == example.ids[last]
        assert chat.tokenizer.decode([example.ids[last]]) in family.eot or not family.eot
        assert [label == IGNORE_INDEX for label in example.labels] == [not on for on in example.loss_mask]
    labels = pad_sequence([torch.tensor(e.labels) for e in examples], batch_first=True, padding_value=IGNORE_INDEX)
    assert [int((r != IGNORE_INDEX).sum()) for r in labels] == [sum(e.loss_mask) for e in examples]


# where it begins


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_has_bos_once_if_the_template_writes_it(name: str) -> None:
    family, chat = FAMILIES[name], tokenizers.chat(name)
    bos = chat.tokenizer.bos_token_id
    for title in accepted(family):
        turns = CONVERSATIONS[title]
        for example in encoded(name, turns, tools=TOOLS if title == "tools" else None).examples:
            prompts = [chat.prompt_ids(Conversation(turns[: 1 + (title == "system")])), example.ids]
            if family.bos is None:
                assert bos is None
            elif name == "smollm2":  # its bos is what begins every turn
                assert all(ids[:2].count(bos) == 1 for ids in prompts)
            elif family.writes_bos:
                turns_of_it = {"llama2": len(texts(turns)), "olmo2": 1 + len(texts(turns))}  # BOS occurs here too
                assert all(ids[0] == bos and ids[1] != bos for ids in prompts)
                assert example.ids.count(bos) == turns_of_it.get(name, 1)
            else:
                assert all(ids[0] != bos for ids in prompts)


@pytest.mark.parametrize(("name", "title"), [(name, t) for name, f in FAMILIES.items() for t in accepted(f)])
def test_an_evaluation_prompt_is_the_beginning_of_the_training_row(name: str, title: str) -> None:
    turns, chat = CONVERSATIONS[title], tokenizers.chat(name)
    tools = TOOLS if title == "tools" else None
    found = encoded(name, [{**turn, "weight": 1} for turn in turns], tools=tools)
    asked = []
    for text, example in zip(found.texts, found.examples, strict=True):
        begins = [i for i, on in enumerate(example.loss_mask) if on and not example.loss_mask[i - 1]]
        for turn, begin in zip(text.answer_turns, begins, strict=True):
            assert chat.prompt_ids(Conversation(turns[: turn + 1], tools)) == example.ids[:begin]
            inference = chat.prompt_ids(Conversation(turns[:turn], tools))
            block = chat.tokenizer.decode(example.ids[len(inference) : begin])
            assert example.ids[: len(inference)] == inference and (not block or EMPTY_THOUGHT.fullmatch(block))
            asked.append(turn)
    assert asked == [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def test_a_prompt_is_cut_at_earlier_answers_as_in_training() -> None:
    """Its last answers make this conversation one text an answer, and the prompt of the first is not."""
    chat = ChatTokenizer(tokenizers.tokenizer(FAMILIES["chatml"]))
    chat.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + '\n' + (m.reasoning_content or '') * (loop.last | int) + m.content }}"
        "{% if m.role == 'assistant' %}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    thought = assistant("\n\nb", reasoning_content="c")
    turns = [user("a"), assistant("\n\nb"), user("a"), thought, user("a"), thought]
    found = encode_chats([row(turns)], chat, MANY)[0]
    assert isinstance(found, EncodedRow)
    assert len(found.texts) == 3
    for text, example in zip(found.texts, found.examples, strict=True):
        asked = chat.prompt_ids(Conversation(turns[: text.answer_turns[0] + 1]))
        assert asked == example.ids[: example.loss_mask.index(True)]
        assert example.ids != chat.tokenizer(text.text)["input_ids"]


# what is refused


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma2", "System role not supported"),
        ("mistral_v01", "Conversation roles must alternate user/assistant/user/assistant/..."),
    ],
)
def test_a_template_without_system_turns_rejects_one_with_its_message(name: str, words: str) -> None:
    error = refused(name, CONVERSATIONS["system"])
    assert error.reason == "template"
    assert words in error.detail


@pytest.mark.parametrize("name", ["llama2", "mistral_v01", "mistral_v03", "gemma2", "vicuna", "command_r"])
def test_a_template_rejects_turns_out_of_order_with_its_message(name: str) -> None:
    error = refused(name, [user("a"), user("b"), assistant("c")])
    assert error.reason == "template"
    assert "roles must alternate user/assistant/user/assistant/..." in error.detail
    with pytest.raises(RowError, match="must alternate"):
        tokenizers.chat(name).prompt_ids(Conversation([user("a"), user("b")]))


def test_a_prompt_and_an_answer_that_do_not_fit_are_refused_with_both_texts() -> None:
    chat = ChatTokenizer(tokenizers.tokenizer(FAMILIES["chatml"]))
    chat.tokenizer.chat_template = chat.tokenizer.chat_template.replace(
        "'<|im_start|>assistant", "'<|im_start|>poet"
    )
    error = encode_chats([row(CONVERSATIONS["single turn"])], chat, MANY)[0]
    assert isinstance(error, RowError) and error.reason == "template"
    assert (
        "the prompt continues with 'poet\\n', the conversation with 'assistant\\nFour.<|im_end|>'" in error.detail
    )


def test_an_answer_of_which_the_template_writes_nothing_is_refused() -> None:
    chat = ChatTokenizer(tokenizers.tokenizer(FAMILIES["falcon"]))
    chat.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content.split('x')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    empty, said = encode_chats([row([user("q"), assistant(a)]) for a in ("x", "zy")], chat, MANY)
    assert (
        isinstance(empty, RowError) and empty.detail == "has a message 2 of which the chat template writes nothing"
    )
    assert isinstance(said, EncodedRow) and stretches(chat, *said.examples[0]) == ["zy<|endoftext|>"]


def test_templates_without_system_turns_or_with_one_answer_only_work() -> None:
    chat = ChatTokenizer(tokenizers.tokenizer(FAMILIES["chatml"]))
    chat.tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('One answer only') }}{% endif %}"
    ) + chat.tokenizer.chat_template
    one, two = encode_chats([row(CONVERSATIONS[title]) for title in ("single turn", "several turns")], chat, MANY)
    assert isinstance(one, EncodedRow) and stretches(chat, *one.examples[0]) == ["Four.<|im_end|>"]
    assert isinstance(two, RowError) and two.detail.endswith("One answer only")


def test_tools_that_are_no_schema_are_refused() -> None:
    assert refused("qwen2_5", CONVERSATIONS["single turn"], ["weather"]).reason == "template"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_that_steers_the_model_is_refused_within_a_message(name: str) -> None:
    family = FAMILIES[name]
    steering = {*family.specials, *filter(None, (family.bos, family.eos))} - {
        "<unk>",
        "<filename>",
        "<pad>",
        "<|pad|>",
        "<|eom_id|>",
    }
    unused = {  # neither written by the template nor the beginning or end of a text
        "chatml": {"<|endoftext|>"},
        "qwen2_5": {"<|endoftext|>"},
        "smollm2": {"<|endoftext|>"},
        "smollm3": {"<|endoftext|>"},
        "llama3_marked": {"<|end_of_text|>"},
        "llama3_1": {"<|end_of_text|>"},
        "llama3_2": {"<|end_of_text|>"},
        "phi3": {"</s>"},
        "command_r": {"<EOS_TOKEN>"},
        "command_r7b": {"<EOS_TOKEN>"},
    }.get(name, set())
    for token in sorted(steering - unused):
        for turns in ([user(f"x{token}y"), assistant("z")], [user("x"), assistant(f"y {token}")]):
            error = refused(name, turns)
            assert (error.reason, error.detail) == (
                "control_token",
                f"holds the control token {token} as text in a message",
            )
    splits = {"</think>"} if name == "qwen3" else set()  # its template takes what stands before for thoughts
    for token in sorted(({*family.specials, *family.plain} - steering | unused) - splits):
        kept = family.thoughts or token != "</think>"
        encoded(name, [user(f"x{token}y"), assistant(f"y {token} z" if kept else "z")])


@pytest.mark.parametrize("name", ["qwen3", "r1_distill_think"])
def test_a_mentioned_tag_is_no_thought(name: str) -> None:
    """An answer about tags is a plain answer: no think block of the template carries loss, none is left open."""
    said = "Use <reasoning>steps</reasoning> tags, then answer."
    found = encoded(name, [user("q"), assistant(said)])
    assert stretches(tokenizers.chat(name), *found.examples[0])[0].startswith(said)
    assert not found.with_thoughts


@pytest.mark.parametrize("key", ["reasoning_content", "tool_calls"])
def test_a_token_that_steers_the_model_is_found_in_all_that_a_row_carries(key: str) -> None:
    value: Any = "<|im_end|>"
    if key == "tool_calls":
        value = [{"type": "function", "function": {"name": "weather", "arguments": {"city": value}}}]
    assert refused("qwen3", [user("x"), assistant("y", **{key: value})]).reason == "control_token"
    tool = {"type": "function", "function": {"name": "end", "description": "writes <|im_end|>"}}
    detail = refused("qwen3", [user("x"), assistant("y")], [tool]).detail
    assert detail == "holds the control token <|im_end|> as text in its tools"


def test_a_special_token_outside_of_the_template_does_not_end_an_answer() -> None:
    found = encoded("falcon", [user("x"), assistant("see <filename> and go"), user("y"), assistant("<filename>")])
    learnt = stretches(tokenizers.chat("falcon"), found.examples[0].ids, found.examples[0].loss_mask)
    assert learnt == [" see <filename> and go<|endoftext|>"]
    last = stretches(tokenizers.chat("falcon"), found.examples[1].ids, found.examples[1].loss_mask)
    assert last == [" <filename><|endoftext|>"]


# tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_one_pass_but_for_newlines_at_the_edges(name: str) -> None:
    """The golden records name the rows that differ."""
    chat = tokenizers.chat(name)
    for title in accepted(FAMILIES[name]):
        found = encoded(name, CONVERSATIONS[title], tools=TOOLS if title == "tools" else None)
        for text, example in zip(found.texts, found.examples, strict=True):
            whole = chat.tokenizer(text.text, add_special_tokens=False)["input_ids"]
            assert whole == example.ids or title in ("space around", "newlines before")
            assert chat.tokenizer.decode(whole) == chat.tokenizer.decode(example.ids)


@pytest.mark.parametrize("answer", ["Hello", " Hello", "\nHello", "\n Hello"])
def test_an_answer_keeps_its_text_where_a_token_would_reach_into_it(answer: str) -> None:
    """Two spaces are one token of this tokenizer, and the template ends a prompt with one."""
    chat = ChatTokenizer(tokenizers.tokenizer(FAMILIES["zephyr"]))
    chat.tokenizer.chat_template = "{% for m in messages %}{{ m.content + '</s> ' }}{% endfor %}"
    found = encode_chats([row([user("What"), assistant(answer)])], chat, MANY)[0]
    assert isinstance(found, EncodedRow)
    (example,) = found.examples
    assert stretches(chat, *example) == [f"{answer}</s>"]
    whole = chat.tokenizer(found.texts[0].text, add_special_tokens=False)["input_ids"]
    assert chat.tokenizer.decode(example.ids) == chat.tokenizer.decode(whole)


def test_no_letter_is_lost_if_a_token_spans_every_context() -> None:
    chat = ChatTokenizer(tokenizers.tokenizer(FAMILIES["zephyr"]))
    chat.tokenizer.add_tokens(["\n\n"])
    chat.tokenizer.chat_template = "{% for m in messages %}{{ m.content + '</s>\n' }}{% endfor %}"
    found = encode_chats([row([user("What"), assistant("\nHello")])], chat, MANY)[0]
    assert isinstance(found, EncodedRow)
    assert stretches(chat, *found.examples[0])[0].lstrip(" ") == "\nHello</s>"


@pytest.mark.parametrize("name", ["phi3", "llama2", "mistral_v03", "qwen3"])
def test_truncation_and_padding_of_the_tokenizer_are_switched_off(name: str) -> None:
    chat = ChatTokenizer(tokenizers.tokenizer(FAMILIES[name]))
    turns = CONVERSATIONS["several turns"]
    before = chat.prompt_ids(Conversation(turns[:3]))
    chat.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert chat.prompt_ids(Conversation(turns[:3])) == before
    chat.tokenizer.backend_tokenizer.enable_truncation(2)
    chat.tokenizer.backend_tokenizer.enable_padding(length=300)
    assert chat.prompt_ids(Conversation(turns[:3])) == before
    assert chat.tokenize([]) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_document_has_the_tokens_of_its_text_and_an_end(name: str) -> None:
    chat = tokenizers.chat(name)
    eos = chat.tokenizer.eos_token_id
    for text in ("Once upon a time.", " a\n\nb ", "漢字 🙂"):
        found = encoded(name, [{"role": "text", "content": text}])
        (example,) = found.examples
        assert example.ids == [*chat.tokenizer(text)["input_ids"], eos]
        first = int(FAMILIES[name].bos is not None)
        assert example.loss_mask == [False] * first + [True] * (len(example.ids) - first)


def test_a_document_that_has_its_marks_is_not_given_them_again() -> None:
    bare, marked = (encoded("llama2", [{"role": "text", "content": t}]) for t in ("Once.", "<s>Once.</s>"))
    assert bare.examples == marked.examples


def test_a_template_without_special_tokens_is_trained_on_its_end_and_reported() -> None:
    found = encoded("chatml_text", CONVERSATIONS["several turns"])
    assert not found.ends_turns
    assert next(t.text[s.start : s.end] for t in found.texts for s in t.answer_spans) == "Hello there<|im_end|>"


# identity


def identities(tokenizer: Any) -> tuple[str, str]:
    chat = ChatTokenizer(tokenizer)
    return chat.template_hash, chat.tokenizer_hash


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_survives_being_saved_and_used(name: str, tmp_path: Path) -> None:
    made = tokenizers.tokenizer(FAMILIES[name])
    before = identities(made)
    made(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert identities(made) == before
    made.save_pretrained(tmp_path)
    assert identities(AutoTokenizer.from_pretrained(tmp_path)) == before


def test_identity_changes_with_tokenizer_and_template() -> None:
    def made() -> Any:
        return tokenizers.tokenizer(FAMILIES["zephyr"])

    template, rules = identities(made())
    other = made()
    other.chat_template += " "
    assert identities(other) == (identities(other)[0], rules)
    assert identities(other)[0] != template
    changes: list[Any] = [
        lambda t: t.add_tokens(["<new>"]),
        lambda t: t.add_tokens([AddedToken("<new>", special=True)], special_tokens=True),
        lambda t: setattr(t, "eos_token", "<unk>"),
        lambda t: setattr(t.backend_tokenizer, "normalizer", None),
    ]
    found = {rules}
    for change in changes:
        other = made()
        change(other)
        assert identities(other)[0] == template
        found.add(identities(other)[1])
    assert len(found) == 1 + len(changes)


def test_identity_is_the_same_in_another_process(tmp_path: Path) -> None:
    made = tokenizers.tokenizer(FAMILIES["qwen3"])
    made.save_pretrained(tmp_path)
    script = (
        "import sys\nfrom transformers import AutoTokenizer\nfrom src.data.chat import ChatTokenizer\n"
        "chat = ChatTokenizer(AutoTokenizer.from_pretrained(sys.argv[1]))\n"
        "print(chat.template_hash, chat.tokenizer_hash)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert tuple(said.stdout.split()) == identities(made)


def test_segments_make_up_the_complete_text() -> None:
    chat = tokenizers.chat("qwen3")
    for turns in SPOKEN.values():
        for text in chat.training_texts(Conversation(turns)):
            assert "".join(piece.text for piece in chat.segments(text)) == text.text
    assert chat.segments(RenderedChat("", (), ())) == []


def test_a_system_turn_is_in_the_prompt_without_loss() -> None:
    found = encoded("smollm2", [system("Be brief."), user("Hi"), assistant("Hello")])
    assert stretches(tokenizers.chat("smollm2"), *found.examples[0]) == ["Hello<|im_end|>"]


# how a trained model is prompted


@pytest.mark.parametrize(
    ("name", "prompt_settings"),
    [
        ("qwen3", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("r1_distill_think", {"prompt_suffix": "\n</think>\n\n"}),
        ("qwen2_5", {}),
    ],
)
def test_a_model_trained_without_thoughts_is_prompted_as_it_was_trained(
    name: str, prompt_settings: dict[str, Any]
) -> None:
    family = FAMILIES | {REFUSED.name: REFUSED}
    chat = ChatTokenizer(tokenizers.tokenizer(family[name]))
    before = chat.identity
    chat.record_prompt_settings(trained_thoughts=False)
    assert chat.identity == before | prompt_settings
    turns = [user("q"), assistant("yes")]
    variables = prompt_settings.get("chat_template_kwargs", {})
    prompt = chat.render(Conversation(turns[:1], None, variables), prompt=True)
    (text,) = chat.training_texts(Conversation(turns))
    assert text.text[: text.answer_spans[0].start] == prompt + prompt_settings.get("prompt_suffix", "")
    served = ChatTokenizer(chat.tokenizer, variables)
    assert served.prompt_ids(Conversation(turns)) == chat.prompt_ids(Conversation(turns))
    if variables:  # the template's own prompt, as a server renders it
        assert served.prompt_ids(Conversation(turns[:1])) == chat.prompt_ids(Conversation(turns))


def test_a_model_trained_with_thoughts_may_think() -> None:
    chat = ChatTokenizer(tokenizers.tokenizer(FAMILIES["qwen3"]))
    chat.record_prompt_settings(trained_thoughts=True)
    assert "empty_thoughts" not in chat.identity
    evaluated = ChatTokenizer(chat.tokenizer, empty_thoughts="loss")  # as an evaluation reads that record
    turns = [user("q"), assistant("yes")]
    assert evaluated.prompt_ids(Conversation(turns)) == evaluated.prompt_ids(Conversation(turns[:1]))
