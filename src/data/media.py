"""What tells that a row is about images, audio or video: names of columns and keys, values, marks in a text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from .source_row import holds_value, parsed

# A name such as images, image_paths or audioUrl: words for media, and words for the form in which they are given.
WORDS = "image|img|picture|pic|photo|screenshot|video|audio|wav|mp3|mp4|pixel|media|attachment"
FORMS = (
    "path|url|uri|file|filename|name|byte|data|base64|b64|value|content|list|array|input|frame|feature|grid|thw"
)
NAME = re.compile(rf"(?:(?:{WORDS})s?)(?:_?(?:{WORDS}|{FORMS})s?)*")
ARROW_KEYS = ({"bytes", "path"}, {"array", "path", "sampling_rate"})  # of a cell that `datasets` decodes
HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")

PLACE = re.compile(
    r"<(img|image|audio|video)>[^<>\s]+</\1>"  # a path or address between tags, as Qwen-VL has it
    r"|<\|/?(?:image|img|video|audio|vision|media)\w*\|>|<(?:start_of_image|image_soft_token)>"  # tokens of models
    r"|(?:\A\s*|\n[ \t]*)<(image|video|audio)>(?!.*</\2>)|<(?:image|video|audio)>\s*\Z",  # its place: LLaVA
    re.DOTALL,
)


def is_media(name: object, value: Any) -> bool:
    """Whether a column or a key of a turn holds images, audio or video.

    >>> is_media("image_paths", ["a.png"]), is_media("image_count", 2), is_media("images", [None])
    (True, False, False)
    """
    if not _is_named(str(name)):
        cell = value[0] if isinstance(value, list) and value else value
        return isinstance(cell, dict) and cell.keys() in ARROW_KEYS and holds_value(cell)
    return not isinstance(value, int | float) and holds_value(parsed(value))


@lru_cache
def _is_named(name: str) -> bool:
    return NAME.fullmatch(HUMP.sub("_", name.strip()).lower()) is not None


def place_of_media(text: str) -> str | None:
    """The first mark in a text that stands for an image, audio or a video; None without one."""
    found = PLACE.search(text) if "<" in text else None
    return found[0].strip() if found else None
