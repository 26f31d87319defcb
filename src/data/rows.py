"""What the data room hands around: rows, rejections and tokenised examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from src.data.formats import Message

IGNORED = -100  # label of a token without loss, as torch.nn.CrossEntropyLoss takes it
MOST_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """One training row: its messages, the tools they may call, and where they stand."""

    file: Path
    line: int
    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Rejection:
    """A row that is not trained on, and why."""

    file: Path
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.detail}"


class Example(NamedTuple):
    """Token ids, and for each whether there is loss on it. Equal lengths."""

    ids: list[int]
    learnt: list[bool]

    @property
    def labels(self) -> list[int]:
        """The id where there is loss, IGNORED elsewhere."""
        return [i if on else IGNORED for i, on in zip(self.ids, self.learnt, strict=True)]
