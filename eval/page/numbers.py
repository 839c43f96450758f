"""Numbers as people read them."""

from __future__ import annotations


def show_seconds(seconds: float) -> str:
    """`48 s`, `1 min 05 s`."""
    whole = round(seconds)
    if whole < 1:
        return f"{seconds:.1f} s"
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
