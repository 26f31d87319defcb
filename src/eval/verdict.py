"""The verdict: whether a tuned model is better than its base, not better, or the evaluation is inconclusive.

promoted    the interval of the difference is above `min_delta`, the paired test agrees, and no guard is broken
not_better  the difference or the upper end of its interval is not above `min_delta`, or a guard is broken
cannot_tell inconclusive, everything else: too few examples for a difference of this size, or fewer than
            `min_examples`
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import learning
from ..errors import RunError
from ..model.tasks import TASKS
from ..runs import Run
from ..schema import DEFAULT_GUARD, GateArgs, Guard
from ..utils.commands import command
from ..utils.files import read_object
from ..utils.units import count
from . import eval_data, results, significance
from .fingerprint import baseline_folder
from .metrics import METRICS, answer_of
from .results import EvalResult
from .significance import Comparison

Outcome = Literal["promoted", "not_better", "cannot_tell"]
PREFIXES = NOT_BETTER, INCONCLUSIVE = "not better than the base: ", "inconclusive: "
DEFAULT_SPLIT = "test"
DIGITS = {"0-1": 3, "0-100": 1}


class Verdict(NamedTuple):
    """facts: the figures of the gate's metric and of its guards, the gate's settings, and notes on these."""

    outcome: Outcome
    sentence: str
    facts: dict[str, Any]

    @property
    def promoted(self) -> bool:
        return self.outcome == "promoted"


class MetricComparison(NamedTuple):
    """The comparison by one metric on one split.

    digits: after the decimal point, for messages. sign: -1 if lower is better, else 1.
    """

    metric: str
    split: str
    digits: int
    sign: int
    comparison: Comparison

    @property
    def gain(self) -> float:
        return self.sign * self.comparison.difference

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the gain's interval."""
        ends = (self.sign * self.comparison.low, self.sign * self.comparison.high)
        return min(ends), max(ends)


def judge(run: Run, gate: GateArgs, artifacts_dir: str | None = None) -> Verdict:
    """Whether the run's model is better than its base, from the stored predictions of both.

    Raises: RunError if they were not compared, or not evaluated by the metrics and on the splits of the gate.
    """
    path = run.path / "comparison.json"
    if not path.exists():
        raise RunError(
            f"run {run.id} has not been compared with its base model",
            hint=f"{command('eval', run.word)} and {command('eval-baseline')}, in either order, do that",
        )
    tuned, folder = EvalResult.of_run(run), Path(read_object(path).get("baseline") or "")
    if artifacts_dir and not (folder / "metrics.json").is_file():  # the artifacts were moved
        folder = baseline_folder(artifacts_dir, tuned.result["base_model"], tuned.result["conditions"])
    return decide(tuned, EvalResult.of_base(folder), gate)


def decide(tuned: EvalResult, base: EvalResult, gate: GateArgs) -> Verdict:
    """Whether `tuned` is better than `base`.

    Raises: RunError if they are not comparable, or were not evaluated by the gate's metrics and splits.
    """
    results.require_same_conditions(tuned, base)
    gate, notes = resolve(gate, tuned.result)
    metric, split, guards = str(gate.metric), str(gate.split), gate.guards or []
    wanted = [("gate", metric, split), *(("gate.guards", str(g.metric), g.split) for g in guards)]
    _refuse_unmeasured(tuned, wanted)
    notes += _notes_on_script(metric, split, [str(row["reference"]) for row in tuned.rows(split)])
    notes += learning.note(tuned.run.metrics) if tuned.run else []
    mine = _confirmed(_measure(tuned, base, metric, split, gate, gate.min_delta), tuned, base, gate)
    held = [_measure(tuned, base, str(g.metric), g.split, gate) for g in guards]
    broken = [_broken(m, g) for m, g in zip(held, guards, strict=True) if -m.gain > g.max_drop]
    outcome = decide_outcome(mine, gate)
    sentence = _sentence(mine, gate, outcome)
    if broken:
        prefix = NOT_BETTER if outcome == "not_better" else ""
        outcome, sentence = "not_better", f"{prefix}{describe(mine, gate)}, but {'; '.join(broken)}"
    invalid = _invalid(tuned, {split for _, _, split in wanted}) if outcome == "promoted" else ""
    if invalid:
        outcome, sentence = "cannot_tell", f"{INCONCLUSIVE}{invalid}; {sentence}"
    facts = {
        **_facts(mine),
        "gate": asdict(gate),
        "guards": [_facts(m) | {"max_drop": g.max_drop} for m, g in zip(held, guards, strict=True)],
        "notes": notes,
        **({"invalid": invalid} if invalid else {}),
    }
    return Verdict(outcome, sentence, facts)


