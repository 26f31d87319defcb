"""The charts of the report: inline SVG without scripts, with positions in percent of the width.

An SVG without a viewBox keeps text, lines and dots at their size on every screen; only the line of a curve is in a
stretched SVG. Colours are CSS classes, which page.css defines for light and dark mode. The page also says in words
what a chart shows, so most charts are hidden from screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

Point = tuple[float, float]
MAX_POINTS = 500  # of a curve: about the columns of a screen
MAX_BINS = 24


class AxisRange(NamedTuple):
    """The ends of an axis."""

    low: float
    high: float

    def percent(self, value: float) -> float:
        """The position of `value` in percent of the axis; values outside are clipped to its ends."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)


class PlotLine(NamedTuple):
    """One curve; `kind` is its CSS class."""

    name: str
    kind: str
    points: list[Point]


class HistogramRow(NamedTuple):
    """One row of a histogram; `kind` is its CSS class."""

    name: str
    kind: str
    values: Sequence[int]


def bar(value: float | None, top: float, kind: str) -> Markup:
    """A horizontal bar from 0 to `value` on a track from 0 to `top`."""
    width = AxisRange(0, top).percent(value) if value is not None and math.isfinite(value) and top > 0 else 0
    return Markup(
        '<svg class="bar" aria-hidden="true"><rect class="track" width="100%" height="100%" rx="3"/>'
        '<rect class="{}" width="{}%" height="100%" rx="3"/></svg>'
    ).format(kind, width)


