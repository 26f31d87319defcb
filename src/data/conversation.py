"""The one shape of a row in the rest of the package: a conversation, or the reason why the row cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from typing_extensions import NotRequired

TEXT = "text"  # the role of a document, to which no chat template is applied
TEMPLATE_KEYS = (
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
)  # keys of a turn that chat templates read


class Message(TypedDict):
    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[Any]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    weight: NotRequired[int]


class Conversation(NamedTuple):
    """What a chat template renders: messages, the tools that they may call, and variables of the template."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] | None = None

    def upto(self, end: int) -> Conversation:
        """The first `end` messages."""
        return self._replace(messages=self.messages[:end])


@dataclass(frozen=True)
class Row:
    """One row: its file and line, and the parts of its conversation."""

    file: Path
    line: int
    messages: list[Message]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None

    @property
    def conversation(self) -> Conversation:
        return Conversation(self.messages, self.tools, self.template_kwargs)


@dataclass(frozen=True)
class Rejection:
    """A row that is not trained on, and why."""

    file: Path
    line: int
    reason: str
    detail: str
    rows: int = 1  # more for a part of a file that could not be read, by its lines

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.detail}"


class RowError(Exception):
    """Why a row cannot be used: a short name to count by, and a predicate such as `has no assistant turn`.

    `rows` is the number of rows that it stands for: more than one if a part of a file could not be read.
    """

    def __init__(self, reason: str, detail: str, rows: int = 1) -> None:
        self.reason, self.detail, self.rows = reason, detail, rows
        super().__init__(reason, detail, rows)

    def __str__(self) -> str:
        return self.detail
