"""The promotion gate: refuses to publish a model that does not beat its base beyond chance, or is damaged."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import Inconclusive, NotPromoted
from ..eval.verdict import Verdict, judge
from ..runs import Run
from ..schema import GateArgs
from .checks import CheckResult


def check_gate(
    run: Run, gate: GateArgs, force: bool, results: Sequence[CheckResult] = (), artifacts_dir: str | None = None
) -> Verdict:
    """Return the verdict on the run, if it and the check `results` allow publishing, or `force` overrides them.

    Raises: NotPromoted (exit code 3) or Inconclusive (4); RunError (2), even with `force`, if the run cannot be
    judged because it was not compared with its base.
    """
    verdict = judge(run, gate, artifacts_dir)
    reasons = [] if verdict.promoted else [f"not published: {verdict.sentence}"]
    if verdict.outcome == "cannot_tell" and all(r.passed for r in results) and not force:
        raise Inconclusive(*reasons, hint="evaluate more examples, or publish anyway with force=true")
    check_health(results, force, reasons)
    return verdict


def check_health(results: Sequence[CheckResult], force: bool, reasons: Sequence[str] = ()) -> None:
    """Raises: NotPromoted (exit code 3) with `reasons` and every failed check, unless `force` overrides them."""
    problems = [*reasons, *(f"not published: {r.sentence}" for r in results if not r.passed)]
    if problems and not force:
        raise NotPromoted(*problems, hint="publish anyway with force=true")
