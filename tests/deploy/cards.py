"""The program in a model card, run as a reader would run it: in the folder of the published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Said(NamedTuple):
    """A verdict, as far as a card reads it."""

    promoted: bool = True
    sentence: str = "promoted: rougeL on test is better"


def program(card: str) -> str:
    """The Python of the card's section on loading."""
    return card.split("## How to load it", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]


def answer_of(card: str, folder: Path, base: Path) -> Any:
    """What the program says, run in `folder`, beside which the base model lies under its own name."""
    here = folder / base.name
    if not here.exists():
        here.symlink_to(base)
    scope: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(program(card), "README.md", "exec"), scope)
    here.unlink()
    return scope["answer"]
