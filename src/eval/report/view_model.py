"""The values that the report shows, from the files of a run. Files of older versions lack some keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import RunError
from ...model.tasks import TASKS
from ...runs import FINISHED
from ...utils.files import read_json
from .charts import HistogramRow, number
from .examples import SplitView

File = Mapping[str, Any]
# outcome: its heading, and the icon in the template
OUTCOMES = {
    "promoted": ("Promoted", "yes"),
    "not_better": ("Not better", "no"),
    "cannot_tell": ("Inconclusive", "unsure"),
    "not_judged": ("Not judged", "none"),
    "not_compared": ("Not compared", "none"),
}
SCALES = {"0-1": (1.0, 3), "0-100": (100.0, 1)}  # scale: its maximum, decimals shown
SHOWN_AT_ONCE = 3  # examples that are not folded
MAX_LISTED = 20  # rejected rows, files, findings
MAX_CONFIG = 50_000  # characters


class VerdictView(NamedTuple):
    """`word` is the heading, `icon` a name in the template."""

    outcome: str
    word: str
    icon: str
    sentence: str


class GateView(NamedTuple):
    """The metric and split that decide, and for each guard whether it holds and a sentence."""

    metric: str
    split: str
    guards: list[tuple[bool, str]]


class ScoreView(NamedTuple):
    """One metric on one split. `low` to `high`: the interval of the difference, if it is known."""

    metric: str
    scale: str
    better: str
    base: float | None
    tuned: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    examples: int | None
    detectable: float | None
    confidence: float

    @property
    def bounded(self) -> bool:
        """Whether the scale has a maximum. Bounded scores share an axis."""
        return self.scale in SCALES

    @property
    def digits(self) -> int | None:
        return SCALES[self.scale][1] if self.bounded else None

    @property
    def top(self) -> float:
        """The value of a full bar: the maximum of the scale, or the larger score."""
        if self.bounded:
            return SCALES[self.scale][0]
        return max((abs(v) for v in (self.base, self.tuned) if v is not None and math.isfinite(v)), default=1.0)

    @property
    def on_axis(self) -> tuple[float | None, float | None, float | None]:
        """Low end, difference and high end, as fractions of a bounded scale; better is always larger."""
        factor = (1 / self.top if self.bounded else 1.0) * (-1 if self.better == "lower" else 1)
        ends = [None if v is None else v * factor for v in (self.low, self.difference, self.high)]
        return (ends[0], ends[1], ends[2]) if factor > 0 else (ends[2], ends[1], ends[0])

    @property
    def tone(self) -> str:
        """`better` or `worse` if the interval excludes 0 and the paired test agrees, else `unclear`.

        `even` without a difference, `unknown` without an interval, `neither` if no direction is better.
        """
        low, middle, high = self.on_axis
        if self.better == "neither" or middle is None:
            return "neither"
        if low is None or high is None:
            return "unknown" if middle else "even"
        if self.p_value is not None and self.p_value > 1 - self.confidence:
            return "unclear" if middle else "even"
        return "better" if low > 0 else "worse" if high < 0 else "unclear" if middle else "even"


READINGS = {
    "better": "better",
    "worse": "worse",
    "unclear": "no clear difference",
    "even": "no difference",
    "unknown": "no interval",
    "neither": "neither better nor worse",
}


def verdict(status: str, manifest: File, result: File, comparison: File) -> VerdictView:
    """The verdict of the comparison; without a comparison, why there is none and the command that makes it."""
    judged = comparison.get("verdict")
    if isinstance(judged, Mapping) and judged.get("outcome") in OUTCOMES:
        outcome = str(judged["outcome"])
        sentence = "; ".join([str(judged.get("sentence", "")), *judged.get("notes", [])])
    elif comparison:
        outcome, sentence = (
            "not_judged",
            (
                _why_no_verdict(comparison)
                if "verdict" in comparison
                else "Base and tuned model were compared without intervals, so it is not known whether the "
                "difference is due to chance. make eval compares them again."
            ),
        )
    else:
        outcome, sentence = "not_compared", _why_not_compared(status, manifest, result)
    return VerdictView(outcome, *OUTCOMES[outcome], sentence)


def _why_no_verdict(comparison: File) -> str:
    why = comparison.get("no_verdict") or {}
    if not why:
        return "Base and tuned model were compared, but not by the gate's metric on the gate's split."
    text = f"{why.get('reason')}; {why.get('hint')}."
    return text[0].upper() + text[1:]


def _why_not_compared(status: str, manifest: File, result: File) -> str:
    if result.get("eval"):
        return "The tuned model was evaluated, but its base was not. make eval-baseline evaluates and compares it."
    if status == FINISHED:
        return "The run has not been evaluated. make eval evaluates it."
    reason = f": {manifest['error']}" if manifest.get("error") else ""
    return f"The run is {status}{reason}."


def gate_view(comparison: File, result: File, task: str) -> GateView:
    """The gate of the verdict, or the default gate of the task."""
    judged = comparison.get("verdict")
    judged = judged if isinstance(judged, Mapping) else {}
    settings = judged.get("gate") or {}
    default = TASKS[task].gate_metric if task in TASKS else "rougeL"
    guards = [_guard(found, result) for found in judged.get("guards") or [] if found.get("difference") is not None]
    return GateView(str(settings.get("metric") or default), str(settings.get("split") or "test"), guards)


def _guard(found: File, result: File) -> tuple[bool, str]:
    metric, difference, allowed = str(found.get("metric")), found["difference"], found.get("max_drop") or 0.0
    drop = difference if better(result, metric) == "lower" else -difference
    change = f"{metric} on {found.get('split')} changed by {number(float(f'{difference:.3g}'), sign=True)}"
    return drop <= allowed, f"{change}; it may get worse by {number(allowed)}"


def better(result: File, metric: str) -> str:
    """Which values of the metric are better: `higher`, `lower` or `neither`."""
    return str(((result.get("metrics") or {}).get(metric) or {}).get("better", "higher"))


def scores(comparison: File, result: File) -> dict[str, list[ScoreView]]:
    """`{split: [ScoreView, ...]}` of the comparison; without one, of the tuned model only."""
    rows: Sequence[File] = comparison.get("rows") or [
        {"split": split, "metric": metric, "tuned": value}
        for split, values in (result.get("eval") or {}).items()
        for metric, value in values.items()
    ]
    metrics = result.get("metrics") or {}
    found: dict[str, list[ScoreView]] = {}
    for row in rows:
        metric = str(row.get("metric"))
        scale = str(row.get("scale") or (metrics.get(metric) or {}).get("scale", ""))
        values = {key: row.get(key) for key in ScoreView._fields[3:-1]}
        direction = str(row.get("better") or better(result, metric))
        found.setdefault(str(row.get("split")), []).append(
            ScoreView(metric, scale, direction, **values, confidence=comparison.get("confidence") or 0.95)
        )
    return found


def decisive(found: Mapping[str, Sequence[ScoreView]], gate: GateView) -> ScoreView | None:
    """The score that the gate decides by; None if there is none."""
    return leading(found.get(gate.split, ()), gate.metric, strict=True)


def leading(rows: Sequence[ScoreView], metric: str, strict: bool = False) -> ScoreView | None:
    """The score of `metric`; if there is none, the first score, or None if `strict`."""
    return next((r for r in rows if r.metric == metric), None if strict else next(iter(rows), None))


def baseline(artifacts_dir: Path, result: File, comparison: File) -> Path | None:
    """The folder of the base model's predictions under the same conditions; None if there is none."""
    named = Path(str(comparison.get("baseline") or ""))
    if comparison.get("baseline") and (named / "metrics.json").is_file():
        return named
    for path in sorted(artifacts_dir.glob("metrics/*/metrics.json")):
        try:
            base = read_json(path)
            same = _revision(base) == _revision(result) and base["conditions"] == result["conditions"]
        except (RunError, KeyError, AttributeError):
            continue  # not the result of an evaluation
        if same:
            return path.parent
    return None


def _revision(result: File) -> object:
    return (result.get("base_model") or {}).get("revision")


def describe_curve(name: str, points: Sequence[tuple[float, float]], extreme: str) -> str:
    """A sentence about `(step, value)` points: first and last value, and the `lowest` or `highest` one."""
    (_, first), (last_step, last) = points[0], points[-1]
    step, peak = (min if extreme == "lowest" else max)(points, key=lambda p: p[1])
    text = f"{name} {first:.3g} to {last:.3g} at step {last_step:g}"
    return text if peak == last else f"{text}, {extreme} {peak:.3g} at step {step:g}"


def length_rows(split: SplitView) -> list[HistogramRow]:
    """The histogram rows of the lengths of references and predictions."""
    return [HistogramRow(length.name, length.kind, length.values) for length in split.lengths]


def prompt_rows(split: SplitView) -> list[HistogramRow]:
    return [HistogramRow("prompts", "reference", split.prompts)]
