"""The verdict: whether a tuned model is better than its base, no better, or whether that cannot be told.

promoted    the interval of the difference lies above `min_delta`, the paired test agrees, no guard is broken
not_better  the difference is not above `min_delta`, or its whole interval is not; or a guard is broken
cannot_tell what is left: too few examples for a difference of this size, or fewer than `min_examples`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from src.errors import RunError
from src.eval import results, significance
from src.eval.fingerprint import baseline_folder
from src.eval.results import EvalResult
from src.eval.significance import Comparison
from src.model.tasks import TASKS
from src.runs import Run
from src.schema import GateArgs, Guard
from src.utils.files import read_json

Outcome = Literal["promoted", "not_better", "cannot_tell"]
PREFIXES = NO_BETTER, TOO_FEW = "no better than the base: ", "too few examples to tell: "
DIGITS = {"0-1": 3, "0-100": 1}


class Verdict(NamedTuple):
    """`facts`: the figures of the gate's metric and of its guards, and the settings they were held against."""

    outcome: Outcome
    sentence: str
    facts: dict[str, Any]

    @property
    def promoted(self) -> bool:
        return self.outcome == "promoted"


class MetricComparison(NamedTuple):
    """A metric on a split, and what was found of it. `sign` is -1 where lower is better."""

    metric: str
    split: str
    digits: int
    sign: int
    found: Comparison

    @property
    def gain(self) -> float:
        return self.sign * self.found.difference

    @property
    def interval(self) -> tuple[float, float]:
        """Of the gain: from its low end to its high one."""
        ends = (self.sign * self.found.low, self.sign * self.found.high)
        return min(ends), max(ends)


def judge(run: Run, gate: GateArgs, artifacts_dir: str | None = None) -> Verdict:
    """Whether the run's model is better than its base, from the answers of both.

    Raises: RunError if they have not been compared, or not by the metrics and on the splits of the gate.
    """
    path = run.path / "comparison.json"
    if not path.exists():
        raise RunError(
            f"run {run.id} has not been compared with its base model",
            hint="make eval and make eval-baseline, in either order, do that",
        )
    tuned, kept = EvalResult.of_run(run), Path(read_json(path).get("baseline") or "")
    if artifacts_dir and not (kept / "metrics.json").is_file():  # moved, with all that was kept
        kept = baseline_folder(artifacts_dir, tuned.result["base_model"], tuned.result["conditions"])
    return decide(tuned, EvalResult.of_base(kept), gate)


def decide(tuned: EvalResult, base: EvalResult, gate: GateArgs) -> Verdict:
    """Whether `tuned` is better than `base`.

    Raises: RunError if they are not comparable, or were not evaluated by what the gate names.
    """
    results.require_same_conditions(tuned, base)
    metric = gate.metric or TASKS[tuned.result["conditions"].get("task", "causal_lm")].decides
    guards = [Guard(g.metric or metric, g.split, g.max_drop) for g in gate.guards]
    wanted = [("gate", metric, gate.split), *(("gate.guards", str(g.metric), g.split) for g in guards)]
    _refuse_unmeasured(tuned, wanted)
    mine = _confirmed(_measure(tuned, base, metric, gate.split, gate, gate.min_delta), tuned, base, gate)
    held = [_measure(tuned, base, str(g.metric), g.split, gate) for g in guards]
    broken = [_broken(m, g) for m, g in zip(held, guards, strict=True) if -m.gain > g.max_drop]
    outcome = decide_outcome(mine, gate)
    sentence = _sentence(mine, gate, outcome)
    if broken:
        prefix = NO_BETTER if outcome == "not_better" else ""
        outcome, sentence = "not_better", f"{prefix}{describe(mine, gate)}, but {'; '.join(broken)}"
    facts = {
        **_facts(mine),
        "gate": asdict(gate) | {"metric": metric, "guards": [asdict(g) for g in guards]},
        "guards": [_facts(m) | {"max_drop": g.max_drop} for m, g in zip(held, guards, strict=True)],
    }
    return Verdict(outcome, sentence, facts)


def decide_outcome(mine: MetricComparison, gate: GateArgs) -> Outcome:
    """By the interval and the p-value; guards aside.

    The interval alone is not enough: of four examples that changed, all for the better, 98 % of the resamples
    hold at least one. The test knows that four coins fall alike one time in eight.
    """
    low, high = mine.interval
    if mine.found.examples < gate.min_examples:
        return "cannot_tell"
    if low > gate.min_delta and mine.found.p_value <= 1 - gate.confidence:
        return "promoted"
    return "not_better" if mine.gain <= gate.min_delta or high <= gate.min_delta else "cannot_tell"


