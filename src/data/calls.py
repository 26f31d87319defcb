"""Calls of tools and descriptions of tools: the shapes of the vendors become the one that chat templates read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .conversation import RowError
from .source_row import SourceRow, has_value, is_harmless, parsed
from .spelled_json import has_spelled, spelled_json

Note = Callable[[str], None]  # notes a key that is not read

WRAPPERS = ("function", "toolUse", "functionCall", "tool_use", "function_call")  # keys around the call itself
NAMES = ("name", "tool_name", "function_name")
ARGUMENTS = ("arguments", "input", "args", "parameters", "kwargs", "params")
IDS = ("id", "call_id", "tool_call_id", "toolUseId", "tool_use_id")
CALL_KEYS = {*WRAPPERS, *NAMES, *ARGUMENTS, *IDS, "type"}

TOOL_COLUMNS = (
    "tools", "functions", "tool_defs", "tool_definitions", "available_tools", "toolConfig", "tool_config",
)  # fmt: skip
DECLARATIONS = ("functionDeclarations", "function_declarations")  # Gemini: one tool that holds several
SCHEMAS = ("parameters", "input_schema", "inputSchema")  # the arguments of a tool as JSON schema


def read_calls(value: object, note: Note) -> list[dict[str, Any]]:
    """Calls as `{"id"?, "type": "function", "function": {"name", "arguments"}}`.

    Args:
        value: a call, a list of calls, or JSON text of either. Null is no call.
    Raises: RowError if one has no name.
    """
    found = parsed(value)
    calls = found if isinstance(found, list) else [found]
    return [_call(parsed(call), note) for call in calls if has_value(call)]


def _call(call: object, note: Note) -> dict[str, Any]:
    outer = call if isinstance(call, dict) else {}
    inner = next((outer[key] for key in WRAPPERS if isinstance(outer.get(key), dict)), outer)
    name = _first(inner, NAMES) or (outer.get("function") if isinstance(outer.get("function"), str) else None)
    if not isinstance(name, str):
        raise RowError("bad_call", "has a call of a tool that is no object with a name and arguments")
    arguments = _first(inner, ARGUMENTS)
    if not isinstance(arguments, dict | str | None):
        raise RowError("bad_call", f"has a call of {name} whose arguments are neither an object nor JSON text")
    unread = sorted(k for k in {*outer, *inner} - CALL_KEYS if has_value(outer.get(k, inner.get(k))))
    if inner.keys().isdisjoint(ARGUMENTS) and (unknown := [key for key in unread if not is_harmless(key)]):
        raise RowError("bad_call", f"has a call of {name} with {', '.join(unknown)} in place of arguments")
    for key in unread:
        note(f"tool_calls[].{key}")
    number = _first(outer, IDS) or _first(inner, IDS)
    if has_spelled(arguments):
        arguments = spelled_json(arguments)
    function = {"name": name, "arguments": arguments if has_value(arguments) else {}}
    return ({"id": str(number)} if number is not None else {}) | {"type": "function", "function": function}


def _first(values: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((values[key] for key in keys if values.get(key) is not None), None)


def tools_of(row: object) -> list[Any] | None:
    """The tools that a conversation may call, for the chat template; None if there are none.

    Raises: RowError if they are not a list.
    """
    if not isinstance(row, dict):
        return None
    source = row if isinstance(row, SourceRow) else SourceRow(row)
    value = parsed(source.take(*TOOL_COLUMNS))
    if source.turn_tools is not None and not has_value(value):
        value = parsed(source.turn_tools)
    elif source.turn_tools not in (None, value):
        source.note_unread("messages[].tools")
    if isinstance(value, dict) and isinstance(value.get("tools"), list):  # Bedrock's toolConfig
        value = value["tools"]
    if not has_value(value):
        return None
    if not isinstance(value, list):
        raise RowError("bad_tools", "has tools that are not a list")
    return [_tool(each) for tool in map(parsed, value) if has_value(tool) for each in _declared(tool)] or None


def _declared(tool: Any) -> list[Any]:
    found = _first(tool, DECLARATIONS) if isinstance(tool, dict) else None
    return found if isinstance(found, list) else [tool]


def _tool(tool: Any) -> Any:
    """A tool of a known shape as `{"type": "function", "function": {"name", "description", "parameters"}}`."""
    if isinstance(tool, dict) and isinstance(tool.get("toolSpec"), dict):
        tool = tool["toolSpec"]
    if not isinstance(tool, dict) or "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    function = {key: value for key, value in tool.items() if key not in ("type", *SCHEMAS)}
    schema = _first(tool, SCHEMAS)
    if schema is not None:
        nested = isinstance(schema, dict) and schema.keys() == {"json"}
        function["parameters"] = schema["json"] if nested else schema
    return {"type": "function", "function": function}


def refuse_unread_tools(row: SourceRow) -> None:
    """Raises: RowError if a column that is not read describes tools, beside calls without tools."""
    for name in sorted(row.unread & row.keys()):
        value = parsed(row[name])
        if isinstance(value, list) and any(map(_describes_tool, map(parsed, value))):
            raise RowError("bad_tools", f"has calls, and descriptions of tools under {name}, which is not read")


def _describes_tool(value: object) -> bool:
    found = value.get("function", value) if isinstance(value, dict) else None
    return isinstance(found, dict) and "name" in found and not found.keys().isdisjoint(("description", *SCHEMAS))
