"""The columns of a row by their names, and what stands beside its turns: history, system text, loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .conversation import Message, RowError
from .parts import read_content
from .source_row import SourceRow, has_value, parsed
from .turns import read_turns

# Of several names, the first whose column has a value is read.
TURNS = ("messages", "conversations", "conversation", "contents", "dialogue", "dialog", "chat", "turns")
# fmt: off
REQUESTS = (
    "prompt", "query", "question", "problem", "input", "inputs", "text_input", "input_text", "user", "human",
)
ANSWERS = (
    "completion", "response", "answer", "output", "solution", "target", "targets", "output_text", "assistant",
)
# fmt: on
CONTEXTS = ("input", "context")  # added to a request, after an empty line
SYSTEMS = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")  # of the answer of a row
DOCUMENTS = ("text", "document", "content")


def turns_of(row: SourceRow, *names: str) -> list[Any]:
    """The list in the first of the columns `names`, which a table holds as JSON text; a name may be a path.

    Raises: RowError if there is none.
    """
    turns = parsed(row.at(names[0]) if len(names) == 1 else row.take(*names))
    if not isinstance(turns, list) or not turns:
        raise RowError(f"no_{names[0]}", f"has no list of {names[0]}")
    return turns


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
    if name is None or not isinstance(row[name], str | list | dict) or not has_value(row[name]):
        return []
    if turns[0]["role"] in ("system", "developer"):
        if row[name] == turns[0]["content"]:
            row.take(name)
        return []
    return [{"role": "system", "content": read_content(row.take(name), 1, row.note_unread).text}]


def apply_loss_mask(row: SourceRow, turns: Sequence[Message]) -> None:
    """Give the answers the weights in the column `loss_mask`: 0 or 1 for each answer, or for each message."""
    mask = parsed(row.take("loss_mask"))
    if mask is None or mask == "":
        return
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    weights = mask if isinstance(mask, list) else [mask] * len(answers)
    if len(weights) == len(turns) != len(answers):
        weights = [weight for turn, weight in zip(turns, weights, strict=True) if turn["role"] == "assistant"]
    if len(weights) != len(answers) or any(weight not in (0, 1) for weight in weights):
        raise RowError("bad_weight", "has a loss_mask that is not 0 or 1 for each of its answers or messages")
    for turn, weight in zip(answers, weights, strict=True):
        turn["weight"] = int(bool(weight) and turn.get("weight", 1))


def template_kwargs_of(row: SourceRow) -> dict[str, Any] | None:
    """The variables of the chat template for this row alone."""
    value = parsed(row.take("chat_template_kwargs"))
    if not has_value(value):
        return None
    if not isinstance(value, dict):
        raise RowError("bad_template_kwargs", "has chat_template_kwargs that are not an object")
    return value
