"""Rows as people and vendors have them become one shape; what is no supervised text is refused by what it is."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from random import Random
from typing import Any

import pytest

from src.data.calls import TOOL_COLUMNS, tools_of
from src.data.columns import ANSWERS, REQUESTS, TURNS
from src.data.formats import FORMATS, Message, RowError, count_formats, parse_row
from src.data.parts import PARTS
from src.data.readers import read_values
from src.data.source_row import is_harmless
from src.data.turns import TURN_KEYS

ASKED: Any = {"role": "user", "content": "Rain in Oslo?"}
CITY = {"city": "Oslo"}
RAIN = {"type": "function", "function": {"name": "rain", "arguments": CITY}}
TEXT_RAIN = {"type": "function", "function": {"name": "rain", "arguments": '{"city": "Oslo"}'}}
TOOL = {"name": "rain", "description": "whether it rains", "parameters": {"type": "object", "properties": {}}}
BEDROCK = {**TOOL, "parameters": None, "inputSchema": {"json": TOOL["parameters"]}}
WRAPPED = [{"type": "function", "function": TOOL}]


def auto(row: dict[str, Any]) -> tuple[list[Message], set[str]]:
    """The messages of a row in the detected format, and what of it is not read without being harmless."""
    found = count_formats([row])
    parsed = parse_row(row, FORMATS[next(iter(found), "messages")].translate)
    return parsed.messages, {key for key in parsed.unread if not is_harmless(key)}


def refusal(row: dict[str, Any]) -> RowError:
    with pytest.raises(RowError) as caught:
        auto(row)
    return caught.value


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    messages, unread = auto(row)
    assert unread == set()
    return [(turn["role"], turn["content"]) for turn in messages]


PAIR = [("user", "2+2?"), ("assistant", "4")]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "2+2?", "response": "4", "history": []},
        {"question": "2+2?", "answer": 4},
        {"Question": "2+2?", "Answer": "4"},
        {"input": "2+2?", "output": "4", "source": "C4", "subset": "chat"},
        {"instruction": "2+2?", "context": "", "response": "4", "category": "open_qa"},
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
        {"prompt": "2+2?", "completion": [{"role": "assistant", "content": "4"}]},
        {"prompt": '[{"role": "user", "content": "2+2?"}]', "response": '[{"role": "bot", "content": "4"}]'},
        {"prompt": "2+2?", "completion": '[{"role": "assistant", "content": "4"}]'},
        {"text": "2+2?", "answer": "4"},
        {"text": "2+2?", "summary": "4"},
        {"conversation": [{"human": "2+2?", "assistant": "4"}]},
        {"messages": "[{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]"},
        {"conversations": [{"from": "Prompter", "value": "2+2?"}, {"from": "AI", "value": "4"}]},
        {"messages": [{"role": "USER", "content": "2+2?"}, {"role": "bot", "content": "4"}], "images": []},
        {"messages": {"role": ["user", "assistant"], "content": ["2+2?", "4"], "name": [None, None]}},
        {"conversations": '{"from": ["human", "gpt"], "value": ["2+2?", "4"]}'},
        {"messages": [{"type": "human", "content": "2+2?"}, {"type": "ai", "content": "4"}]},
        {"messages": [{"role": "USER", "message": "2+2?"}, {"author": "CHATBOT", "message": "4"}]},
        {"contents": [{"role": "user", "parts": [{"text": "2+2?"}]}, {"role": "model", "parts": [{"text": "4"}]}]},
        {
            "schemaVersion": "bedrock-conversation-2024",
            "messages": [
                {"role": "user", "content": [{"text": "2+2?"}]}, {"role": "assistant", "content": [{"text": "4"}]}
            ],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "2+2?"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "output_text", "text": "4"}], "id": 7},
            ]
        },
    ],
)  # fmt: skip
def test_one_exchange_is_read_from_every_shape(row: dict[str, Any]) -> None:
    assert turns(row) == PAIR


def test_what_stands_beside_the_turns_is_read() -> None:
    beside: dict[str, Any] = {"system": "Count.", "history": [["1+1?", "2"]]}
    earlier = [("system", "Count."), ("user", "1+1?"), ("assistant", "2")]
    assert turns({"instruction": "2+2?", "output": "4", **beside}) == [*earlier, *PAIR]
    assert turns({"query": "2+2?", "response": "4", **beside, "history": "[['1+1?', '2']]"}) == [*earlier, *PAIR]
    assert turns({"prompt": "2+2?", "completion": "4", "system": [{"text": "Count."}]})[0] == earlier[0]
    messages = [{"role": "system", "content": "Mine."}, ASKED, {"role": "assistant", "content": "No."}]
    assert auto({"messages": messages, "system": "Mine."})[1] == set()
    assert auto({"messages": messages, "system": "Another."})[1] == {"system"}
    empty = [{"role": "system", "content": ""}, *messages[1:]]
    assert turns({"messages": empty, "system": "Another."})[:2] == [
        ("system", "Another."),
        ("user", "Rain in Oslo?"),
    ]
    thinking = [{"text": "Count."}, {"type": "thinking", "thinking": "Hm."}]
    assert auto({"prompt": "2+2?", "completion": "4", "system": thinking})[1] == {"system[].thoughts"}
    assert turns({"prompt": "[1, 2]", "completion": "[3]"}) == [("user", "[1, 2]"), ("assistant", "[3]")]
    assert auto({"question": "2+2?", "solution": "2+2=4", "answer": "4"})[0][1]["content"] == "2+2=4"
    assert refusal({"query": "2+2?", "response": "4", "history": ["1+1?"]}).reason == "bad_history"


def test_a_cell_as_python_prints_it_is_read_as_json_would_hold_it() -> None:
    cell = "[{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4', 'note': {None: (1, 2)}}]"
    messages, unread = auto({"messages": cell})
    assert ([turn["content"] for turn in messages], unread) == (["2+2?", "4"], {"messages[].note"})
    assert tools_of({"tools": "[{'name': 'rain', 'parameters': {None: (1, 2)}}]"}) == [
        {"type": "function", "function": {"name": "rain", "parameters": {"null": [1, 2]}}}
    ]


def test_a_context_is_added_to_the_request() -> None:
    (asked, _) = turns({"instruction": "Which colour?", "context": "It is blue.", "response": "Blue"})
    assert asked == ("user", "Which colour?\n\nIt is blue.")
    (asked, _) = turns({"question": "Which colour?", "context": "It is blue.", "answer": "Blue"})
    assert asked == ("user", "Which colour?\n\nIt is blue.")


@pytest.mark.parametrize(
    ("call", "read"),
    [
        ({"tool_calls": [{"id": "1", **RAIN}]}, {"id": "1", **RAIN}),
        ({"toolCalls": [{"function": {"name": "rain", "kwargs": CITY}}]}, RAIN),
        ({"function_calls": [{"name": "rain", "params": CITY}]}, RAIN),
        ({"tool_calls": [{"id": "1", "index": 0, **TEXT_RAIN}, None]}, {"id": "1", **TEXT_RAIN}),
        ({"function_call": {"name": "rain", "arguments": '{"city": "Oslo"}'}}, TEXT_RAIN),
        ({"content": [{"type": "tool_use", "id": "1", "name": "rain", "input": CITY}]}, {"id": "1", **RAIN}),
        ({"content": [{"toolUse": {"toolUseId": "1", "name": "rain", "input": CITY}}]}, {"id": "1", **RAIN}),
        ({"content": [{"functionCall": {"name": "rain", "args": CITY}}]}, RAIN),
        ({"tool_call": {"name": "rain", "kwargs": CITY}}, RAIN),
        ({"content": [{"type": "tool_call", "value": '{"name": "rain", "arguments": {"city": "Oslo"}}'}]}, RAIN),
    ],
)  # fmt: skip
def test_a_call_is_read_from_every_shape(call: dict[str, Any], read: dict[str, Any]) -> None:
    row = {"messages": [ASKED, {"role": "assistant", **call}, {"role": "tool", "content": "yes"},
                        {"role": "assistant", "content": "Yes."}]}  # fmt: skip
    messages, unread = auto(row)
    assert unread == set()
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [read]}


def test_a_result_is_read_under_other_names() -> None:
    row = {"messages": [ASKED, {"role": "assistant", "tool_calls": [RAIN]}, {"role": "tool", "output": {"mm": 3}},
                        {"role": "assistant", "content": "Yes."}]}  # fmt: skip
    assert turns(row)[2] == ("tool", '{"mm": 3}')


@pytest.mark.parametrize("none", [[], None, [None], "[]", ""])
def test_an_empty_list_of_calls_is_no_call(none: object) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "No.", "tool_calls": none}]}
    assert auto(row)[0][1] == {"role": "assistant", "content": "No."}


def test_a_call_a_result_or_tools_that_cannot_be_read_are_not_left_out() -> None:
    asked: Any = [ASKED, {"role": "assistant", "content": "I look."}]
    for beside in (
        {"tool_calls": [{"function": {"name": "rain", "given": CITY}}]},
        {"my_calls": [RAIN]},
        {"calls": json.dumps([RAIN])},
    ):
        assert refusal({"messages": [ASKED, {**asked[1], **beside}]}).reason == "bad_call"
    assert auto({"messages": [ASKED, {**asked[1], "called": True}]})[1] == {"messages[].called"}
    calls = {**asked[1], "tool_calls": [RAIN]}
    for result in ({"output": "yes"}, {"content": None, "result": "yes"}, {"content": "yes", "id": 7}):
        messages, _ = auto({"messages": [ASKED, calls, {"role": "tool", **result}, asked[1]]})
        assert messages[2]["content"] == "yes"
    error = refusal({"messages": [ASKED, calls, {"role": "tool", "data": "yes"}, asked[1]]})
    assert (error.reason, "data in place of" in error.detail) == ("not_text", True)


def test_tools_of_a_turn_are_those_of_its_row() -> None:
    described: Any = [
        {"role": "system", "content": "Help.", "tools": [TOOL]},
        ASKED,
        {"role": "bot", "content": "."},
    ]
    for beside in ({}, {"tools": [TOOL]}, {"tools": []}):
        found = parse_row({"messages": described, **beside}, FORMATS["messages"].translate)
        assert (found.tools, found.unread) == (WRAPPED, set())
    called = {"messages": [ASKED, {"role": "bot", "content": "", "tool_calls": [RAIN]}]}
    assert refusal({**called, "api_list": [TOOL]}).reason == "bad_tools"
    assert refusal({**called, "api_list": json.dumps(WRAPPED)}).reason == "bad_tools"
    assert auto({**called, "seen": [{"name": "rain"}]})[1] == {"seen"}
    other = parse_row({"messages": described, "tools": [{"name": "sun"}]}, FORMATS["messages"].translate)
    assert other.unread == {"messages[].tools"}


def test_turns_that_are_calls_belong_to_the_answer_before_them() -> None:
    call = json.dumps({"name": "rain", "arguments": {"city": "Oslo"}})
    said = [
        ("human", "Rain?"),
        ("gpt", "I look."),
        ("function_call", call),
        ("observation", "yes"),
        ("gpt", "Yes."),
    ]
    messages, _ = auto({"conversations": [{"from": who, "value": what} for who, what in said]})
    assert messages[1] == {"role": "assistant", "content": "I look.", "tool_calls": [RAIN]}
    parallel = [ASKED, *[{"role": "tool_call", "content": call}] * 2, {"role": "tool_response", "content": "yes"}]
    messages, _ = auto({"messages": [*parallel, {"role": "assistant", "content": "Yes."}]})
    assert [len(turn.get("tool_calls", [])) for turn in messages] == [0, 2, 0, 0]
    assert refusal({"messages": [ASKED, {"role": "tool_call", "content": "rain"}]}).reason == "bad_call"


@pytest.mark.parametrize(
    "result",
    [
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "yes"}]},
        {"toolResult": {"toolUseId": "1", "content": [{"text": "yes"}], "status": "success"}},
        {"functionResponse": {"id": "1", "response": "yes"}},
    ],
)
def test_a_result_within_a_user_turn_is_a_turn_of_the_tool(result: dict[str, Any]) -> None:
    answer = {"role": "assistant", "content": "Yes."}
    called = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **RAIN}]}
    row = {"messages": [ASKED, called, {"role": "user", "content": [result]}, answer]}
    messages, unread = auto(row)
    assert messages[2] == {"role": "tool", "content": "yes", "tool_call_id": "1"}
    assert unread == set()
    row["messages"][2]["role"] = "function"  # as Gemini names it
    assert auto(row)[0] == messages
    row["messages"][2]["role"] = "user"
    row["messages"][2]["content"].append({"type": "text", "text": "And now?"})
    assert [turn["role"] for turn in auto(row)[0]] == ["user", "assistant", "tool", "user", "assistant"]
    structured = {"messages": [ASKED, called, {"role": "tool", "content": {"rain": True}}, answer]}
    assert auto(structured)[0][2]["content"] == '{"rain": true}'
    structured["messages"][2] = {"role": "tool", "content": None}
    assert auto(structured)[0][2]["content"] == ""


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "part", "gemini", "bedrock"])
def test_thoughts_have_one_key(key: str) -> None:
    parts: dict[str, Any] = {
        "part": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "No."}],
        "gemini": [{"text": "Hm.", "thought": True}, {"text": "No."}],
        "bedrock": [{"reasoningContent": {"reasoningText": {"text": "Hm."}}}, {"text": "No."}],
    }
    turn = {"content": parts[key]} if key in parts else {"content": "No.", key: "Hm."}
    messages, unread = auto({"messages": [ASKED, {"role": "assistant", **turn}]})
    assert messages[1] == {"role": "assistant", "content": "No.", "reasoning_content": "Hm."}
    assert unread == set()


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "training", "trainable", "loss"])
@pytest.mark.parametrize("value", [0, 0.0, False, "0", "false"])
def test_an_answer_without_loss_is_marked_in_every_shape(key: str, value: object) -> None:
    for row in (
        {"messages": [ASKED, {"role": "assistant", "content": "No.", key: value}]},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "No.", key: value}]},
        {"conversations": [{"input": "?", "output": "No.", key: value}]},
    ):
        assert auto(row)[0][-1]["weight"] == 0


def test_loss_flags_of_peers_on_turns_parts_and_rows() -> None:
    def answered(**more: Any) -> dict[str, Any]:
        return {"messages": [ASKED, {"role": "assistant", "content": "No.", **more}]}

    for flag in ({"output_with_loss": False}, {"lossWeight": 0}, {"ignore_loss": True}, {"masked": 1}):
        messages, unread = auto(answered(**flag))
        assert (messages[1]["weight"], unread) == (0, set())
    assert (
        refusal(answered(train_detail=[{"begin_offset": 0, "end_offset": 1, "train": True}])).reason
        == "bad_weight"
    )
    yes, no = {"type": "text", "text": "Yes."}, {"type": "text", "text": "No.", "loss_weight": 0}
    messages, unread = auto(answered(content=[no, no]))
    assert (messages[1]["weight"], unread) == (0, set())
    assert auto(answered(content=[yes, {**yes, "train": True}]))[0][1]["weight"] == 1
    assert "some of its parts" in refusal(answered(content=[yes, no])).detail
    assert refusal(answered(content=[{**yes, "weight": 0.5}])).reason == "bad_weight"
    assert auto(answered(content=[yes, no], weight=0))[0][1]["weight"] == 0
    twice = {"messages": answered()["messages"] * 2}
    assert [turn.get("weight") for turn in auto({**twice, "train": [False, True]})[0]] == [None, 0, None, 1]
    asked = {"role": "user", "content": [{**yes, "loss_weight": 0.0}]}
    assert auto({"messages": [asked, answered()["messages"][1]]})[1] == set()


def test_weights_that_contradict_each_other_and_loss_masks() -> None:
    answers = [ASKED, {"role": "assistant", "content": "No."}] * 2
    assert refusal({"messages": [ASKED, {**answers[1], "weight": 0, "train": True}]}).reason == "bad_weight"
    for mask in ([0, 1], [0, 0, 0, 1], "[0, 1]"):
        messages, unread = auto({"messages": answers, "loss_mask": mask})
        assert [turn.get("weight") for turn in messages] == [None, 0, None, 1]
        assert unread == set()
    assert auto({"messages": answers, "loss_mask": [1, 0, 1, 1]})[1] == {"loss_mask of user"}
    assert refusal({"messages": answers, "loss_mask": [1, 0, 1]}).reason == "bad_weight"
    assert auto({"messages": [ASKED, {"Role": "assistant", "Content": "No.", "Weight": 0}]})[0][1]["weight"] == 0
    xtuner = {"conversation": [{"input": "?", "output": "No.", "output_with_loss": False}]}
    assert auto(xtuner)[0][1]["weight"] == 0
    assert auto({"messages": [{**ASKED, "train": True}, answers[1]]})[1] == {"messages[].weight of user"}


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": WRAPPED},
        {"tools": json.dumps([TOOL])},
        {"functions": [TOOL]},
        {"tools": [{"name": "rain", "description": "whether it rains", "input_schema": TOOL["parameters"]}]},
        {"tools": [{"functionDeclarations": [TOOL]}]},
        {"toolConfig": {"tools": [{"toolSpec": BEDROCK}]}},
    ],
)  # fmt: skip
def test_tools_are_read_from_every_shape(tools: dict[str, Any]) -> None:
    assert tools_of(tools) == WRAPPED


def test_a_weight_of_a_row_is_that_of_its_answers() -> None:
    for row in (
        {"messages": [ASKED, {"role": "assistant", "content": "No."}]},
        {"prompt": "?", "completion": "No."},
    ):
        for column in ({"weight": 0}, {"train": False}, {"Trainable": "false"}, {"loss_mask": 0}):
            messages, unread = auto({**row, **column})
            assert (messages[-1]["weight"], unread) == (0, set())
        assert auto({**row, "weight": 1, "train": True}) == auto(row)
        assert auto({**row, "weight": 0.5, "loss": 0.0}) == (auto(row)[0], {"weight", "loss"})
    assert auto({"text": "Once.", "weight": 0})[0][0]["weight"] == 0


def test_a_label_beside_a_request_is_its_answer() -> None:
    asked = [{"role": "system", "content": "Sort."}, ASKED]
    assert turns({"messages": asked, "label": 3})[-1] == ("assistant", "3")
    assert turns({"conversations": [{"from": "human", "value": "?"}], "label": "wet"})[-1] == ("assistant", "wet")


def test_a_row_may_be_a_list_of_turns() -> None:
    assert turns([ASKED, {"role": "assistant", "content": "No."}])[-1] == ("assistant", "No.")  # type: ignore[arg-type]


def test_an_instruction_is_not_lost_beside_other_formats() -> None:
    row = {"INSTRUCTION": "Add.", "INPUT": "2 and 2", "OUTPUT": "4"}
    assert turns(row)[0] == ("user", "Add.\n\n2 and 2")
    lower = {key.lower(): value for key, value in row.items()}
    assert parse_row(lower, FORMATS["prompt_completion"].translate).messages[0]["content"] == "Add.\n\n2 and 2"


def test_what_only_an_answer_can_have_is_named_on_another_turn() -> None:
    asked = {**ASKED, "reasoning_content": "Hm.", "tool_calls": [RAIN]}
    messages, unread = auto({"messages": [asked, {"role": "assistant", "content": "No."}]})
    assert messages[0] == ASKED
    assert unread == {"messages[].reasoning_content of user", "messages[].tool_calls of user"}


def test_the_best_path_of_a_tree_is_trained_and_the_others_are_named() -> None:
    def message(role: str, text: str, *replies: Any, **more: Any) -> dict[str, Any]:
        return {"role": role, "text": text, "replies": list(replies), **more}

    good = message("assistant", "Hello", message("prompter", "Why?"), rank=0)
    tree = {
        "message_tree_id": "1",
        "prompt": message("prompter", "Hi?", message("assistant", "Away", rank=1), good),
    }
    messages, unread = auto(tree)
    assert [turn["content"] for turn in messages] == ["Hi?", "Hello"]
    assert unread == {"prompt.replies[] below the best rank"}


MEDIA_COLUMNS = (
    "image_paths", "images_path", "img", "image_file", "image_bytes", "pixel_values", "video_path", "audioUrl",
    "wav", "media", "attachments", "Image",
)  # fmt: skip
IMAGE = {"type": "image_url", "image_url": {"url": "a.png"}}


@pytest.mark.parametrize(
    ("row", "reason", "told"),
    [
        ({"prompt": "?", "chosen": "No", "rejected": "Yes"}, "preference_data", "chosen, rejected"),
        ({"prompt": "?", "completion": "No", "label": True}, "preference_data", "its label is true"),
        ({"prompt": "?", "completion": "No", "label": "False"}, "preference_data", "label is false"),
        ({"messages": [ASKED, {"role": "assistant", "content": "?"}], "label": False}, "preference_data", "label"),
        ({"messages": [ASKED], "rejected_response": "No", "images": ["a"]}, "preference_data", "rejected_resp"),
        ({"prompt": "?", "completion": "No", "kto_tag": False}, "preference_data", "kto_tag"),
        ({"prompt": "?", "completion": "No", "label": 0}, "preference_data", "its label is 0"),
        ({"prompt": "?", "completion": "No", "label": 0.0}, "preference_data", "its label is 0.0"),
        ({"prompt": "?", "completion": "No", "Is_Desirable": False}, "preference_data", "is_desirable"),
        ({"prompt": "?", "completion": "No", "rejected_answer": "Yes"}, "preference_data", "rejected_answer"),
        ({"prompt": "?", "completion": "No", "label": "bad"}, "preference_data", "its label is bad"),
        ({"prompt": "?", "response_0": "a", "safer_response_id": 0}, "preference_data", "safer"),
        ({"messages": [ASKED, {"role": "bot", "content": "?"}], "images": ["a.png"]}, "multimodal", "images"),
        ({"messages": [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": "?"}]},
         "multimodal", "an image"),
        ({"query": "<img>http://a/b.png</img>Who?", "response": "Ann"}, "multimodal", "<img>"),
        ({"messages": [{**ASKED, "images": ["a.png"]}, {"role": "bot", "content": "?"}]}, "multimodal", "images"),
        ({"query": "Who?", "response": "Ann", "photo": {"bytes": None, "path": "a.png"}}, "multimodal", "photo"),
        ({"query": "<image>\nWho?", "response": "Ann"}, "multimodal", "<image>"),
        ({"query": "Who? <|vision_start|><|image_pad|>", "response": "Ann"}, "multimodal", "<|vision_start|>"),
        ({"query": "Who?", "response": "Ann", "system": "<image>"}, "multimodal", "<image>"),
        *(({"query": "Who?", "response": "Ann", name: "a"}, "multimodal", name) for name in MEDIA_COLUMNS),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "tokenized", "input_ids"),
        ({"anchor": "a", "positive": "b", "negative": "c"}, "embedding_data", "anchor, negative, positive"),
        ({"message_id": "1", "parent_id": None, "text": "Hi", "role": "bot"}, "single_messages", "one message"),
        ({"messages": [ASKED], "solution": "42"}, "no_assistant_turn", "a prompt without an answer"),
        ({"prompt": [ASKED], "solution": "42"}, "no_completion", "reinforcement learning"),
    ],
)  # fmt: skip
def test_what_is_no_supervised_text_is_refused_by_what_it_is(row: dict[str, Any], reason: str, told: str) -> None:
    error = refusal(row)
    assert (error.reason, told in error.detail) == (reason, True), error.detail


@pytest.mark.parametrize(
    "row",
    [
        {"text": "It came.", "label": "true"},
        {"text": "It came.", "label": 0},
        {"prompt": "2+2?", "completion": "4", "rejected": False},
        {"prompt": "2+2?", "completion": "4", "label": "even", "parent_id": "7", "role": None},
        {"prompt": "<video><source src='a'></video>?", "completion": "HTML"},
        {
            "prompt": "2+2?",
            "completion": "4",
            "images": [None],
            "video": "[]",
            "image": {"bytes": None, "path": ""},
        },
        {"prompt": "What is <image> in SVG?", "completion": "<image>", "image_count": 2, "image_caption": "sky"},
        {"prompt": "Close <svg>\n<image>\n</image>", "completion": "</svg>"},
    ],
)
def test_texts_that_resemble_other_kinds_are_trained(row: dict[str, Any]) -> None:
    assert auto(row)[0][-1]["role"] == "assistant"


def test_every_value_that_is_not_read_is_named() -> None:
    turn = {"role": "assistant", "content": [{"type": "text", "text": "4", "tone": "dry"}], "mood": "calm"}
    call = {**RAIN, "custom": 1}
    row = {
        "messages": [{**ASKED, "emotion": ""}, {**turn, "tool_calls": [call]}],
        "topic": "sums", "empty": [], "nothing": None, "reward": 0, "id": 7,
    }  # fmt: skip
    messages, unread = auto(row)
    assert messages[1]["content"] == "4"
    assert unread == {"reward", "messages[].mood", "messages[].content[].tone", "tool_calls[].custom"}
    assert parse_row(row, FORMATS["messages"].translate).unread - unread == {"topic", "id"}
    said = {"messages": [ASKED, {"role": "assistant", "content": "4", "info": "Say it in French"}]}
    assert auto({**said, "task": "Translate to French", "topic": "sums", "source": "A site on the web"})[1] == {
        "task (text)",
        "messages[].info (text)",
    }
    called = {"role": "model", "parts": [{"functionCall": {"name": "rain", "args": CITY}, "tone": "dry"}]}
    talk = [{"role": "user", "parts": [{"text": "Rain?"}]}, called]
    assert auto({"contents": talk, "settings": {"a": 1}, "generationConfig": {"topK": 1}})[1] == {
        "settings",
        "messages[].content[].tone",
    }


def test_an_answer_is_a_text_only_without_a_request() -> None:
    translate = FORMATS["text"].translate
    assert parse_row({"response": "Once."}, translate).messages == [{"role": "text", "content": "Once."}]
    for asked in ({"prompt": "?"}, {"instruction": "?"}):
        with pytest.raises(RowError, match="no text under 'text'"):
            parse_row({**asked, "completion": "Once."}, translate)


def test_a_column_that_repeats_a_turn_is_read_with_it() -> None:
    row = {
        "prompt": "Rain in Oslo? ",
        "messages": [ASKED, {"role": "assistant", "content": "No."}],
        "answer": "Yes.",
    }
    assert auto(row)[1] == {"answer"}


def test_thoughts_beside_an_answer_are_its_own() -> None:
    messages, unread = auto({"question": "2+2?", "reasoning": "Two twice.", "answer": "4"})
    assert messages[1] == {"role": "assistant", "content": "4", "reasoning_content": "Two twice."}
    assert unread == set()


def test_numbers_keep_their_spelling(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    call = '{"name": "pay", "arguments": {"price": 1.50, "rates": [1e5, 2.0, 3]}}'
    said = f'{{"role": "assistant", "tool_calls": [{call}]}}, {{"role": "tool", "content": {{"left": 0.10}}}}'
    answer = '{"role": "assistant", "content": "Paid."}'
    path.write_text(f'{{"messages": [{{"role": "user", "content": "Pay."}}, {said}, {answer}]}}\n')
    ((_, value),) = read_values(path)
    messages = parse_row(pickle.loads(pickle.dumps(value)), FORMATS["messages"].translate).messages
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == '{"price": 1.50, "rates": [1e5, 2.0, 3]}'
    assert messages[2]["content"] == '{"left": 0.10}'
    path.write_text('{"question": "Price?", "answer": 1.50}\n')
    ((_, value),) = read_values(path)
    assert parse_row(value, FORMATS["prompt_completion"].translate).messages[1]["content"] == "1.50"


def test_whatever_a_row_holds_it_is_read_or_refused() -> None:
    draw = Random(1)
    names = [
        *TURN_KEYS,
        *PARTS,
        *TURNS,
        *REQUESTS,
        *ANSWERS,
        *TOOL_COLUMNS,
        "type",
        "json",
        "history",
        "label",
        "id",
    ]
    cells = [
        None,
        "",
        "a",
        "user",
        "tool",
        "function_call",
        0,
        0.5,
        True,
        "[1]",
        '{"name": "f"}',
        "{'a': 1}",
        [],
        {},
    ]

    def value(depth: int) -> Any:
        kind = draw.random() if depth else 0
        if kind < 0.4:
            return draw.choice(cells)
        if kind < 0.7:
            return [value(depth - 1) for _ in range(draw.randint(0, 3))]
        return {draw.choice(names): value(depth - 1) for _ in range(draw.randint(0, 5))}

    def turn() -> dict[str, Any]:
        role = draw.choice(["user", "assistant", "tool", "function_call"])
        return {"role": role, "content": value(2), draw.choice(names): value(2)}

    reasons = set()
    for number in range(4_000):
        row = {"messages": [turn(), turn()]} if number % 2 else {draw.choice(names): value(4) for _ in range(4)}
        before = repr(row)
        for each in FORMATS.values():
            try:
                messages = parse_row(row, each.translate).messages
                assert all(isinstance(turn["content"], str) for turn in messages)
            except RowError as error:
                reasons.add(error.reason)
        assert repr(row) == before
    assert len(reasons) > 15


def test_variables_of_the_template_are_read() -> None:
    row = {"prompt": "2+2?", "completion": "4", "chat_template_kwargs": '{"enable_thinking": false}'}
    found = parse_row(row, FORMATS["prompt_completion"].translate)
    assert (found.template_kwargs, found.unread) == ({"enable_thinking": False}, set())
    assert refusal({**row, "chat_template_kwargs": "off"}).reason == "bad_template_kwargs"
