"""Tool calls in generated text: find them in any notation, and compare those of two texts.

A chat template writes calls in one of a few notations. Each is an entry of NOTATIONS, and the first one that finds
a call in a text reads it:

    json    {"name": "f", "arguments": {"a": 1}}, in a list or between tags; also `parameters`, `tool_name`
    xml     <function=f><parameter=a>1</parameter></function>, <invoke name="f">..., f<arg_key>a</arg_key>...
    braces  call:f{a:1}
    named   f{"a": 1}: a name, then an object, with markup between them
    python  f(a=1), [f(a=1), g(b=2)]
    keys    [{"f": {"a": 1}}]
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

NAMES, ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters", "args", "input", "tool_input")
WRAPPERS = ("tool_calls", "tool_call", "function_call", "function")
_JSON = json.JSONDecoder()
_ELEMENT = re.compile(
    r"<[^<>\s]*?(?:function=|(?:invoke|function) name=)\"?([^\"<>]+?)\"?>(.*?)</[^<>\s]*(?:function|invoke)>",
    re.DOTALL,
)
_PARAMETER = re.compile(
    r"<[^<>\s]*?param(?:eter)?(?:=| name=)\"?([^\"<>]+?)\"?(?: [^<>]*)?>(.*?)</[^<>\s]*?param(?:eter)?>",
    re.DOTALL,
)
_CHILD = re.compile(r"<(\w+)>(.*?)</\1>", re.DOTALL)  # a parameter under its own name
_PAIR = r"<arg_key[^<>]*>{0}</arg_key[^<>]*>\s*<arg_value[^<>]*>{0}</arg_value[^<>]*>"
_KEYED = re.compile(rf"([\w.\-]+)\s*(?:<[^<>/]*>\s*)??((?:{_PAIR.format('.*?')}\s*)+)", re.DOTALL)
_KEY_VALUE = re.compile(_PAIR.format("(.*?)"), re.DOTALL)
# a recipient with its channel and content type, or a name with an index; then markup, which decoding may drop
_NAME_BEFORE = re.compile(
    r"(?:to=([\w.\-]+?)(?:<\|\w+\|>)?(?:commentary|analysis)?\s*(?:<\|\w+\|>)?(?:json)?|([\w.\-]+)(?::\d+)?)"
    r"(?:<[^<>]*>|\[CALL_ID\]\w+|\[[A-Z_]+\]|>|\n|`{3}\w*)*$"
)
_BRACES = re.compile(r"call:([\w.\-]+)\{(.*?)\}(?=$|[\s<,\]]|call:)", re.DOTALL)
_TAG = re.compile(r"<[^<>]*>|`{3}\w*")


class ToolCall(NamedTuple):
    name: str
    arguments: str  # canonical JSON


def same_calls(prediction: str, reference: str, calls: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Whether a predicted text makes the calls of the reference: names and arguments, in any order.

    Args:
        calls: those of the row, `{"name", "arguments"}` each. If they are not found in `reference`, which has
            them as the chat template writes them, the texts are compared instead.
    """
    names = [str(call["name"]) for call in calls]
    made, wanted = calls_in(prediction), calls_in(reference)
    if Counter(call.name for call in wanted) != Counter(names or [call.name for call in wanted]):
        made, wanted = _renamed(made, names), _renamed(wanted, names)
    if names and Counter(call.name for call in wanted) != Counter(names):
        return prediction.split() == reference.split()
    return Counter(made) == Counter(wanted)


def _renamed(calls: Sequence[ToolCall], names: Sequence[str]) -> list[ToolCall]:
    """The calls with the longest of `names` that theirs contains: markup that decoding drops joins words."""
    known = sorted(names, key=len, reverse=True)
    return [call._replace(name=next((n for n in known if n in call.name), call.name)) for call in calls]


def calls_in(text: str) -> list[ToolCall]:
    """The calls in a text, in the first notation that finds one."""
    return next(filter(None, (list(find(text)) for find in NOTATIONS.values())), [])


