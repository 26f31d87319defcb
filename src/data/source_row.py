"""A row as a file holds it. It notes which of its columns and keys are read, so that no value is lost unseen."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .conversation import RowError
from .spelled_json import SpelledFloat

PATH = re.compile(r"[^.\[\]]+|\[\d+\]")  # the steps of answers.text[0]

# Columns and keys that do not change what is trained: listed in the report when unread, but no finding.
HARMLESS = frozenset((
    "id", "idx", "index", "uuid", "guid", "hash", "sha", "sha256", "md5", "source", "sources", "origin",
    "dataset", "dataset_name", "subset", "split", "partition", "lang", "language", "locale", "country",
    "meta", "metadata", "info", "extra_info", "created", "date", "datetime", "time", "timestamp", "updated",
    "modified", "version", "schemaversion", "generationconfig", "safetysettings", "thoughtsignature",
    "inferenceconfig", "schema_version", "license", "copyright", "author", "authors", "annotator", "url",
    "urls", "uri", "link", "links", "file", "filename", "path", "category", "categories", "topic", "tags",
    "domain", "task", "task_name", "task_type", "model", "model_name", "generator", "temperature", "top_p",
    "seed", "n_tokens", "num_tokens", "tokens", "token_count", "length", "num_turns", "parallel_tool_calls",
    "max_tokens", "top_k", "stop", "stream", "tool_choice", "response_format", "turn", "redacted", "strict",
    "status", "signature", "cache_control", "annotations", "refusal", "logprobs", "usage", "finish_reason",
    "stop_reason", "object", "type", "state", "tree_state", "answer_start", "is_impossible", "channel",
))  # fmt: skip
# Of these, a value of three words or more may well be a part of the request: such a value is not harmless.
LABELS = frozenset((
    "task", "task_name", "task_type", "info", "meta", "extra_info", "language", "file", "state", "type", "topic",
    "category", "object", "path", "domain", "status", "channel",
))  # fmt: skip
HARMLESS_ENDS = ("_id", "_ids", "_at", "_url", "_hash", "_index", "_idx", "_date", "_time")

HARMLESS_STARTS = ("unnamed: ", "index_level_")  # how pandas names an index


class SourceRow(dict[str, Any]):
    """The columns of a row by name. A name matches in any case unless the row has it as it is written."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        super().__init__(columns)
        self._read: set[str] = set()
        self._unread_keys: set[str] = set()
        self.turn_tools: Any = None  # tools that a turn describes
        self._paths: dict[str, list[list[str]]] = {}  # into columns that are read in part
        folded = {str(name).strip().lower(): name for name in columns}
        self._names = folded if folded.keys() != columns.keys() else None  # None: as they are written

    def find(self, *names: str) -> str | None:
        """The first of the columns `names` that has a value, else the first that the row has; None without any."""
        first = None
        for name in names:
            found = name if name in self else self._names.get(name) if self._names is not None else None
            if found is not None:
                if has_value(self[found]):
                    return found
                first = first or found
        return first

    def take(self, *names: str) -> Any:
        """The value of the column that `find` finds, which counts as read; None without one."""
        name = self.find(*names)
        if name is None:
            return None
        self._read.add(name)
        return self[name]

    def at(self, path: str) -> Any:
        """The value of a column, or of a path into one, such as `answers.text[0]`. This value counts as read."""
        if self.find(path) is not None:
            return self.take(path)
        first, *steps = PATH.findall(path) or [path]
        column = self.find(first)
        if column is None:
            return None
        self._paths.setdefault(column, []).append(steps)
        value = self[column]
        for step in steps:
            value = _step(value, step)
        return value

    def note_unread(self, key: str) -> None:
        """Note a key inside a column that is not read, as a path such as `messages[].mood`."""
        self._unread_keys.add(key)

    def note_tools(self, tools: Any) -> None:
        """Note the tools that a turn describes. Others of a later turn are not read."""
        if has_value(tools) and tools != self.turn_tools:
            if self.turn_tools is None:
                self.turn_tools = tools
            else:
                self.note_unread("messages[].tools")

    @property
    def is_read(self) -> bool:
        """Whether every column was read."""
        return len(self._read) == len(self)

    @property
    def unread(self) -> set[str]:
        """The columns that hold a value and were not read, and the noted keys."""
        left = [name for name in self if name not in self._read and holds_value(self[name])]
        inside = (
            _unread_inside(parsed(self[name]), name, self._paths[name]) for name in left if name in self._paths
        )
        return {name for name in left if name not in self._paths}.union(self._unread_keys, *inside)


