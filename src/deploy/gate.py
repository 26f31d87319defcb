"""The promotion gate: what is published has beaten its base beyond chance, and is sound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from src.config import GateArgs
from src.errors import CannotTell, NotPromoted
from src.eval.verdict import Verdict, judge
from src.runs import Run

__all__ = ["Finding", "Verdict", "judge", "require"]


class Finding(Protocol):
    """What a health check of the run found; `sentence` says it where it is not `ok`."""

    @property
    def name(self) -> str: ...

    @property
    def ok(self) -> bool: ...

    @property
    def sentence(self) -> str: ...


def require(
    run: Run, gate: GateArgs, force: bool, findings: Sequence[Finding] = (), artifacts_dir: str | None = None
) -> Verdict:
    """The verdict, where it and the `findings` are for publishing or `force` overrides them.

    Raises: NotPromoted (exit code 3), CannotTell (4); RunError (2) where there is nothing to judge, forced or not.
    """
    verdict = judge(run, gate, artifacts_dir)
    unsound = [f"not published: {f.sentence}" for f in findings if not f.ok]
    if force or (verdict.promoted and not unsound):
        return verdict
    told = [] if verdict.promoted else [f"not published: {verdict.sentence}"]
    if not unsound and verdict.outcome == "cannot_tell":
        raise CannotTell(*told, hint="evaluate more examples, or publish anyway with force=true")
    raise NotPromoted(*told, *unsound, hint="publish anyway with force=true")
