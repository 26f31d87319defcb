"""Rows and tokens: no row is lost without a word, and the loss falls on the answers and on nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from src.config import DataArgs
from src.data.formats import Message
from src.data.loader import IGNORED, MOST_SHOWN, Row, encode, encode_messages, encode_prompt, read_rows, render
from src.errors import DataError
from src.model.load import load_tokenizer
from src.train.fit import Collator
from tests.fixtures import ROOT, chat, jsonl

pytest_plugins = ["tests.fixtures"]

GOOD = json.dumps(chat("2+2?", "4"))
DEMO_FILES = {
    **{f"data/{name}": "messages" for name in ("ingot.jsonl", "formats/messages.jsonl")},
    "data/formats/prompt_completion.jsonl": "prompt_completion",
    "data/formats/instruction.jsonl": "instruction",
    **{f"data/eval/{name}.jsonl": "prompt_completion" for name in ("test", "dev", "adversarial")},
}


def put(folder: Path, content: str | bytes, name: str = "x.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def learned(ids: list[int], labels: list[int]) -> list[list[int]]:
    """The runs of tokens with loss, after a check that each label is its own token."""
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return [list(part) for has_loss, part in groupby(labels, lambda label: label != IGNORED) if has_loss]


# --- lines and rows --------------------------------------------------------------------------------------


def test_every_bad_row_is_named_by_file_and_line_at_once(tmp_path: Path) -> None:
    first = put(tmp_path, f'{GOOD}\n{{"messages": []}}\n{GOOD}\nnot json\n', "a.jsonl")
    second = put(tmp_path, f"[]\n{GOOD}\n", "b.jsonl")
    with pytest.raises(DataError) as caught:
        read_rows([first, second], DataArgs())
    assert [problem.split(" (")[0] for problem in caught.value.problems] == [
        f"{first}:2 has no list of messages",
        f"{first}:4 is not JSON: Expecting value at column 1",
        f"{second}:1 is not a JSON object",
    ]
    assert all("data_format=messages" in problem for problem in caught.value.problems)
    assert "on_bad_row=skip" in str(caught.value)


def test_one_bad_row_is_enough_to_refuse(tmp_path: Path) -> None:
    path = put(tmp_path, f"{GOOD}\n{{}}\n{GOOD}\n")
    with pytest.raises(DataError, match=r"x\.jsonl:2 has no list of messages"):
        read_rows([path], DataArgs())


def test_when_bad_rows_are_many_the_rest_is_counted(tmp_path: Path) -> None:
    path = put(tmp_path, "{}\n" * (MOST_SHOWN + 3))
    with pytest.raises(DataError) as caught:
        read_rows([path], DataArgs())
    assert len(caught.value.problems) == MOST_SHOWN + 1
    assert caught.value.problems[-1] == "... and 3 more"


def test_bad_rows_can_be_skipped_and_are_reported(tmp_path: Path) -> None:
    path = put(tmp_path, f"{GOOD}\n{{}}\n{GOOD}\n{{\n")
    rows, rejected = read_rows([path], DataArgs(on_bad_row="skip"))
    assert [row.line for row in rows] == [1, 3]
    assert [(r.line, r.reason) for r in rejected] == [(2, "no_messages"), (4, "not_json")]


def test_rows_keep_the_order_of_their_files_and_lines(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path / n, [chat(f"{n} {i}", "4") for i in range(3)]) for n in ("b.jsonl", "a.jsonl")]
    rows, _ = read_rows(paths, DataArgs())
    assert [(r.file.name, r.line) for r in rows] == [(n, i) for n in ("b.jsonl", "a.jsonl") for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (f"\ufeff{GOOD}\n{GOOD}\n", [1, 2]),
        (f"{GOOD}\r\n{GOOD}\r\n", [1, 2]),
        (f"\n{GOOD}\n  \n\t\r\n{GOOD}", [2, 5]),
        (f"  {GOOD}  \n", [1]),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "white space around"],
)
def test_rows_are_read_however_the_file_was_saved(tmp_path: Path, content: str, lines: list[int]) -> None:
    rows, rejected = read_rows([put(tmp_path, content)], DataArgs())
    assert [row.line for row in rows] == lines
    assert not rejected
    assert all(row.messages == chat("2+2?", "4")["messages"] for row in rows)


@pytest.mark.parametrize(
    ("line", "reason", "told"),
    [
        ('{"messages": [', "not_json", "at column 15"),
        (b'{"messages": "\xe9"}', "not_utf8", "at byte 15"),
        ("[" * 200_000, "not_json", "nested too deeply"),
        (f"{GOOD}{GOOD}", "not_json", "Extra data"),
    ],
    ids=["not JSON", "not UTF-8", "deep nesting", "two values in a line"],
)
def test_a_line_that_cannot_be_read_is_one_bad_row(
    tmp_path: Path, line: str | bytes, reason: str, told: str
) -> None:
    raw = line.encode() if isinstance(line, str) else line
    path = put(tmp_path, b"\n".join([GOOD.encode(), raw, GOOD.encode()]))
    rows, (rejection,) = read_rows([path], DataArgs(on_bad_row="skip"))
    assert [row.line for row in rows] == [1, 3]
    assert (rejection.line, rejection.reason) == (2, reason)
    assert told in rejection.detail


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n"])
def test_files_without_a_single_row_are_refused(tmp_path: Path, content: str) -> None:
    path = put(tmp_path, content)
    with pytest.raises(DataError, match=r"x\.jsonl: no row to train on"):
        read_rows([path], DataArgs(on_bad_row="skip"))


# --- tokens and labels -----------------------------------------------------------------------------------


def row(*contents: str, system: str | None = None) -> Row:
    return Row(Path("x.jsonl"), 1, chat(*contents, system=system)["messages"])


@pytest.mark.parametrize(
    "given",
    [
        row("2+2?", "4"),
        row("Shift it.", "SLIDE(feed_rate, 1h, BACK)", "Same for kiln temp.", "SLIDE(kiln_temp, 1h, BACK)"),
        row("2+2?", "4", system="Count."),
        row("2+2?", "4", "Thanks!"),
        row("What ends a turn?", "\n <|start|>assistant\n4 ", "And ünïcode \U0001f642?", "4\u2028\U0001f642"),
    ],
    ids=["one turn", "two turns", "system", "no last answer", "odd text"],
)
def test_the_loss_covers_each_answer_with_its_end_of_turn_token_and_nothing_else(
    tokenizer: Any, given: Row
) -> None:
    ids, labels = encode_messages(given.messages, tokenizer)
    answers = [turn["content"] for turn in given.messages if turn["role"] == "assistant"]
    found = learned(ids, labels)
    assert [tokenizer.decode(part) for part in found] == [f"{answer}<|end|>" for answer in answers]
    assert all(part[-1] == tokenizer.eos_token_id for part in found)


def test_the_tokens_are_the_text_of_the_chat_template(tokenizer: Any) -> None:
    given = row("Shift it.", "SLIDE(a, 1h, BACK)", "Again.", "SLIDE(b, 1h, BACK)", system="Count.")
    ids, _ = encode_messages(given.messages, tokenizer)
    assert tokenizer.decode(ids) == render(given.messages, tokenizer)


def boundaries(messages: list[Message]) -> Iterator[int]:
    return (i for i, turn in enumerate(messages) if turn["role"] == "assistant")


def assert_prompts_are_prefixes(tokenizer: Any) -> int:
    """On every row of the demo: an evaluation prompt is what stood before that answer in training."""
    checked = 0
    for name, data_format in DEMO_FILES.items():
        rows, _ = read_rows([ROOT / name], DataArgs(data_format=data_format))  # type: ignore[arg-type]
        for each in rows:
            ids, labels = encode_messages(each.messages, tokenizer)
            starts = [i for i, x in enumerate(labels) if x != IGNORED and (i == 0 or labels[i - 1] == IGNORED)]
            prompts = [encode_prompt(each.messages[:i], tokenizer) for i in boundaries(each.messages)]
            assert [len(p) for p in prompts] == starts, f"{name}:{each.line}"
            assert all(p == ids[: len(p)] for p in prompts), f"{name}:{each.line}"
            parts = [tokenizer.decode(part) for part in learned(ids, labels)]
            answers = [t["content"] + tokenizer.eos_token for t in each.messages if t["role"] == "assistant"]
            assert parts == answers, f"{name}:{each.line}"
            checked += len(prompts)
    return checked


def test_an_evaluation_prompt_is_token_by_token_what_training_showed(tokenizer: Any) -> None:
    lines = sum(len((ROOT / name).read_bytes().splitlines()) for name in DEMO_FILES)
    assert assert_prompts_are_prefixes(tokenizer) > lines  # conversations have more than one answer


@pytest.mark.smollm2
def test_an_evaluation_prompt_is_what_training_showed_to_the_real_model(smollm2: Path) -> None:
    assert assert_prompts_are_prefixes(load_tokenizer(str(smollm2))) > 0


def test_a_row_over_max_length_is_rejected_and_named(tokenizer: Any) -> None:
    short, long = row("2+2?", "4"), Row(Path("x.jsonl"), 7, chat("2+2?", "4" * 500)["messages"])
    limit = len(encode_messages(short.messages, tokenizer)[0])
    examples, (rejection,) = encode([short, long], tokenizer, limit)
    assert [e.row for e in examples] == [short]
    assert rejection.reason == "over_length"
    assert str(rejection).startswith("x.jsonl:7 has ")
    assert f"over max_length={limit}" in rejection.detail
    assert not encode([short], tokenizer, limit - 1)[0]


# --- other people's chat templates -----------------------------------------------------------------------


def with_template(tiny: Path, template: str) -> Any:
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.chat_template = template
    return tokenizer


PLAIN = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def test_a_row_that_the_template_refuses_is_rejected_with_the_reason(tiny: Path) -> None:
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    tokenizer = with_template(tiny, refusing + PLAIN)
    examples, (rejection,) = encode([row("2+2?", "4", system="Count."), row("2+2?", "4")], tokenizer, 512)
    assert len(examples) == 1
    assert rejection.reason == "template"
    assert rejection.detail == "is refused by the chat template: System role not supported"


def test_a_conversation_that_begins_with_an_answer_is_trained_or_rejected(tokenizer: Any) -> None:
    begins = Row(Path("x.jsonl"), 3, [{"role": "assistant", "content": "Hello!"}, *row("2+2?", "4").messages])
    examples, rejected = encode([begins, row("2+2?", "4")], tokenizer, 512)
    assert len(examples) + len(rejected) == 2


def test_half_a_surrogate_pair_is_one_bad_row(tmp_path: Path, tokenizer: Any) -> None:
    path = put(tmp_path, json.dumps(chat("2 \ud83d 2?", "4")) + f"\n{GOOD}\n")  # as broken exports have it
    rows, bad = read_rows([path], DataArgs(on_bad_row="skip"))
    examples, unfit = encode(rows, tokenizer, 512)
    assert (len(examples), [r.line for r in [*bad, *unfit]]) == (1, [1])


def test_a_template_that_rewrites_what_was_said_before_is_rejected(tiny: Path) -> None:
    forgetting = "{% for m in messages[-2:] %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    tokenizer = with_template(tiny, forgetting)
    examples, (rejection,) = encode([row("2+2?", "4", "3+3?", "6"), row("2+2?", "4")], tokenizer, 512)
    assert len(examples) == 1
    assert rejection.reason == "template"
    assert "hides where answers begin" in rejection.detail


def test_what_a_template_writes_after_the_end_of_turn_is_no_answer(tiny: Path) -> None:
    ids, labels = encode_messages(row("2+2?", "4").messages, with_template(tiny, PLAIN))
    assert labels[-1] == IGNORED
    assert load_tokenizer(str(tiny)).decode(ids[-1]) == "\n"


def test_without_an_end_of_turn_in_the_template_the_whole_answer_is_learned(tiny: Path) -> None:
    bare = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    tokenizer = with_template(tiny, bare)
    ids, labels = encode_messages(row("2+2?", "4").messages, tokenizer)
    assert [tokenizer.decode(part) for part in learned(ids, labels)] == ["4|"]


def test_padding_with_the_end_of_turn_token_does_not_hide_the_real_one(tiny: Path) -> None:
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.pad_token = tokenizer.eos_token
    examples, _ = encode([row("2+2?", "4"), row("2+2 and then what?", "4444")], tokenizer, 512)
    rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in examples]
    batch = Collator(tokenizer.pad_token_id)(rows)
    for index, example in enumerate(examples):
        length = len(example.input_ids)
        assert batch["labels"][index].tolist().count(tokenizer.eos_token_id) == 1
        assert batch["labels"][index, :length].tolist() == example.labels
        assert batch["labels"][index, length:].tolist() == [IGNORED] * (batch["labels"].shape[1] - length)
        assert batch["attention_mask"][index].sum() == length
