"""The columns of a row by their names, and what stands beside its turns: history, system text, loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .conversation import TEXT, Message, RowError
from .loss_flags import FLAGS, weight_of
from .parts import read_content
from .source_row import SourceRow, has_value, parsed
from .turns import read_turns

# Of several names, the first whose column has a value is read.
TURNS = ("messages", "conversations", "conversation", "contents", "dialogue", "dialog", "chat", "turns")
# fmt: off
REQUESTS = (
    "prompt", "query", "question", "problem", "input", "inputs", "text_input", "input_text", "user", "human",
    "text",
)
ANSWERS = (
    "completion", "response", "solution", "answer", "output", "target", "targets", "output_text", "assistant",
    "summary",
)
# fmt: on
CONTEXTS = ("input", "context")  # added to a request, after an empty line
SYSTEMS = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")  # of the answer of a row
DOCUMENTS = ("text", "document", "content")
ANSWERING = ("assistant", TEXT)  # roles that have loss


def turns_of(row: SourceRow, *names: str) -> list[Any]:
    """The list in the first of the columns `names`, which a table holds as JSON text; a name may be a path.

    Raises: RowError if there is none.
    """
    turns = parsed(row.at(names[0]) if len(names) == 1 else row.take(*names))
    if isinstance(turns, dict):
        turns = _by_turn(turns)
    if not isinstance(turns, list) or not turns:
        name = row.find(*names)
        fact = f"has no list of {names[0]}" if name in (None, names[0]) else f"has no list of turns under {name!r}"
        raise RowError(f"no_{names[0]}", fact)
    return turns


def _by_turn(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of `{"role": [...], "content": [...]}`, as `datasets` saves a Sequence of objects; else none."""
    lists = [value for value in columns.values() if isinstance(value, list)]
    if len(lists) < len(columns) or len(set(map(len, lists))) != 1:
        return []
    return [
        {key: value for key, value in zip(columns, turn, strict=True) if value is not None}
        for turn in zip(*lists, strict=True)
    ]


def turns_in(value: object) -> list[Any] | None:
    """The turns in a cell: a list, or the text of a list of objects with roles; None for anything else."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else None
    found = parsed(value) if value.lstrip()[:1] == "[" else None
    if not isinstance(found, list) or not found:
        return None
    return found if all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in found) else None


def single_turn(request: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def history_of(row: SourceRow) -> list[Message]:
    """The earlier turns in the column `history`: pairs of request and answer, or turns with roles.

    Raises: RowError if it holds anything else.
    """
    value = parsed(row.take("history"))
    if not has_value(value):
        return []
    turns = [
        {"input": turn[0], "output": turn[1]} if isinstance(turn, list | tuple) and len(turn) == 2 else turn
        for turn in (value if isinstance(value, list | tuple) else [value])
    ]
    if not all(isinstance(turn, dict) for turn in turns):
        raise RowError("bad_history", "has a history that is no list of requests with their answers")
    return read_turns(turns, row)


def system_turn(row: SourceRow, turns: Sequence[Message]) -> list[Message]:
    """The system text beside the turns of a row, unless they begin with a system turn."""
    name = row.find(*SYSTEMS)
    if (
        turns[0]["role"] == TEXT
        or name is None
        or not isinstance(row[name], str | list | dict)
        or not has_value(row[name])
    ):
        return []
    if turns[0]["role"] in ("system", "developer") and turns[0]["content"].strip():
        if row[name] == turns[0]["content"]:
            row.take(name)
        return []
    read = read_content(row.take(name), 1, row.note_unread)
    for what, held in (("thoughts", read.thoughts), ("calls", read.calls), ("results", read.results)):
        if held:
            row.note_unread(f"{name}[].{what}")
    return [{"role": "system", "content": read.text}]


def apply_weights(row: SourceRow, turns: Sequence[Message]) -> None:
    """Take the loss off answers by the columns beside the turns: `loss_mask`, or a weight of the whole row."""
    present = {str(name).strip().lower() for name in row}.intersection(FLAGS)
    for name in sorted(present):
        value = parsed(row.get(row.find(name) or ""))
        if not has_value(value):
            continue
        if name == "loss" and not isinstance(value, bool | list):  # a number is a loss that was measured
            continue
        if name == "loss_mask" or (isinstance(value, list) and all(weight_of(w) is not None for w in value)):
            _apply_mask(row, turns, name, value)
        elif weight_of(value, name) is not None:
            for turn in turns if weight_of(value, name) == 0 else ():
                if turn["role"] in ANSWERING:
                    turn["weight"] = 0
        else:
            continue
        row.take(name)


def _apply_mask(row: SourceRow, turns: Sequence[Message], name: str, mask: Any) -> None:
    """Give the answers the weights in a column: 0 or 1 for each answer, or for each message."""
    answers = [turn for turn in turns if turn["role"] in ANSWERING]
    given = mask if isinstance(mask, list) else [mask] * len(answers)
    masked = turns if len(given) == len(turns) != len(answers) else answers
    weights = [weight_of(weight, name) for weight in given]
    if len(weights) != len(masked) or None in weights:
        raise RowError("bad_weight", f"has a {name} that is not 0 or 1 for each of its answers or messages")
    for turn, weight in zip(masked, weights, strict=True):
        if turn["role"] in ANSWERING:
            turn["weight"] = int(bool(weight) and turn.get("weight", 1))
        elif weight:
            row.note_unread(f"{name} of {turn['role']}")


def template_kwargs_of(row: SourceRow) -> dict[str, Any] | None:
    """The variables of the chat template for this row alone."""
    value = parsed(row.take("chat_template_kwargs"))
    if not has_value(value):
        return None
    if not isinstance(value, dict):
        raise RowError("bad_template_kwargs", "has chat_template_kwargs that are not an object")
    return value