def interval(low: float | None, middle: float, high: float | None, span: AxisRange, tone: str) -> Markup:
    """A difference as a dot, its interval as a line through the dot, and a vertical line at 0.

    The dot is hollow if the interval contains 0 or is not known.
    """
    zero = Markup('<line class="zero" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(span.percent(0))
    drawn = Markup("")
    if low is not None and high is not None:
        a, b = span.percent(low), span.percent(high)
        drawn = Markup(
            '<line class="range" x1="{a}%" x2="{b}%" y1="50%" y2="50%"/>'
            '<line class="range" x1="{a}%" x2="{a}%" y1="30%" y2="70%"/>'
            '<line class="range" x1="{b}%" x2="{b}%" y1="30%" y2="70%"/>'
        ).format(a=a, b=b)
    dot = Markup('<circle cx="{}%" cy="50%" r="4.5"/>').format(span.percent(middle))
    return Markup('<svg class="interval {}" aria-hidden="true">{}{}{}</svg>').format(tone, zero, drawn, dot)


def axis(span: AxisRange, unit: str = "") -> Markup:
    """The signed tick labels below intervals, 0 included."""
    marks = [
        Markup('<span style="left:{}%">{}</span>').format(span.percent(t), number(t, sign=True) + unit)
        for t in ticks(span, 4)
    ]
    return Markup('<div class="ticks" aria-hidden="true">{}</div>').format(Markup("").join(marks))


def axis_with_zero(values: Iterable[float | None]) -> AxisRange:
    """An axis that includes 0 and all `values`, with a margin for a dot at either end."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    low, high = min([0.0, *known]), max([0.0, *known])
    margin = (high - low or 1.0) * 0.12
    return AxisRange(low - margin, high + margin)


def stacked_bar(parts: Sequence[tuple[str, int]]) -> Markup:
    """Counts, given as `(CSS class, count)`, side by side in one bar."""
    total = sum(count for _, count in parts) or 1
    drawn, start = [], 0.0
    for kind, count in parts:
        width = 100 * count / total
        drawn.append(
            Markup('<rect class="{}" x="{}%" width="{}%" height="100%"/>').format(
                kind, round(start, 2), round(width, 2)
            )
        )
        start += width
    return Markup('<svg class="shares" aria-hidden="true">{}</svg>').format(Markup("").join(drawn))


def line_chart(lines: Sequence[PlotLine], label: str) -> Markup:
    """Curves over training steps; `label` describes them to a screen reader."""
    shown = [line._replace(points=downsample(line.points)) for line in lines]
    points = [p for line in shown for p in line.points]
    across = AxisRange(0, 1.015 * max(1.0, *(x for x, _ in points)))  # a margin for the last dot
    up = _padded([y for _, y in points])
    drawn = Markup("").join(_line(line, across, up) for line in shown)
    return _plot(drawn, across, up, label)


def _line(line: PlotLine, across: AxisRange, up: AxisRange) -> Markup:
    positions = [(across.percent(x), round(100 - up.percent(y), 2)) for x, y in line.points]
    path = Markup(
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">'
        '<polyline class="{}" points="{}"/></svg>'
    ).format(line.kind, " ".join(f"{x},{y}" for x, y in positions))
    if len(positions) > 40 or (line.kind == "train" and len(positions) > 1):
        return path
    dots = [
        Markup('<circle class="{}" cx="{}%" cy="{}%" r="3"><title>step {}: {}</title></circle>').format(
            line.kind, x, y, number(step), number(value)
        )
        for (x, y), (step, value) in zip(positions, line.points, strict=True)
    ]
    return path + Markup("").join(dots)


def _plot(drawn: Markup, across: AxisRange, up: AxisRange, label: str) -> Markup:
    levels = [(t, round(100 - up.percent(t), 2)) for t in ticks(up, 4)]
    grid = [Markup('<line class="grid" x1="0" x2="100%" y1="{0}%" y2="{0}%"/>').format(y) for _, y in levels]
    beside = [Markup('<span style="top:{}%">{}</span>').format(y, number(t)) for t, y in levels]
    below = [
        Markup('<span style="left:{}%">{}</span>').format(across.percent(t), number(t)) for t in ticks(across, 5)
    ]
    return Markup(
        '<div class="plot" role="img" aria-label="{}"><div class="y-labels">{}</div>'
        '<svg class="area">{}{}</svg><div class="ticks">{}</div></div>'
    ).format(label, Markup("").join(beside), Markup("").join(grid), drawn, Markup("").join(below))


def histogram(rows: Sequence[HistogramRow], label: str) -> Markup:
    """Histograms above one another on one axis; a line marks the median of each."""
    edges, open_ended = bins([value for row in rows for value in row.values])
    counted = [(row, _counts(row.values, edges)) for row in rows]
    across = AxisRange(edges[0], edges[-1])
    drawn = []
    for row, counts in counted:
        top = max(max(counts), 1)
        bars = [
            Markup('<rect class="{}" x="{}%" y="{}%" width="{}%" height="{}%"><title>{}</title></rect>').format(
                row.kind,
                across.percent(a),
                round(100 - 92 * count / top, 2),
                round(across.percent(b) - across.percent(a), 2),
                round(92 * count / top, 2),
                f"{a:g} to {b - 1:g}: {count:,}",
            )
            for a, b, count in zip(edges, edges[1:], counts, strict=False)
            if count
        ]
        middle = median(row.values)
        mark = Markup('<line class="median" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(across.percent(middle))
        drawn.append(
            Markup(
                '<div class="heading"><b>{}</b> <span>median {}</span></div><svg class="area low">{}{}</svg>'
            ).format(row.name, f"{middle:g}", Markup("").join(bars), mark)
        )
    labels = [
        Markup('<span style="left:{}%">{}</span>').format(
            across.percent(t), number(t) + ("+" if open_ended and t == edges[-1] else "")
        )
        for t in ticks(across, 5)
    ]
    return Markup('<div class="histogram" role="img" aria-label="{}">{}<div class="ticks">{}</div></div>').format(
        label, Markup("").join(drawn), Markup("").join(labels)
    )


def bins(values: Sequence[int]) -> tuple[list[int], bool]:
    """Edges of at most MAX_BINS bins of a round width, and whether the last bin is open-ended.

    It is open-ended if the longest 1 % of the values would take more than half of the axis.
    """
    ordered = sorted(values)
    longest, p99 = ordered[-1], ordered[math.ceil(0.99 * len(ordered)) - 1]
    open_ended = longest > 2 * p99 + 10
    top = (p99 if open_ended else longest) + 1
    width = next(w for e in range(12) for f in (1, 2, 5) if (w := f * 10**e) * MAX_BINS >= top)
    return [width * n for n in range(math.ceil(top / width) + 1)], open_ended


def _counts(values: Iterable[int], edges: Sequence[int]) -> list[int]:
    width, last = edges[1] - edges[0], len(edges) - 2
    found = [0] * (last + 1)
    for value in values:
        found[min(value // width, last)] += 1
    return found


def percentile_strip(at: dict[str, int]) -> Markup:
    """A strip from the minimum to the maximum row length, with a mark at each known percentile."""
    across = AxisRange(0, max(at["max"], 1) * 1.02)
    positions = {name: across.percent(value) for name, value in at.items() if isinstance(value, int)}
    start = positions.get("min", 0.0)
    marks = [Markup('<line x1="{0}%" x2="{0}%" y1="15%" y2="85%"/>').format(x) for x in positions.values()]
    return Markup(
        '<svg class="percentiles" aria-hidden="true"><line class="zero" x1="0" x2="100%" y1="50%" y2="50%"/>'
        '<rect x="{}%" width="{}%" y="32%" height="36%" rx="3"/>{}</svg>'
    ).format(start, round(positions.get("p90", positions["max"]) - start, 2), Markup("").join(marks))


def median(values: Sequence[int]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return float(ordered[half]) if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def downsample(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS of the points: the lowest and highest of each segment, so that no peak is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    segments = MAX_POINTS // 2
    kept: list[Point] = []
    for n in range(segments):
        part = points[n * len(points) // segments : (n + 1) * len(points) // segments]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def ticks(span: AxisRange, wanted: int) -> list[float]:
    """Round numbers on the axis, at least about `wanted` of them."""
    raw = (span.high - span.low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(f * size for f in (1, 2, 5, 10) if f * size >= raw * 0.999)
    first, last = math.ceil(span.low / step - 1e-9), math.floor(span.high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _padded(values: Sequence[float]) -> AxisRange:
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return AxisRange(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)


def number(value: float | None, digits: int | None = None, sign: bool = False) -> str:
    """Format a number with `digits` decimals, or with four significant digits; the minus is U+2212."""
    if value is None or not math.isfinite(value):
        return "n/a"
    value = 0.0 if abs(value) < 1e-12 else value  # rounding error of a sum that should be 0
    text = f"{abs(value):,.{digits}f}" if digits is not None else _short(abs(value))
    prefix = "−" if value < 0 and text.strip("0.,") else "+" if sign and text.strip("0.,") else ""  # noqa: RUF001
    return prefix + text


def count(value: object) -> str:
    """Format an integer with thousands separators."""
    return f"{value:,}" if isinstance(value, int) else "n/a"


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
