"""Rows that `eval_split` holds out: which ones, that none is trained on, and that an evaluation reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data import loader
from src.data.chat import ChatTokenizer
from src.data.held_out import choose_rows
from src.data.prepare import HELD_OUT_FILE, TrainingRows
from src.data.report_text import _odd_labels, print_report
from src.data.store import TokenStore
from src.errors import ConfigError, DataError
from src.eval.inference import encode_prompts, encode_requests
from src.eval.setup import EvalSplits
from tests.data.fixtures import Maker
from tests.fixtures import chat, jsonl

pytest_plugins = ["tests.fixtures", "tests.data.fixtures"]

WORDS = ["ash", "bell", "coal", "dune", "elm", "fern", "gate", "hill", "iron", "jade"]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"word": "ash"}}}
TOOL = {"type": "function", "function": {"name": "find", "description": "", "parameters": {"type": "object"}}}


def questions(count: int, system: str | None = None) -> list[dict[str, Any]]:
    return [chat(f"What is {WORDS[n % 10]} {n}?", f"It is {n}.", system=system) for n in range(count)]


def held_requests(data: TrainingRows) -> set[str]:
    return {data.store.row(n).messages[-2]["content"] for n in data.held_out.rows.tolist()}


def trained_requests(data: TrainingRows) -> set[str]:
    out = {row.row for row in data.dropped}.union(data.held_out.rows.tolist())
    return {data.store.row(n).messages[-2]["content"] for n in range(len(data.store)) if n not in out}


def accounted(tokens: TokenStore) -> dict[str, Any]:
    found = tokens.report
    assert found["rows_in"] == found["rows_trained"] + len(found["rejected"]) + found["rows_held_out"]
    for name in ("rows_trained", "rows_held_out"):
        assert found[name] == sum(file[name] for file in found["files"])
    return found


# Which rows


def test_a_share_or_a_number_of_rows_is_held_out(make: Maker) -> None:
    make.file("a.jsonl", questions(30))
    make.file("b.jsonl", questions(40)[30:])
    for setting, count in ((0.25, 10), (7, 7)):
        data = make.read(eval_split=setting)
        assert len(held_requests(data)) == count
        assert not held_requests(data) & trained_requests(data)
        assert len(trained_requests(data)) == 40 - count
    assert not len(make.read().held_out.rows)


def test_the_choice_depends_on_the_seed_and_the_requests_alone(make: Maker) -> None:
    rows = questions(4_100)  # enough for several processes
    make.file("a.jsonl", rows)
    first = held_requests(make.read(eval_split=0.1, num_proc=1))
    assert held_requests(make.read(eval_split=0.1, num_proc=3, cache_dir=str(make.folder / "other"))) == first
    assert held_requests(make.read(eval_split=0.1, seed=7)) != first
    (make.folder / "data" / "a.jsonl").unlink()
    jsonl(make.folder / "data" / "z.jsonl", rows[2_000:][::-1])
    jsonl(make.folder / "data" / "y.jsonl", rows[:2_000])
    assert held_requests(make.read(eval_split=0.1)) == first


def test_all_answers_to_a_request_are_on_one_side(make: Maker) -> None:
    rows = [
        chat(request, f"Answer {n}.") for n in range(4) for request in ("What is ash?", "what is  ASH", "Why?")
    ]
    make.file("a.jsonl", rows + questions(20) + [chat("Which?", "Red.", "Why?", "Blue.")] * 2)
    data = make.read(eval_split=0.4, on_duplicate="keep")
    held = data.held_out.rows.tolist()
    for group in ({n for n in range(12) if n % 3 < 2}, {n for n in range(12) if n % 3 == 2}, {32, 33}):
        assert group <= set(held) or not group & set(held)
    assert len(held) <= round(0.4 * 34)


def test_a_row_of_an_evaluation_file_or_without_an_answer_to_score_is_not_held_out(make: Maker) -> None:
    asked = {"prompt": "What is bell 1?", "completion": "It."}
    make.held_out([asked])
    others = [{"messages": [{"role": "user", "content": "Find."}, {"role": "assistant", "tool_calls": [CALL]}]}]
    no_loss = chat("Say it.", "No.")
    no_loss["messages"][1]["weight"] = 0
    make.file("a.jsonl", [*questions(3), *others, no_loss])
    for contamination in ("reject", "keep"):
        data = make.read(eval_split=1, on_contamination=contamination)
        assert held_requests(data) <= {"What is ash 0?", "What is coal 2?"}
        with pytest.raises(
            DataError, match=r"eval_split=2 of 2 rows that can be held out leaves none to train on"
        ):
            make.read(eval_split=2, on_contamination=contamination)


def test_the_rows_of_each_label_are_split_and_every_label_is_trained(make: Maker) -> None:
    labels = ["a"] * 40 + ["b"] * 10 + ["c"]
    rows = [{"text": f"{WORDS[n % 10]} number {n}", "label": label} for n, label in enumerate(labels)]
    make.file("a.jsonl", rows)
    data = make.read(eval_split=0.3, task="classification", data_format="classification")
    held = [labels[n] for n in data.held_out.rows.tolist()]
    assert {label: held.count(label) for label in "abc"} == {"a": 12, "b": 3, "c": 0}
    assert data.labels == ("a", "b", "c")


def test_labels_that_are_one_row_each_are_all_trained_on(make: Maker) -> None:
    make.file("a.jsonl", [{"text": f"Text {word}", "label": word} for word in WORDS])
    with pytest.raises(DataError, match="eval_split=3: each label has one row, which is trained on"):
        make.read(eval_split=3, task="classification", data_format="classification")
    told = "labels: urgent, Urgent differ in case only; Urgent occur once; each is a class of its own"
    assert _odd_labels({"labels": {"urgent": 43, "Urgent": 1, "spam": 5}}) == told


@pytest.mark.parametrize(
    ("rows", "settings", "problem"),
    [
        (
            questions(3),
            {"eval_split": 0.1},
            r"eval_split=0\.1 of 3 rows that can be held out is less than one row",
        ),
        (questions(3), {"eval_split": 3}, "eval_split=3 of 3 rows that can be held out leaves none to train on"),
        ([chat("Why?", f"{n}") for n in range(9)], {"eval_split": 2}, "every group of them has more than 2 rows"),
        (
            [{"text": "Once upon a time."}] * 3,
            {"eval_split": 1, "data_format": "text"},
            "no row has a request and an answer to hold out",
        ),
    ],
)
def test_too_few_rows_are_one_sentence(make: Maker, rows: Any, settings: dict[str, Any], problem: str) -> None:
    make.file("a.jsonl", rows)
    with pytest.raises(DataError, match=problem):
        make.read(**settings)


def test_rows_that_cannot_be_read_are_named_before_too_few_rows(make: Maker) -> None:
    make.file("a.jsonl", [{}, {}, *questions(1)])
    with pytest.raises(DataError, match=r"a\.jsonl:1 has no list of messages"):
        make.read(eval_split=1, on_bad_row="refuse")
    (make.folder / "data" / "a.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError, match="none of its 1 rows can be used as messages"):
        make.read(eval_split=1)


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, "half"])
def test_eval_split_is_a_share_or_a_number(make: Maker, value: Any) -> None:
    with pytest.raises(ConfigError, match="eval_split"):
        make.config(eval_split=value)


def test_groups_fill_the_number_as_far_as_they_fit() -> None:
    groups = np.repeat(np.arange(1, 41, dtype=np.uint64), [5, 1] * 20)
    held = choose_rows(groups, np.zeros_like(groups), 33, 0)
    assert 30 <= len(held) <= 33
    assert np.isin(groups, groups[held]).sum() == len(held)


# What is trained on, and what is written


def test_evaluation_files_in_the_folder_of_the_training_files_are_not_trained_on(make: Maker) -> None:
    make.file("a.jsonl", questions(2))
    held = make.file("eval/test.jsonl", questions(4)[2:])
    settings: dict[str, Any] = {"dataset_pattern": "**/*.jsonl", "eval_path": str(held.parent)}
    assert trained_requests(make.read(**settings)) == {"What is ash 0?", "What is bell 1?"}
    with pytest.raises(DataError, match=r"training file .* is the evaluation file"):  # it names nothing else
        make.read(dataset_path=str(held.parent), eval_path=str(held.parent))


def test_a_row_near_one_that_is_held_out_is_contamination(make: Maker) -> None:
    long = "Please tell me in a few words what the number of my order from the {} of May at the shop was."
    near = [chat(long.format(day), "It is on the invoice.") for day in ("first", "second")]
    make.file("a.jsonl", [*near, chat("Why?", "So."), chat("Why?", "Well.")])  # of which one cannot be held out
    found = accounted(make.tokens(eval_split=1))
    assert (found["rows_held_out"], found["rejected_by_reason"]) == (1, {"contamination": 1})
    assert found["rejected"][0]["detail"].endswith(
        f"a.jsonl:{found['held_out']['rows'][0]['line']}, which is held out"
    )
    assert found["contamination"]["files"] == {"held_out/test.jsonl": {"exact": 0, "normalised": 0, "near": 1}}
    assert accounted(make.tokens(eval_split=1, on_contamination="keep"))["rows_trained"] == 3
    with pytest.raises(DataError, match="near duplicate"):
        make.read(eval_split=1, on_contamination="refuse")


def test_an_evaluation_of_held_out_rows_asks_what_came_before_the_answer_in_training(make: Maker) -> None:
    tool_turns = [
        {"role": "user", "content": "Find ash."},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "grey"},
        {"role": "assistant", "content": "Ash is grey."},
    ]
    talk = chat("What is elm?", "A tree.", "And fern?", "A plant.")
    make.file("a.jsonl", [*questions(3, system="Be brief."), talk, {"messages": tool_turns, "tools": [TOOL]}])
    table = make.folder / "table.csv"
    table.write_text("q,a\nhow,so\nwhy,thus\nwhen,now\n", encoding="utf-8")
    columns = {
        "question_key": "q",
        "answer_key": "a",
        "user_prompt": "Say {q}, {question}",
        "system_prompt": "Go.",
    }
    mapped = {"path": str(table), **columns}
    settings = {"datasets": [{"path": str(make.folder / "data"), "format": "messages"}, mapped]}
    template = Path(__file__).parent / "templates" / "qwen2_5.jinja"
    make.tokenizer.chat_template = template.read_text(encoding="utf-8")
    data, all_trained = make.read(**settings), make.tokens(**settings)
    examples = {data.store.location(all_trained.row_of(i)): e for i, e in enumerate(all_trained)}
    tokens = make.tokens(**settings, eval_split=7)
    assert accounted(tokens)["rows_held_out"] == 7
    places = [f"{row['file']}:{row['line']}" for row in tokens.report["held_out"]["rows"]]
    held = loader.read_rows(tokens.folder / HELD_OUT_FILE)
    prompts = encode_prompts(held, ChatTokenizer(make.tokenizer), "causal_lm", None)
    for place, prompt in zip(places, prompts, strict=True):
        ids, mask = examples[place]
        answer = max(i for i in range(1, len(ids)) if mask[i] and not mask[i - 1])  # the last one begins
        assert prompt == ids[:answer]


def test_an_answer_that_calls_a_tool_is_judged_by_the_call_as_the_template_writes_it(make: Maker) -> None:
    call = {"messages": [{"role": "user", "content": "Find."}, {"role": "assistant", "tool_calls": [CALL]}]}
    path = jsonl(make.folder / "calls.jsonl", [{**call, "tools": [TOOL]}, chat("Why?", "So.")])
    rows = {"test": loader.read_rows(path)}
    with pytest.raises(DataError, match=r"calls\.jsonl:1 has tool calls that the chat template leaves out"):
        encode_requests(rows, ChatTokenizer(make.tokenizer), "causal_lm", {}, references=False)
    template = Path(__file__).parent / "templates" / "qwen2_5.jinja"
    make.tokenizer.chat_template = template.read_text(encoding="utf-8")
    found = encode_requests(rows, ChatTokenizer(make.tokenizer), "causal_lm", {}, references=False)
    written, plain = found.answers["test"]
    assert "<tool_call>" in written and '"name": "find"' in written and plain == "So."
    goes_on = [*call["messages"], {"role": "tool", "content": "grey"}, {"role": "assistant", "content": "Grey."}]
    more = loader.read_rows(jsonl(make.folder / "more.jsonl", [{"messages": goes_on, "tools": [TOOL]}]))
    assert EvalSplits({"test": rows["test"], "more": more}, {}, {}).unjudged_calls == {"more": 1}
    other = {"test": [rows["test"][1]]}
    assert list(found.calls) == ["test"]
    assert encode_requests(other, ChatTokenizer(make.tokenizer), "causal_lm", {}, references=False).calls == {}


def test_a_held_out_row_that_cannot_be_encoded_is_rejected(make: Maker) -> None:
    make.file("a.jsonl", [*questions(6), *(chat(f"{word} " * 90, "Long.") for word in WORDS)])
    found = accounted(make.tokens(eval_split=8, max_length=64))
    assert found["rows_held_out"] < 8
    assert found["rejected_by_reason"] == {"over_length": 10}
    kept = accounted(make.tokens(eval_split=8, max_length=64, on_overlength="truncate", train_on="all"))
    assert (kept["rows_held_out"], kept["rejected_by_reason"]) == (8, {})


def test_the_rows_of_each_data_set_count_once_whatever_its_weight(make: Maker) -> None:
    paths = [
        make.file(f"{name}.jsonl", questions(40)[start : start + 20]) for name, start in (("a", 0), ("b", 20))
    ]
    weights = (2, 0.5)
    sets = [{"path": str(p), "format": "messages", "weight": w} for p, w in zip(paths, weights, strict=True)]
    tokens = make.tokens(datasets=sets, eval_split=0.2)
    found = accounted(tokens)
    assert found["rows_held_out"] == 8
    assert len(tokens) == 2 * found["files"][0]["rows_trained"] + found["files"][1]["rows_trained"]


def test_another_split_is_another_cache(make: Maker) -> None:
    make.file("a.jsonl", questions(30))
    folders = [
        make.tokens(**s).folder for s in ({}, {"eval_split": 3}, {"eval_split": 3, "seed": 1}, {"eval_split": 4})
    ]
    assert len(set(folders)) == 4
    assert make.tokens(eval_split=3).folder == folders[1]
    hashes = [json.loads((f / "data_report.json").read_text())["held_out"]["sha256"] for f in folders[1:]]
    assert len(set(hashes)) == 3


def test_a_large_contamination_is_said_last(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    from src.utils.logs import start_logging

    rows = questions(10)
    for count, loud in ((1, False), (2, True)):
        make.held_out([{"prompt": row["messages"][0]["content"], "completion": "x"} for row in rows[:count]])
        make.file("a.jsonl", rows)
        start_logging()
        print_report(make.tokens(), ChatTokenizer(make.tokenizer), 512)
        last = capsys.readouterr().out.splitlines()[-1]
        file = Path(make.folder) / "eval" / "test.jsonl"
        told = f"2 of 10 rows (20 %) are not trained on: they repeat rows of {file} (2 exact); on_contamination="
        assert (told in last) == loud
