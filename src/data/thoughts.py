"""The thoughts of an answer that stand in its content, between the tags of a model family."""

from __future__ import annotations

import re
from typing import NamedTuple

THINK, END_THINK = "<think>", "</think>"
TAGS = {  # opening tag -> closing tag; <NAME> is closed by </NAME>
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
    "Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]",
}
NAMES = r"(?:\w+:)?(?:think|thinking|thought|reasoning)(?::\w+)?"
OPENING = f"<{NAMES}>|{'|'.join(map(re.escape, TAGS))}"
CLOSING = f"</{NAMES}>|{'|'.join(map(re.escape, TAGS.values()))}"
OPEN_THOUGHT = re.compile(rf"({OPENING})\s*\Z")
EMPTY_THOUGHT = re.compile(rf"\s*(?P<open>{OPENING})?(?P<space>\s*)(?:{CLOSING})\n*")
_OPENED = re.compile(rf"\s*({OPENING})")
_UNOPENED = re.compile(rf"(.*?)^[ \t]*({CLOSING})[ \t]*$", re.DOTALL | re.MULTILINE)


class Thought(NamedTuple):
    """The thoughts at the beginning of a content, without their tags, and where the rest begins."""

    text: str
    end: int


def find_thought(content: str, source: str = END_THINK) -> Thought | None:
    """The thoughts with which an answer begins; None if it has none. They may be empty.

    They begin with an opening tag. Where the prompt has opened the block, rows may lack that tag: then the
    closing tag stands alone on its line. Tags in the middle of an answer are text.

    Args:
        source: the chat template. Tags that it does not hold are text.
    """
    if opened := _OPENED.match(content):
        closing, begin = closing_tag(opened[1]), opened.end()
        end = content.find(closing, begin)
    elif (unopened := _UNOPENED.match(content)) and not re.search(OPENING, unopened[1]):
        closing, begin, end = unopened[2], 0, unopened.start(2)
    else:
        return None
    if end < 0 or closing not in source:
        return None
    return Thought(content[begin:end].strip(), end + len(closing))


def split_thought(content: str, source: str = END_THINK) -> tuple[str, str]:
    """The thoughts as `find_thought` finds them, empty if there are none, and the rest.

    >>> split_thought("<think>\\nTwo and two.\\n</think>\\n\\nFour.")
    ('Two and two.', 'Four.')
    >>> split_thought("Write </think> at the end.")
    ('', 'Write </think> at the end.')
    """
    found = find_thought(content, source)
    return (found.text, content[found.end :].lstrip("\n")) if found else ("", content)


def closing_tag(opening: str) -> str:
    """The tag that closes the thoughts after an opening tag."""
    return TAGS.get(opening) or f"</{opening[1:]}"
