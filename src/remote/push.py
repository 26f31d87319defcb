"""The code of this folder, on the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src.remote.link import Link


def push(link: Link, also: Sequence[str] = ()) -> dict[str, Any] | None:
    return None
