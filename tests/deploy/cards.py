"""The program in a model card, run as a reader would run it: in the folder of the published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.eval.verdict import Verdict

PROMOTED = Verdict("promoted", "promoted: rougeL on test is better", {})


def program(card: str) -> str:
    """The Python program of the card's section "How to use"."""
    return card.split("## How to use", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]


def answer_of(card: str, folder: Path, base: Path) -> Any:
    """The answer of the program, run in `folder`, which has a link to the base model under its own name."""
    here = folder / base.name
    if not here.exists():
        here.symlink_to(base)
    scope: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(program(card), "README.md", "exec"), scope)
    here.unlink()
    return scope["answer"]