def _invalid(tuned: EvalResult, splits: Collection[str]) -> str:
    """Why the scores of these splits say nothing about new rows; empty if nothing is known against them."""
    trained = eval_data.trained_on_evaluation_data(tuned.run) if tuned.run else ""
    return trained or eval_data.trained_on_scored_rows(tuned.result, splits)


def resolve(gate: GateArgs, result: Mapping[str, Any]) -> tuple[GateArgs, list[str]]:
    """The gate with everything that its settings leave to the evaluation `result`: metric, split and guards.

    Returns: also a sentence about the default guard if it is left out because its split was not evaluated.
    Raises: RunError if no split is named, and several were evaluated of which none is `test`.
    """
    metric = gate.metric or TASKS[result["conditions"].get("task", "causal_lm")].gate_metric
    splits = list(result["eval"])
    split = gate.split or (DEFAULT_SPLIT if DEFAULT_SPLIT in splits or len(splits) > 1 else splits[0])
    if not gate.split and split not in splits:
        raise RunError(
            f"it is not said which split decides: of {', '.join(splits)}, none is named {DEFAULT_SPLIT}",
            hint=f"set gate.split={shlex.quote(splits[0])}, or to another of them",
        )
    notes = []
    guards = [DEFAULT_GUARD] if gate.guards is None else gate.guards
    if gate.guards is None and DEFAULT_GUARD.split not in splits:
        guards = []
        notes = [f"the default guard is left out: there is no split {DEFAULT_GUARD.split}"]
    guards = [Guard(guard.metric or metric, guard.split, guard.max_drop) for guard in guards]
    return replace(gate, metric=metric, split=split, guards=guards), notes


def _notes_on_script(metric: str, split: str, references: Sequence[str]) -> list[str]:
    """A sentence if ROUGE cannot see most references: rouge_score drops all but Latin letters and digits."""
    unseen = sum(2 * len(re.findall(r"[a-z0-9]", t.lower())) < sum(map(str.isalnum, t)) for t in references)
    if not metric.startswith("rouge") or 2 * unseen <= len(references):
        return []
    return [
        f"{metric} counts Latin letters and digits only, and {unseen} of {count(len(references), 'reference')} of "
        f"{split} consist mostly of others: gate.metric=chrf decides by characters"
    ]


def decide_outcome(mine: MetricComparison, gate: GateArgs) -> Outcome:
    """The outcome by interval and p-value, without the guards.

    The interval alone is not enough: if four examples changed, all for the better, 98 % of the resamples hold at
    least one of them and the interval excludes 0, but the p-value of the randomisation test is 1/8.
    """
    low, high = mine.interval
    if mine.comparison.examples < gate.min_examples:
        return "cannot_tell"
    if low > gate.min_delta and mine.comparison.p_value <= 1 - gate.confidence:
        return "promoted"
    return "not_better" if mine.gain <= gate.min_delta or high <= gate.min_delta else "cannot_tell"


def _measure(
    tuned: EvalResult, base: EvalResult, metric: str, split: str, gate: GateArgs, min_delta: float = 0.0
) -> MetricComparison:
    about = tuned.result["metrics"][metric]
    pair = results.pair_scores(tuned, base, split, metric)
    if pair is None or about["better"] == "neither":
        why = "does not say which model is better" if pair else "has no scores of single examples"
        raise RunError(f"{metric} cannot decide: it {why}", hint="set gate.metric and gate.guards to another")
    sign = -1 if about["better"] == "lower" else 1
    (found,) = significance.compare(
        [pair], confidence=gate.confidence, resamples=gate.resamples, shift=sign * min_delta
    )
    found = found._replace(detectable=found.detectable + min_delta)
    return MetricComparison(metric, split, digits(about["scale"]), sign, found)


