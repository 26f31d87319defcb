"""What a model answers, whichever engine it ran in."""

from __future__ import annotations

from typing import NamedTuple


class Generation(NamedTuple):
    """tokens: how many were generated, the end of the turn aside.

    stop: `end` where the model ended its turn, `stop` where it wrote a stop string (the text ends before it),
    `length` where it was cut at `max_new_tokens`.
    """

    text: str
    tokens: int
    stop: str
