"""Numbers as people read them."""

from __future__ import annotations

_LARGE = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def show_seconds(seconds: float) -> str:
    """`0.4 s`, `48 s`, `1 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 1:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def show_large(count: float) -> str:
    """Three digits and a letter: `15.4 T`, `2.28 G`, `910`; the unit follows it."""
    for letter, size in _LARGE:
        if count >= 0.9995 * size:
            return f"{_three(count / size)} {letter}"
    return f"{_three(count)} "


def show_bytes(count: float) -> str:
    """Decimal, as disks are sold: `15.7 MB`, `8.78 TB`."""
    return f"{show_large(count)}B"


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