def _confirmed(mine: MetricComparison, tuned: EvalResult, base: EvalResult, gate: GateArgs) -> MetricComparison:
    """With the larger of two p-values for metrics of sacrebleu, which has a paired test too."""
    metric = METRICS.get(mine.metric)
    if metric is None or metric.scorer is None or gate.min_delta:
        return mine
    theirs = significance.sacrebleu_p_value(
        metric.scorer(),
        base=[answer_of(row["prediction"]) for row in base.rows(mine.split)],
        tuned=[answer_of(row["prediction"]) for row in tuned.rows(mine.split)],
        references=[answer_of(row["reference"]) for row in tuned.rows(mine.split)],
        resamples=gate.resamples,
    )
    p_value, test = (
        max(mine.comparison.p_value, theirs),
        f"{mine.comparison.test}, and sacrebleu's; the larger p-value",
    )
    return mine._replace(comparison=mine.comparison._replace(p_value=p_value, test=test))


def _refuse_unmeasured(tuned: EvalResult, wanted: list[tuple[str, str, str]]) -> None:
    """Raises: RunError naming the metrics and splits of the gate that were not evaluated."""
    scores = tuned.result["eval"]
    missing = [
        f"{key}: {metric} on {split}" for key, metric, split in wanted if metric not in scores.get(split, {})
    ]
    if missing:
        by_metrics: dict[str, list[str]] = {}  # the splits with the same metrics
        for split, metrics in scores.items():
            by_metrics.setdefault(", ".join(metrics), []).append(split)
        known = "; ".join(f"{', '.join(splits)}: {metrics}" for metrics, splits in by_metrics.items())
        raise RunError(
            f"the gate needs scores of {tuned.name} that were not computed: {'; '.join(missing)}; "
            f"available: {known}",
            hint=f"evaluate them, or set {_computed(scores, *wanted[0][1:])}, or to another that was evaluated",
        )


def _computed(scores: Mapping[str, Mapping[str, float]], metric: str, split: str) -> str:
    """A setting with which the gate needs only scores that were computed."""
    if metric in scores.get(split, {}):
        return "gate.guards=[]"
    having = [name for name, metrics in scores.items() if metric in metrics]
    return (
        f"gate.split={shlex.quote(having[0])}"
        if having
        else f"gate.metric={next(iter(next(iter(scores.values()))))}"
    )


def _broken(guarded: MetricComparison, guard: Guard) -> str:
    return f"{describe(guarded)}, and the guard allows a loss of {guard.max_drop:g}"


def _sentence(mine: MetricComparison, gate: GateArgs, outcome: Outcome) -> str:
    prefix = {"promoted": "", "not_better": NOT_BETTER, "cannot_tell": INCONCLUSIVE}[outcome]
    return prefix + describe(mine, gate)


def describe(measured: MetricComparison, gate: GateArgs | None = None) -> str:
    """One clause: the scores, the difference with its interval, and the detectable difference."""
    d, c = measured.digits, measured.comparison
    shown = [d, *range(d + 1, d + 4)]  # more digits where these hide the difference
    d = next((n for n in shown if f"{c.base:.{n}f}" != f"{c.tuned:.{n}f}"), d) if c.difference else d
    change = "rose" if c.difference > 0 else "fell" if c.difference < 0 else "stayed the same"
    scores = f"from {c.base:.{d}f} to {c.tuned:.{d}f}" if c.difference else f"at {c.base:.{d}f}"
    percent = f"{100 * gate.confidence:g}% " if gate else ""
    figures = [
        f"{c.difference:+.{d}f}",
        f"{percent}interval {c.low:.{d}f} to {c.high:.{d}f}",
        f"p {c.p_value:.2g}",
        count(c.examples, "example"),
    ]
    terms = _terms(measured, gate) if gate else ""
    return f"{measured.metric} on {measured.split} {change} {scores} ({', '.join(figures)}{terms})"


def _terms(measured: MetricComparison, gate: GateArgs) -> str:
    """What the gate requires, and the detectable difference."""
    required = f"; the gate requires more than {gate.min_delta:+g}" if gate.min_delta else ""
    if measured.comparison.examples < gate.min_examples:
        return f"{required}; the gate requires {gate.min_examples} examples or more"
    return f"{required}; smallest detectable difference {measured.comparison.detectable:.2g}"


def _facts(measured: MetricComparison) -> dict[str, Any]:
    return {"metric": measured.metric, "split": measured.split, **measured.comparison._asdict()}


def digits(scale: str) -> int:
    return DIGITS.get(scale, 3)


def as_json(verdict: Verdict) -> Mapping[str, Any]:
    return {"outcome": verdict.outcome, "sentence": verdict.sentence, **verdict.facts}
