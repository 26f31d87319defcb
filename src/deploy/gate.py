"""The promotion gate: what is published has beaten its base beyond chance, and is sound."""

from __future__ import annotations

from collections.abc import Sequence

from src.config import GateArgs
from src.deploy.findings import Finding
from src.errors import CannotTell, NotPromoted
from src.eval.verdict import Verdict, judge
from src.runs import Run

__all__ = ["Verdict", "judge", "require", "require_sound"]


def require(
    run: Run, gate: GateArgs, force: bool, findings: Sequence[Finding] = (), artifacts_dir: str | None = None
) -> Verdict:
    """The verdict, where it and the `findings` are for publishing or `force` overrides them.

    Raises: NotPromoted (exit code 3), CannotTell (4); RunError (2) where there is nothing to judge, forced or not.
    """
    verdict = judge(run, gate, artifacts_dir)
    told = [] if verdict.promoted else [f"not published: {verdict.sentence}"]
    if verdict.outcome == "cannot_tell" and all(f.ok for f in findings) and not force:
        raise CannotTell(*told, hint="evaluate more examples, or publish anyway with force=true")
    require_sound(findings, force, told)
    return verdict


def require_sound(findings: Sequence[Finding], force: bool, told: Sequence[str] = ()) -> None:
    """Raises: NotPromoted (exit code 3) with what is `told` against it and each finding that is not well, unless
    `force` overrides them."""
    problems = [*told, *(f"not published: {f.sentence}" for f in findings if not f.ok)]
    if problems and not force:
        raise NotPromoted(*problems, hint="publish anyway with force=true")
