"""What the report says of a run, taken from its files as they are: old ones lack what newer code writes."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from src.config import SCHEMAS, flat_keys
from src.eval.report_charts import Bars
from src.eval.report_pairs import Split
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
READ_FIRST = ("torch", "transformers", "peft", "tokenizers", "accelerate", "bitsandbytes", "sacrebleu")


class Verdict(NamedTuple):
    outcome: str
    word: str
    icon: str
    sentence: str


class Gate(NamedTuple):
    """What decides; `asked` is the gate as the comparison keeps it, empty in an old one."""

    metric: str
    split: str
    asked: Mapping[str, Any]


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
        """`better` or `worse` where the interval lies on one side of 0, `unclear` where it does not, `even` where
        both are equal, `unknown` without an interval, `neither` where no side is the better one."""
        low, middle, high = self.on_axis
        if self.better == "neither" or middle is None:
            return "neither"
        if low is None or high is None:
            return "unknown" if middle else "even"
        return "better" if low > 0 else "worse" if high < 0 else "unclear" if middle or low != high else "even"


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


def gate_of(comparison: File, task: str) -> Gate:
    """The gate that judged, or the one that would."""
    judged = comparison.get("verdict")
    asked = judged.get("gate") if isinstance(judged, Mapping) else None
    asked = asked if isinstance(asked, Mapping) else {}
    usual = TASKS[task].decides if task in TASKS else "rougeL"
    return Gate(str(asked.get("metric") or usual), str(asked.get("split") or "test"), asked)


def better(result: File, metric: str) -> str:
    """`higher`, `lower` or `neither`: which of two values is the better one."""
    return str((result.get("metrics") or {}).get(metric, {}).get("better", "higher"))


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
        scale = str(row.get("scale") or about.get(metric, {}).get("scale", ""))
        plain = {key: row.get(key) for key in Score._fields[3:]}
        way = str(row.get("better") or better(result, metric))
        found.setdefault(str(row.get("split")), []).append(Score(metric, scale, way, **plain))
    return found


def decisive(found: Mapping[str, Sequence[Score]], gate: Gate) -> Score | None:
    """The row that the gate decides by."""
    return leading(found.get(gate.split, ()), gate.metric, strict=True)


def leading(rows: Sequence[Score], metric: str, strict: bool = False) -> Score | None:
    """The row of `metric`; where there is none and that is not `strict`, the first one."""
    return next((r for r in rows if r.metric == metric), None if strict else next(iter(rows), None))


def baseline(artifacts_dir: Path, result: File) -> Path | None:
    """The folder of the base model's answers to the very same prompts under the very same conditions, if any."""
    if not result.get("eval"):
        return None
    for path in sorted(artifacts_dir.glob("metrics/*/metrics.json")):
        try:
            theirs = read_json(path)
        except Exception:
            continue
        same = _revision(theirs) == _revision(result)
        if same and theirs.get("conditions") == result.get("conditions"):
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


class Setting(NamedTuple):
    key: str
    value: str
    default: str


def settings(text: str) -> dict[str, Any]:
    """The configuration as it was written, and those of its settings that differ from the defaults."""
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError:
        values = {}
    schema = SCHEMAS["eval" if "max_new_tokens" in values and "lr" not in values else "train"]
    defaults = {key: value for key, (value, _) in flat_keys(schema).items()}
    changed = [
        Setting(key, _plain(value), _plain(defaults[key]))
        for key, value in _flat(values)
        if key in defaults and value != defaults[key]
    ]
    return {"text": text, "changed": changed}


def _flat(values: object, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        return []
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else []
        found += inner or [(f"{prefix}{key}", value)]
    return found


def _plain(value: object) -> str:
    if isinstance(value, list) and any(not isinstance(v, str | int | float) for v in value):
        return f"{len(value)} entries"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def lineage(manifest: File, result: File) -> list[tuple[str, str, bool]]:
    """`(what, value, whether it is code)`, of what is known."""
    code, evaluation = manifest.get("code") or {}, manifest.get("evaluation") or {}
    base = manifest.get("base_model") or result.get("base_model") or {}
    precision, packages = manifest.get("precision") or {}, manifest.get("packages") or {}
    dirty = ", with changes that are not committed" if code.get("diff_sha256") else ""
    reason = f" ({precision['reason']})" if precision.get("reason") else ""
    rows = [
        ("Command", _command(manifest), True),
        ("Evaluated by", _command(evaluation), True),
        ("Code", f"{code['commit']}{dirty}" if code.get("commit") else "", True),
        ("Base model", base.get("name"), True),
        ("Its revision", base.get("revision"), True),
        ("Method", manifest.get("method"), False),
        ("Task", manifest.get("task"), False),
        ("Seed", manifest.get("seed"), False),
        ("Precision", f"{precision['value']}{reason}" if precision.get("value") else "", False),
        ("Hardware", _hardware(manifest.get("hardware") or {}), False),
        ("Processes", manifest.get("processes"), False),
        ("Started", manifest.get("started"), False),
        ("Took", took(manifest), False),
        ("Taken up again", f"{len(manifest['attempts'])} times" if manifest.get("attempts") else "", False),
        ("Versions", ", ".join(f"{name} {packages[name]}" for name in READ_FIRST if name in packages), False),
    ]
    return [(what, str(value), is_code) for what, value, is_code in rows if value not in {None, ""}]


def _hardware(known: File) -> str:
    gpus = [str(g.get("name", g) if isinstance(g, Mapping) else g) for g in known.get("gpus") or []]
    cpu = f"{known.get('cores', '?')} cores of {known['cpu']}" if known.get("cpu") else ""
    memory = f"{known['memory_gib']} GiB" if known.get("memory_gib") else ""
    python = f"Python {known['python']}" if known.get("python") else ""
    return ", ".join(filter(None, [*gpus, cpu, memory, str(known.get("platform") or ""), python]))


def _command(record: File) -> str:
    words = record.get("command") or []
    return shlex.join(str(word) for word in words) if isinstance(words, list) else str(words)


def took(record: File) -> str:
    """How long it took, from `started` to `ended`."""
    try:
        began, ended = (datetime.fromisoformat(str(record[key])) for key in ("started", "ended"))
    except (KeyError, ValueError):
        return ""
    seconds = int((ended - began).total_seconds())
    hours, minutes = divmod(seconds // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def files(manifest: File, result: File) -> list[dict[str, Any]]:
    """The files that were trained on, and those that were asked, with their hashes."""
    trained = [
        {"file": f.get("file"), "use": "training", "rows": f.get("rows_trained"), "sha256": f.get("sha256")}
        for f in (manifest.get("data") or {}).get("files") or []
    ]
    asked = (result.get("conditions") or {}).get("data") or {}
    return trained + [
        {"file": f"{split}.jsonl", "use": "evaluation", "rows": None, "sha256": digest}
        for split, digest in asked.items()
    ]


def answer_bars(split: Split) -> list[Bars]:
    """The rows of the histogram of a split's answers."""
    return [Bars(length.name, length.kind, length.values) for length in split.lengths]


def prompt_bars(split: Split) -> list[Bars]:
    return [Bars("prompts", "reference", split.prompts)]
