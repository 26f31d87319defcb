"""The promotion gate: what is published has beaten its base."""

from __future__ import annotations

from typing import NamedTuple

from src.config import GateArgs
from src.errors import NotPromoted, RunError
from src.model.tasks import TASKS
from src.runs import Run
from src.utils.files import read_json


class Verdict(NamedTuple):
    promoted: bool
    sentence: str


def judge(run: Run, gate: GateArgs) -> Verdict:
    """Whether the run's model is better than its base by the gate's metric and split.

    Raises: RunError if base and tuned model have not been compared, or not by that metric and split.
    """
    path = run.path / "comparison.json"
    if not path.exists():
        raise RunError(
            f"run {run.id} has not been compared with its base model",
            hint="make eval and make eval-baseline, in either order, do that",
        )
    rows = read_json(path)["rows"]
    metric = gate.metric or TASKS[run.manifest.get("task", "causal_lm")].decides
    found = [r for r in rows if r["metric"] == metric and r["split"] == gate.split]
    if not found:
        known = sorted({f"{r['metric']} on {r['split']}" for r in rows})
        raise RunError(
            f"run {run.id} was not compared by {metric} on {gate.split}",
            hint=f"set gate.metric and gate.split to one of: {', '.join(known)}",
        )
    row = found[0]
    sentence = (
        f"{metric} on {gate.split} went from {row['base']:.4g} to {row['tuned']:.4g} "
        f"({row['difference']:+.4g}; the gate asks for more than {gate.min_delta:+.4g})"
    )
    return Verdict(row["difference"] > gate.min_delta, sentence)


def require(run: Run, gate: GateArgs, force: bool) -> Verdict:
    """The verdict, where it is for publishing or `force` overrides it.

    Raises: NotPromoted (exit code 3), RunError.
    """
    verdict = judge(run, gate)
    if not verdict.promoted and not force:
        raise NotPromoted(f"not published: {verdict.sentence}", hint="publish anyway with force=true")
    return verdict