def has_value(value: Any) -> bool:
    """Whether a cell or a key holds anything: null, blank text and empty lists and objects hold nothing."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    return value is not None and not (isinstance(value, list | dict) and not value)


def holds_value(value: Any) -> bool:
    """Whether a cell holds anything at any depth: Arrow fills lists and objects with nulls."""
    if isinstance(value, dict):
        return any(map(holds_value, value.values()))
    return any(map(holds_value, value)) if isinstance(value, list) else has_value(value)


def is_harmless(key: str) -> bool:
    """Whether a column or key that is not read changes nothing in what is trained.

    >>> is_harmless("conversation_id"), is_harmless("messages[].mood")
    (True, False)
    """
    name = key.rpartition(".")[2].lower().strip("_")
    return name in HARMLESS or name.endswith(HARMLESS_ENDS) or name.startswith(HARMLESS_STARTS)


def unread_name(key: str, value: Any) -> str:
    """How the report names a column or key that is not read: a text under the name of a label is marked.

    >>> unread_name("task", "sums"), unread_name("task", "Translate to French")
    ('task', 'task (text)')
    """
    wordy = isinstance(value, str) and key.lower().strip("_") in LABELS and len(value.split(maxsplit=3)) >= 3
    return f"{key} (text)" if wordy else key


def parsed(cell: object) -> Any:
    """The list or object that the text of a cell holds, in JSON or as Python prints it; else the cell itself."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    if cell.lstrip()[:1] not in ("[", "{"):
        return cell
    try:
        return json.loads(json.dumps(ast.literal_eval(cell.strip()), default=str))  # as JSON would hold it
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return cell


def as_text(value: object) -> str | None:
    """Text, or a number as text; None for anything else.

    >>> as_text(4), as_text(True)
    ('4', None)
    """
    if isinstance(value, str):
        return value
    if isinstance(value, SpelledFloat):
        return value.spelling
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def text_of(row: SourceRow, *names: str) -> str:
    """The text of the first of the columns `names` that the row has; a name may be a path.

    Raises: RowError if it has none of them, or one that holds no text.
    """
    value = as_text(row.at(names[0]) if len(names) == 1 else row.take(*names))
    if value is None:
        name = row.find(*names) or names[0]
        raise RowError(f"no_{reason_name(names[0])}", f"has no text under {name!r}")
    return value


def reason_name(column: str) -> str:
    return re.sub(r"\W+", "_", column).strip("_")


def _unread_inside(value: Any, name: str, paths: list[list[str]]) -> Iterator[str]:
    """The paths of the values inside of a value that none of `paths` reads."""
    if not all(paths):
        return
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        items = [(f".{key}", each) for key, each in value.items()]
    elif isinstance(value, list):
        items = [(f"[{number}]", each) for number, each in enumerate(value)]
    read = [_step(value, path[0]) for path in paths]
    for step, each in items:
        deeper = [path[1:] for path in paths if path[0] == step.removeprefix(".")]
        if deeper:
            yield from _unread_inside(parsed(each), name + step, deeper)
        elif has_value(each) and each not in read:
            yield name + (step if isinstance(value, dict) else "[]")


def _step(value: Any, step: str) -> Any:
    value = parsed(value)
    if step.startswith("["):
        number = int(step[1:-1])
        return value[number] if isinstance(value, list) and number < len(value) else None
    return value.get(step) if isinstance(value, dict) else None