def calls_of(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message as `{"name", "arguments"}`, with arguments that are JSON text parsed."""
    functions = [call["function"] for call in turn.get("tool_calls") or []]
    return [{"name": f["name"], "arguments": _parsed(f.get("arguments") or {})} for f in functions]


def _json(text: str) -> Iterator[ToolCall]:
    for _, value in _json_values(text):
        yield from _calls_of_value(value)


def _calls_of_value(value: Any) -> Iterator[ToolCall]:
    if isinstance(value, list):
        for item in value:
            yield from _calls_of_value(item)
    if not isinstance(value, dict):
        return
    name = next((value[key] for key in NAMES if isinstance(value.get(key), str)), None)
    given = next((value[key] for key in ARGUMENTS if key in value), None)
    if name is not None and given is not None:
        yield _call(name, given)
        return
    for key in WRAPPERS:
        yield from _calls_of_value(value.get(key))


def _xml(text: str) -> Iterator[ToolCall]:
    for name, body in _ELEMENT.findall(text):
        pairs = _PARAMETER.findall(body) or _CHILD.findall(body)
        if isinstance(_parsed(body), dict):
            yield _call(name, body)
        elif pairs or not body.strip():
            yield _call(name, {key: _value(value) for key, value in pairs})
    for name, body in _KEYED.findall(text):
        yield _call(name, {key.strip(): _value(value) for key, value in _KEY_VALUE.findall(body)})


def _named(text: str) -> Iterator[ToolCall]:
    for start, value in _json_values(text):
        name = _NAME_BEFORE.search(text, 0, start)
        if name and isinstance(value, dict):
            yield _call(name[1] or name[2], value)


def _python(text: str) -> Iterator[ToolCall]:
    try:
        body = ast.parse(_TAG.sub("", text).strip()).body
        values = [line.value for line in body if isinstance(line, ast.Expr)]
        calls = [item for value in values for item in (value.elts if isinstance(value, ast.List) else [value])]
        if len(values) == len(body) and all(isinstance(call, ast.Call) and not call.args for call in calls):
            found = [call for call in calls if isinstance(call, ast.Call)]
            yield from [
                _call(ast.unparse(c.func), {str(k.arg): ast.literal_eval(k.value) for k in c.keywords})
                for c in found
            ]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return


def _keys(text: str) -> Iterator[ToolCall]:
    for _, value in _json_values(text):
        items = value if isinstance(value, list) else []
        yield from (_call(*next(iter(item.items()))) for item in items if _is_keyed(item))


def _is_keyed(item: Any) -> bool:
    return isinstance(item, dict) and len(item) == 1 and isinstance(next(iter(item.values())), dict)


def _braces(text: str) -> Iterator[ToolCall]:
    for name, body in _BRACES.findall(text):
        yield ToolCall(name, " ".join(body.split()))


NOTATIONS: dict[str, Callable[[str], Iterator[ToolCall]]] = {
    "json": _json,
    "xml": _xml,
    "braces": _braces,
    "named": _named,
    "python": _python,
    "keys": _keys,
}


def _json_values(text: str) -> Iterator[tuple[int, Any]]:
    """The JSON objects and lists in a text that are not inside another one, with their positions."""
    end = 0
    for found in re.finditer(r"[\[{]", text):
        if found.start() < end:
            continue
        try:
            value, end = _JSON.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        yield found.start(), value


def _call(name: str, arguments: Any) -> ToolCall:
    return ToolCall(
        name.removeprefix("functions."),
        json.dumps(_number(_parsed(arguments)), sort_keys=True, ensure_ascii=False, default=str),
    )


def _parsed(arguments: Any) -> Any:
    """Arguments that are JSON text as the value that it holds."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def _value(text: str) -> Any:
    """The value of a parameter, which is JSON or plain text."""
    return _parsed(text.removeprefix("\n").removesuffix("\n"))


def _number(value: Any) -> Any:
    """The value with numbers that are equal in JSON written alike: 1.0 is 1."""
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_number(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
