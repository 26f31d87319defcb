"""The charts of the report: small inline SVG without script, whose places are shares of its width.

An SVG without a viewBox keeps its text, lines and dots at their true size however wide the screen is; only the
line of a curve lies in a stretched one. Colours are classes that page.css gives a value, light and dark.
What a chart shows also stands beside it in words, so most of them are hidden from screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

Point = tuple[float, float]
MOST_POINTS = 500  # of a curve: more than a screen has columns for
MOST_BINS = 24


class Span(NamedTuple):
    """The ends of an axis."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """Where `value` lies, in percent of the axis; what lies outside is at its end."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)


class Line(NamedTuple):
    """One curve: `kind` is its class, and says how it is drawn."""

    name: str
    kind: str
    points: list[Point]


class Bars(NamedTuple):
    """One row of a histogram."""

    name: str
    kind: str
    values: Sequence[int]


def bar(value: float | None, top: float, kind: str) -> Markup:
    """A horizontal bar from 0 to `value` on a track that ends at `top`."""
    width = Span(0, top).place(value) if value is not None and math.isfinite(value) and top > 0 else 0
    return Markup(
        '<svg class="bar" aria-hidden="true"><rect class="track" width="100%" height="100%" rx="3"/>'
        '<rect class="{}" width="{}%" height="100%" rx="3"/></svg>'
    ).format(kind, width)