def _measure(
    tuned: EvalResult, base: EvalResult, metric: str, split: str, gate: GateArgs, min_delta: float = 0.0
) -> MetricComparison:
    about = tuned.result["metrics"][metric]
    pair = results.pair_scores(tuned, base, split, metric)
    if pair is None or about["better"] == "neither":
        why = "says of neither model that it is better" if pair else "has no scores of single examples"
        raise RunError(f"{metric} cannot decide: it {why}", hint="set gate.metric and gate.guards to another")
    sign = -1 if about["better"] == "lower" else 1
    (found,) = significance.compare(
        [pair], confidence=gate.confidence, resamples=gate.resamples, shift=sign * min_delta
    )
    found = found._replace(detectable=found.detectable + min_delta)
    return MetricComparison(metric, split, digits(about["scale"]), sign, found)


def _confirmed(mine: MetricComparison, tuned: EvalResult, base: EvalResult, gate: GateArgs) -> MetricComparison:
    """With the larger of two p-values where the metric's library has a paired test of its own."""
    if mine.metric not in significance.SCORERS or gate.min_delta:
        return mine
    theirs = significance.sacrebleu_p_value(
        mine.metric,
        base=[row["prediction"] for row in base.rows(mine.split)],
        tuned=[row["prediction"] for row in tuned.rows(mine.split)],
        references=[row["reference"] for row in tuned.rows(mine.split)],
        resamples=gate.resamples,
    )
    p_value, test = max(mine.found.p_value, theirs), f"{mine.found.test}, and sacrebleu's; the larger p-value"
    return mine._replace(found=mine.found._replace(p_value=p_value, test=test))


def _refuse_unmeasured(tuned: EvalResult, wanted: list[tuple[str, str, str]]) -> None:
    """Raises: RunError naming what the gate asks for and was not evaluated."""
    scores = tuned.result["eval"]
    missing = [
        f"{key}: {metric} on {split}" for key, metric, split in wanted if metric not in scores.get(split, {})
    ]
    if missing:
        alike: dict[str, list[str]] = {}  # splits by their metrics, which are mostly the same
        for split, metrics in scores.items():
            alike.setdefault(", ".join(metrics), []).append(split)
        known = "; ".join(f"{', '.join(splits)}: {metrics}" for metrics, splits in alike.items())
        others = "gate.metric, gate.split and gate.guards to what there is"
        only_guards = not any(each.startswith("gate:") for each in missing)
        raise RunError(
            f"{tuned.name} was not evaluated by what decides ({'; '.join(missing)}); there is {known}",
            hint=f"evaluate that, or set {'gate.guards=[], or to what there is' if only_guards else others}",
        )


def _broken(guarded: MetricComparison, guard: Guard) -> str:
    return f"{describe(guarded)}, and the guard allows a loss of {guard.max_drop:g}"


def _sentence(mine: MetricComparison, gate: GateArgs, outcome: Outcome) -> str:
    said = describe(mine, gate)
    if outcome == "cannot_tell":
        return TOO_FEW + said
    return said if outcome == "promoted" else NO_BETTER + said


def describe(measured: MetricComparison, gate: GateArgs | None = None) -> str:
    """One clause: the scores, the difference with its interval, and what would have been seen."""
    d, found = measured.digits, measured.found
    moved = "rose" if found.difference > 0 else "fell" if found.difference < 0 else "stayed the same"
    rounded = [f"{x:.{d}f}" for x in (found.base, found.tuned)]
    words = f"{moved} from {rounded[0]} to {rounded[1]}" if found.difference else f"{moved} at {rounded[0]}"
    percent = f"{100 * gate.confidence:g}% " if gate else ""
    inside = [
        f"{found.difference:+.{d}f}",
        f"{percent}interval {found.low:.{d}f} to {found.high:.{d}f}",
        f"p {found.p_value:.2g}",
        f"{found.examples} examples",
    ]
    text = f"{measured.metric} on {measured.split} {words} ({', '.join(inside)}"
    if gate:
        text += _terms(measured, gate)
    return text + ")"


def _terms(measured: MetricComparison, gate: GateArgs) -> str:
    """What was asked for, where that is more than nothing, and what could have been seen."""
    asked = f"; the gate asks for more than {gate.min_delta:+g}" if gate.min_delta else ""
    if measured.found.examples < gate.min_examples:
        return f"{asked}; the gate asks for {gate.min_examples} examples or more"
    return f"{asked}; a difference of {measured.found.detectable:.2g} or more would have been seen"


def _facts(measured: MetricComparison) -> dict[str, Any]:
    return {"metric": measured.metric, "split": measured.split, **measured.found._asdict()}


def digits(scale: str) -> int:
    return DIGITS.get(scale, 3)


def as_json(verdict: Verdict) -> Mapping[str, Any]:
    return {"outcome": verdict.outcome, "sentence": verdict.sentence, **verdict.facts}
