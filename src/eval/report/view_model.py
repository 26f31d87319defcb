"""What the report says of a run, taken from its files as they are: old ones lack what newer code writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src.errors import RunError
from src.eval.report.charts import Bars, number
from src.eval.report.examples import Split
from src.model.tasks import TASKS
from src.runs import FINISHED
from src.utils.files import read_json

File = Mapping[str, Any]
# outcome: its word, and the icon of the template
OUTCOMES = {
    "promoted": ("Promoted", "yes"),
    "not_better": ("Not better", "no"),
    "cannot_tell": ("Cannot tell", "unsure"),
    "not_judged": ("Not judged", "none"),
    "not_compared": ("Not compared", "none"),
}
SCALES = {"0-1": (1.0, 3), "0-100": (100.0, 1)}  # scale: its end, digits shown
SHOWN_AT_ONCE = 3  # examples, before those that a click shows
MOST_LISTED = 20  # rows left out, files, findings
LONGEST_CONFIG = 50_000  # characters


class Verdict(NamedTuple):
    outcome: str
    word: str
    icon: str
    sentence: str


class Gate(NamedTuple):
    """What decides, and what must not get worse meanwhile, in a sentence each with whether it holds."""

    metric: str
    split: str
    guards: list[tuple[bool, str]]


class Score(NamedTuple):
    """One metric on one split. `low` to `high`: the interval of the difference, where it is known."""

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
    def share(self) -> bool:
        """Whether it is a share of a whole, and goes on one axis with its like."""
        return self.scale in SCALES

    @property
    def digits(self) -> int | None:
        return SCALES[self.scale][1] if self.share else None

    @property
    def top(self) -> float:
        """Where the bars end."""
        if self.share:
            return SCALES[self.scale][0]
        return max((abs(v) for v in (self.base, self.tuned) if v is not None and math.isfinite(v)), default=1.0)

    @property
    def on_axis(self) -> tuple[float | None, float | None, float | None]:
        """Low end, difference and high end as shares of a scale that has an end; better lies to the right."""
        factor = (1 / self.top if self.share else 1.0) * (-1 if self.better == "lower" else 1)
        ends = [None if v is None else v * factor for v in (self.low, self.difference, self.high)]
        return (ends[0], ends[1], ends[2]) if factor > 0 else (ends[2], ends[1], ends[0])

    @property
    def tone(self) -> str:
        """`better` or `worse` where the interval lies on one side of 0 and the paired test agrees, `unclear` where
        not, `even` where both are equal, `unknown` without an interval, `neither` where no side is better."""
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


def verdict(status: str, manifest: File, result: File, comparison: File) -> Verdict:
    """What the comparison says; without one, why there is none and what makes it."""
    judged = comparison.get("verdict")
    if isinstance(judged, Mapping) and judged.get("outcome") in OUTCOMES:
        outcome, sentence = str(judged["outcome"]), str(judged.get("sentence", ""))
    elif comparison:
        outcome, sentence = (
            "not_judged",
            (
                "Base and tuned model were compared, but not by the gate's metric on the gate's split."
                if "verdict" in comparison
                else "Base and tuned model were compared without intervals, so chance cannot be told from effect. "
                "make eval compares them anew."
            ),
        )
    else:
        outcome, sentence = "not_compared", _why_not_compared(status, manifest, result)
    return Verdict(outcome, *OUTCOMES[outcome], sentence)


def _why_not_compared(status: str, manifest: File, result: File) -> str:
    if result.get("eval"):
        return "The tuned model was evaluated, its base was not. make eval-baseline does that, and compares."
    if status == FINISHED:
        return "The run has not been evaluated. make eval does that."
    reason = f": {manifest['error']}" if manifest.get("error") else ""
    return f"The run is {status}{reason}."


def gate_of(comparison: File, result: File, task: str) -> Gate:
    """The gate that judged, or the one that would."""
    judged = comparison.get("verdict")
    judged = judged if isinstance(judged, Mapping) else {}
    asked = judged.get("gate") or {}
    usual = TASKS[task].decides if task in TASKS else "rougeL"
    guards = [_guard(found, result) for found in judged.get("guards") or [] if found.get("difference") is not None]
    return Gate(str(asked.get("metric") or usual), str(asked.get("split") or "test"), guards)


def _guard(found: File, result: File) -> tuple[bool, str]:
    metric, difference, most = str(found.get("metric")), found["difference"], found.get("max_drop") or 0.0
    drop = difference if better(result, metric) == "lower" else -difference
    told = f"{metric} on {found.get('split')} changed by {number(float(f'{difference:.3g}'), sign=True)}"
    return drop <= most, f"{told}; it may get worse by {number(most)}"


def better(result: File, metric: str) -> str:
    """`higher`, `lower` or `neither`: which of two values is the better one."""
    return str(((result.get("metrics") or {}).get(metric) or {}).get("better", "higher"))


def scores(comparison: File, result: File) -> dict[str, list[Score]]:
    """`{split: [Score, ...]}` of the comparison; of the tuned model alone where there is none."""
    rows: Sequence[File] = comparison.get("rows") or [
        {"split": split, "metric": metric, "tuned": value}
        for split, values in (result.get("eval") or {}).items()
        for metric, value in values.items()
    ]
    about = result.get("metrics") or {}
    found: dict[str, list[Score]] = {}
    for row in rows:
        metric = str(row.get("metric"))
        scale = str(row.get("scale") or (about.get(metric) or {}).get("scale", ""))
        plain = {key: row.get(key) for key in Score._fields[3:-1]}
        way = str(row.get("better") or better(result, metric))
        found.setdefault(str(row.get("split")), []).append(
            Score(metric, scale, way, **plain, confidence=comparison.get("confidence") or 0.95)
        )
    return found


def decisive(found: Mapping[str, Sequence[Score]], gate: Gate) -> Score | None:
    """The row that the gate decides by."""
    return leading(found.get(gate.split, ()), gate.metric, strict=True)


def leading(rows: Sequence[Score], metric: str, strict: bool = False) -> Score | None:
    """The row of `metric`; where there is none and that is not `strict`, the first one."""
    return next((r for r in rows if r.metric == metric), None if strict else next(iter(rows), None))


def baseline(artifacts_dir: Path, result: File, comparison: File) -> Path | None:
    """The folder of the base model's answers to the very same prompts under the very same conditions, if any."""
    named = Path(str(comparison.get("baseline") or ""))
    if comparison.get("baseline") and (named / "metrics.json").is_file():
        return named
    for path in sorted(artifacts_dir.glob("metrics/*/metrics.json")):
        try:
            theirs = read_json(path)
            same = _revision(theirs) == _revision(result) and theirs["conditions"] == result["conditions"]
        except (RunError, KeyError, AttributeError):
            continue  # no result, or one that a report can do nothing with
        if same:
            return path.parent
    return None


def _revision(result: File) -> object:
    return (result.get("base_model") or {}).get("revision")


def told(name: str, points: Sequence[tuple[float, float]], extreme: str) -> str:
    """A curve in words: where it begins and ends, and its `lowest` or `highest` point."""
    (_, first), (last_step, last) = points[0], points[-1]
    step, most = (min if extreme == "lowest" else max)(points, key=lambda p: p[1])
    text = f"{name} {first:.3g} to {last:.3g} at step {last_step:g}"
    return text if most == last else f"{text}, {extreme} {most:.3g} at step {step:g}"


def answer_bars(split: Split) -> list[Bars]:
    """The rows of the histogram of a split's answers."""
    return [Bars(length.name, length.kind, length.values) for length in split.lengths]


def prompt_bars(split: Split) -> list[Bars]:
    return [Bars("prompts", "reference", split.prompts)]