def interval(low: float | None, middle: float, high: float | None, span: Span, tone: str) -> Markup:
    """A difference as a dot, its interval as a line through it, and the line of no difference.

    The dot is hollow where the interval contains 0, or is not known.
    """
    zero = Markup('<line class="zero" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(span.place(0))
    drawn = Markup("")
    if low is not None and high is not None:
        a, b = span.place(low), span.place(high)
        drawn = Markup(
            '<line class="range" x1="{a}%" x2="{b}%" y1="50%" y2="50%"/>'
            '<line class="range" x1="{a}%" x2="{a}%" y1="30%" y2="70%"/>'
            '<line class="range" x1="{b}%" x2="{b}%" y1="30%" y2="70%"/>'
        ).format(a=a, b=b)
    dot = Markup('<circle cx="{}%" cy="50%" r="4.5"/>').format(span.place(middle))
    return Markup('<svg class="interval {}" aria-hidden="true">{}{}{}</svg>').format(tone, zero, drawn, dot)


def axis(span: Span, unit: str = "") -> Markup:
    """The numbers under intervals, signed, with 0 among them."""
    marks = [
        Markup('<span style="left:{}%">{}</span>').format(span.place(t), number(t, sign=True) + unit)
        for t in ticks(span, 4)
    ]
    return Markup('<div class="ticks" aria-hidden="true">{}</div>').format(Markup("").join(marks))


def around(values: Iterable[float | None]) -> Span:
    """An axis with 0 and all `values` on it, and room for a dot at either end."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    low, high = min([0.0, *known]), max([0.0, *known])
    room = (high - low or 1.0) * 0.12
    return Span(low - room, high + room)


def shares(parts: Sequence[tuple[str, int]]) -> Markup:
    """Counts side by side in one bar, as `(class, count)`."""
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


def curve(lines: Sequence[Line], said: str) -> Markup:
    """Curves over the steps of a training; `said` tells them to a screen reader."""
    shown = [line._replace(points=thinned(line.points)) for line in lines]
    everything = [p for line in shown for p in line.points]
    across = Span(0, 1.015 * max(1.0, *(x for x, _ in everything)))  # room for the last dot
    up = _roomy([y for _, y in everything])
    drawn = Markup("").join(_line(line, across, up) for line in shown)
    return _plot(drawn, across, up, said)


def _line(line: Line, across: Span, up: Span) -> Markup:
    places = [(across.place(x), round(100 - up.place(y), 2)) for x, y in line.points]
    path = Markup(
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">'
        '<polyline class="{}" points="{}"/></svg>'
    ).format(line.kind, " ".join(f"{x},{y}" for x, y in places))
    if len(places) > 40 or (line.kind == "train" and len(places) > 1):
        return path
    dots = [
        Markup('<circle class="{}" cx="{}%" cy="{}%" r="3"><title>step {}: {}</title></circle>').format(
            line.kind, x, y, number(step), number(value)
        )
        for (x, y), (step, value) in zip(places, line.points, strict=True)
    ]
    return path + Markup("").join(dots)


def _plot(drawn: Markup, across: Span, up: Span, said: str) -> Markup:
    levels = [(t, round(100 - up.place(t), 2)) for t in ticks(up, 4)]
    grid = [Markup('<line class="grid" x1="0" x2="100%" y1="{0}%" y2="{0}%"/>').format(y) for _, y in levels]
    beside = [Markup('<span style="top:{}%">{}</span>').format(y, number(t)) for t, y in levels]
    below = [
        Markup('<span style="left:{}%">{}</span>').format(across.place(t), number(t)) for t in ticks(across, 5)
    ]
    return Markup(
        '<div class="plot" role="img" aria-label="{}"><div class="beside">{}</div>'
        '<svg class="area">{}{}</svg><div class="ticks">{}</div></div>'
    ).format(said, Markup("").join(beside), Markup("").join(grid), drawn, Markup("").join(below))


def histogram(rows: Sequence[Bars], said: str) -> Markup:
    """Rows of bars above one another on one axis; a line marks the median of each."""
    edges, beyond = bins([value for row in rows for value in row.values])
    counted = [(row, _counts(row.values, edges)) for row in rows]
    across = Span(edges[0], edges[-1])
    drawn = []
    for row, counts in counted:
        top = max(max(counts), 1)
        bars = [
            Markup('<rect class="{}" x="{}%" y="{}%" width="{}%" height="{}%"><title>{}</title></rect>').format(
                row.kind,
                across.place(a),
                round(100 - 92 * count / top, 2),
                round(across.place(b) - across.place(a), 2),
                round(92 * count / top, 2),
                f"{a:g} to {b - 1:g}: {count:,}",
            )
            for a, b, count in zip(edges, edges[1:], counts, strict=False)
            if count
        ]
        middle = median(row.values)
        mark = Markup('<line class="median" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(across.place(middle))
        drawn.append(
            Markup(
                '<div class="heading"><b>{}</b> <span>median {}</span></div><svg class="area low">{}{}</svg>'
            ).format(row.name, f"{middle:g}", Markup("").join(bars), mark)
        )
    labels = [
        Markup('<span style="left:{}%">{}</span>').format(
            across.place(t), number(t) + ("+" if beyond and t == edges[-1] else "")
        )
        for t in ticks(across, 5)
    ]
    return Markup('<div class="histogram" role="img" aria-label="{}">{}<div class="ticks">{}</div></div>').format(
        said, Markup("").join(drawn), Markup("").join(labels)
    )


def bins(values: Sequence[int]) -> tuple[list[int], bool]:
    """Edges of at most MOST_BINS bins of a round width, and whether the last one holds all that is longer.

    It does where the longest hundredth would take up half of the axis.
    """
    ordered = sorted(values)
    most, nearly = ordered[-1], ordered[math.ceil(0.99 * len(ordered)) - 1]
    beyond = most > 2 * nearly + 10
    top = (nearly if beyond else most) + 1
    width = next(w for e in range(12) for f in (1, 2, 5) if (w := f * 10**e) * MOST_BINS >= top)
    return [width * n for n in range(math.ceil(top / width) + 1)], beyond


def _counts(values: Iterable[int], edges: Sequence[int]) -> list[int]:
    width, last = edges[1] - edges[0], len(edges) - 2
    found = [0] * (last + 1)
    for value in values:
        found[min(value // width, last)] += 1
    return found


def percentiles(at: dict[str, int]) -> Markup:
    """A row's length from the shortest to the longest, with a mark at each percentile that is known."""
    across = Span(0, max(at["max"], 1) * 1.02)
    places = {name: across.place(value) for name, value in at.items() if isinstance(value, int)}
    start = places.get("min", 0.0)
    marks = [Markup('<line x1="{0}%" x2="{0}%" y1="15%" y2="85%"/>').format(x) for x in places.values()]
    return Markup(
        '<svg class="percentiles" aria-hidden="true"><line class="zero" x1="0" x2="100%" y1="50%" y2="50%"/>'
        '<rect x="{}%" width="{}%" y="32%" height="36%" rx="3"/>{}</svg>'
    ).format(start, round(places.get("p90", places["max"]) - start, 2), Markup("").join(marks))


def median(values: Sequence[int]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return float(ordered[half]) if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS of the points, in order: the lowest and highest of each stretch, so no peak is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretches = MOST_POINTS // 2
    kept: list[Point] = []
    for n in range(stretches):
        part = points[n * len(points) // stretches : (n + 1) * len(points) // stretches]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def ticks(span: Span, wanted: int) -> list[float]:
    """Round numbers on the axis, `wanted` of them or a few more."""
    raw = (span.high - span.low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(f * size for f in (1, 2, 5, 10) if f * size >= raw * 0.999)
    first, last = math.ceil(span.low / step - 1e-9), math.floor(span.high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _roomy(values: Sequence[float]) -> Span:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Span(max(0.0, low - room) if low >= 0 else low - room, high + room)


def number(value: float | None, digits: int | None = None, sign: bool = False) -> str:
    """A number for people: `digits` after the point, or four that count; a true minus."""
    if value is None or not math.isfinite(value):
        return "n/a"
    value = 0.0 if abs(value) < 1e-12 else value  # what is left of a sum that should be nothing
    text = f"{abs(value):,.{digits}f}" if digits is not None else _short(abs(value))
    before = "−" if value < 0 and text.strip("0.,") else "+" if sign and text.strip("0.,") else ""  # noqa: RUF001
    return before + text


def count(value: object) -> str:
    """A whole number for people."""
    return f"{value:,}" if isinstance(value, int) else "n/a"


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
