"""Numbers as people read them: counts, durations, sizes and rates."""

from __future__ import annotations


def count(number: int, singular: str, plural: str = "") -> str:
    """`1 row`, `2 rows`, `1,234 rows`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def format_duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, part, smaller in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            large, rest = divmod(whole, size)
            return f"{large} {unit}" + (f" {rest // part} {smaller}" if rest // part else "")
    return f"{whole} s"


def format_size(size: float) -> str:
    """`512 bytes`, `14.2 MB`, `1.2 GB`, in the decimal unit that fits."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 100 * unit else f"{size / unit:,.0f} {name}"
    return count(int(size), "byte")


def format_rate(rate: float) -> str:
    """`22,520`, `412`, `3.1`: a number per second without its unit."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
