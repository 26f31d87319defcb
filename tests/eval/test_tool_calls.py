"""Two texts make the same calls if names and arguments are equal, in any order and in any notation."""

from __future__ import annotations

import pytest

from src.eval.inference import answer_texts
from src.eval.metrics import score
from src.eval.tool_calls import calls_in, same_calls
from tests.data import tokenizers

# The same two calls, look(city="Bern", days=2) and now(), as templates of different families write them.
TWO_CALLS = {
    "tags": '<tool_call>\n{"name": "look", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "list": '[TOOL_CALLS][{"name": "look", "arguments": {"days": 2, "city": "Bern"}},'
    ' {"name": "now", "arguments": {}}]',
    "text": '[{"name": "look", "arguments": "{\\"city\\": \\"Bern\\", \\"days\\": 2}"},'
    ' {"name": "now", "arguments": "{}"}]',
    "openai": '{"tool_calls": [{"function": {"name": "look", "arguments": {"city": "Bern", "days": 2.0}}},'
    ' {"function": {"name": "now", "arguments": {}}}]}',
    "action": 'Action: ```json\n[{"tool_name": "look", "parameters": {"city": "Bern", "days": 2}},'
    ' {"tool_name": "now", "parameters": {}}]\n```',
    "xml": "<tool_call>\n<function=look>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "invoke": '<invoke name="look">\n<parameter name="city">Bern</parameter>\n<parameter name="days">2'
    '</parameter>\n</invoke>\n<invoke name="now">\n</invoke>',
    "params": '<function name="look"><param name="city">Bern</param><param name="days">2</param></function>'
    '<function name="now"></function>',
    "children": '<invoke name="look"><city>Bern</city><days>2</days></invoke><invoke name="now"></invoke>',
    "keys": '[{"look": {"city": "Bern", "days": 2}}, {"now": {}}]',
    "ids": 'look[CALL_ID]abc123[ARGS]{"city": "Bern", "days": 2}now[CALL_ID]abc124[ARGS]{}',
    "named": 'look[ARGS]{"city": "Bern", "days": 2}now[ARGS]{}',
    "indexed": '<|begin|>functions.look:0<|sep|>{"city": "Bern", "days": 2}<|end|>'
    "<|begin|>functions.now:1<|sep|>{}<|end|>",
    "fenced": 'function<sep>look\n```json\n{"city": "Bern", "days": 2}\n```<end>\n'
    "<begin>function<sep>now\n```json\n{}\n```",
    "python": '[look(city="Bern", days=2), now()]',
    "lines": 'look(days=2, city="Bern")\nnow()',
}


@pytest.mark.parametrize("text", TWO_CALLS.values(), ids=list(TWO_CALLS))
def test_calls_are_read_in_the_notation_of_each_family(text: str) -> None:
    assert calls_in(text) == calls_in(TWO_CALLS["tags"]) != []


def test_a_pair_of_keys_and_values_a_recipient_and_braces_are_calls() -> None:
    pairs = "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n</tool_call>"
    recipient = 'to=functions.look<|channel|>commentary json<|message|>{"city": "Bern"}'
    assert calls_in(pairs) == calls_in(recipient) == calls_in('{"name": "look", "arguments": {"city": "Bern"}}')
    assert same_calls("call:now{}call:look{city:Bern}", "call:look{city:Bern}call:now{}")


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ('{"arguments": {"b": [1, 2], "a": 1.0}, "name": "f"}', True),
        ('I look it up. {"name": "f", "arguments": {"a": 1, "b": [1, 2]}}', True),
        ('{"name": "f", "arguments": {"a": 1, "b": [2, 1]}}', False),
        ('{"name": "f", "arguments": {"a": "1", "b": [1, 2]}}', False),
        ('{"name": "f", "arguments": {"a": true, "b": [1, 2]}}', False),
        ('{"name": "g", "arguments": {"a": 1, "b": [1, 2]}}', False),
        ('{"name": "f", "arguments": {"a": 1, "b": [1, 2]}}' * 2, False),
        ('{"name": "f", "arguments": {"a": 1', False),
        ("no call", False),
    ],
)
def test_a_match_needs_the_same_names_and_arguments(prediction: str, right: bool) -> None:
    reference = '{"name": "f", "arguments": {"a": 1, "b": [1, 2]}}'
    calls = [{"name": "f", "arguments": {"a": 1, "b": [1, 2]}}]
    rows = [{"prediction": prediction, "reference": reference, "calls": calls}]
    assert score("tool_call_match", rows).corpus == right


def test_calls_in_an_unknown_notation_are_compared_as_text_and_answers_without_calls_match() -> None:
    calls = [{"name": "f", "arguments": {"a": 1}}]
    assert same_calls("CALL f WITH  a=1", "CALL f WITH a=1", calls)
    assert not same_calls("no call", "CALL f WITH a=1", calls)
    joined = 'functionf\n```json\n{"a": 1}\n```'  # with the markup that decoding drops
    assert same_calls('ff\n```json\n{"a":1}\n```', joined, calls)
    assert not same_calls('ff[ARGS]{"a":2}', joined, calls)
    assert same_calls('Set it: {"a": 2}', 'Put it so: {"a": 1}')
    assert not same_calls('f[ARGS]{"a": 1}', "No call is needed.")


def test_a_reference_with_calls_or_thoughts_is_what_the_template_writes() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": '{"city": "Bern"}'}}
    turns = [
        tokenizers.assistant("", tool_calls=[call]),
        tokenizers.assistant("4", reasoning_content="2 and 2"),
        tokenizers.assistant("4"),
    ]
    rows = [tokenizers.row([tokenizers.user("2+2?"), turn]) for turn in turns]
    calls, thoughts, plain = answer_texts(rows, tokenizers.chat("qwen3"), "causal_lm", None)
    assert calls_in(str(calls)) == calls_in('{"name": "look", "arguments": {"city": "Bern"}}')
    assert str(thoughts).strip() == "<think>\n2 and 2\n</think>\n\n4"
    assert plain == "4"
