"""How often searches are right where the truth is known: the rules side by side.

    python -m train.search.noise [--worlds 100] [--picture docs/images/search-noise.png]

Prints the tables of docs/search-rules.md and draws its picture; a few minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from train.search.contest import (
    AWARE,
    BOUGHT,
    DEFAULT,
    FIXED,
    LEVELS,
    PLAIN,
    claims,
    column,
    experiment,
    overall,
)
from train.search.scores import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PIPED = 120
"""Columns where there is no terminal."""


def mean_of(values: Floats) -> tuple[float, float]:
    """Mean and half of its 95 % interval."""
    return float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))


def outcome_table(
    title: str, found: Mapping[str, Mapping[str, Floats]], ways: Sequence[str]
) -> Table:
    """A line per family: first way -> second, and the lead of the second, paired by world."""
    first, second = ways
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    headings = ("right, %", "lead", "wrong stops, %", "lead", "too early", "too late")
    for heading in ("", *headings, "loss, points", "trials"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for family, values in {**found, "all": overall(found)}.items():
        a, b = values[first], values[second]
        cells = []
        for name in ("right", "wrong_stop"):
            lead, half = mean_of(column(b, name) - column(a, name))
            cells += [_both(a, b, name, 100), f"{100 * lead:+.0f} ± {100 * half:.0f}"]
        cells += [_both(a, b, name, 100) for name in ("early", "late")]
        cells += [_both(a, b, name, 1, 2 if name == "loss" else 1) for name in ("loss", "trials")]
        table.add_row(family, *cells, style="bold" if family == "all" else "")
    return table


def _both(first: Floats, second: Floats, name: str, factor: float, digits: int = 0) -> str:
    means = (factor * float(column(values, name).mean()) for values in (first, second))
    return " -> ".join(f"{mean:.{digits}f}" for mean in means)


def level_table(found: Mapping[str, Mapping[str, Floats]]) -> Table:
    """All families together, at every level."""
    table = Table(title="by level, all families", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("", "right, %", "wrong stops, %", "too early", "too late", "loss, points"):
        table.add_column(heading, justify="right" if heading else "left")
    for way, values in overall(found).items():
        shares = [
            100 * float(column(values, name).mean())
            for name in ("right", "wrong_stop", "early", "late")
        ]
        loss = float(column(values, "loss").mean())
        table.add_row(way, *(f"{share:.0f}" for share in shares), f"{loss:.2f}")
    return table


def claim_table(claimed: Floats) -> Table:
    """How often mixtures are better of which that was said with a probability."""
    table = Table(title="said to be better", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("with, %", "times", "is better, %"):
        table.add_column(heading, justify="right")
    for low in range(0, 100, 10):
        inside = claimed[(100 * claimed[:, 0] // 10).clip(max=9) == low // 10, 1]
        share = f"{100 * inside.mean():.0f}" if len(inside) else ""
        table.add_row(f"{low} to {low + 10}", str(len(inside)), share)
    return table


def draw(found: Mapping[str, Mapping[str, Floats]], path: Path) -> None:
    """Right choices and wrong stops by family, and both against the level, as a PNG."""
    from matplotlib.figure import Figure

    from eval.page import house_style

    with house_style():
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        right, wrong, levels = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
        _draw_families(right, found, "right", "right choices, %")
        _draw_families(wrong, found, "wrong_stop", "wrong stops, %")
        wrong.set_yticklabels([])
        _draw_levels(levels, overall(found))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})


COLOURS = {PLAIN: "#e07a2f", AWARE: "#1d5fc4"}


def _draw_families(
    axes: Axes, found: Mapping[str, Mapping[str, Floats]], name: str, title: str
) -> None:
    rows = {**found, "all": overall(found)}
    for shift, (way, colour) in zip(
        (-0.13, 0.13), zip((PLAIN, DEFAULT), COLOURS.values(), strict=True), strict=True
    ):
        for row, values in enumerate(rows.values()):
            mean, half = mean_of(100 * column(values[way], name))
            ends = [max(mean - half, 0), min(mean + half, 100)]
            axes.plot(ends, [row + shift] * 2, color=colour, linewidth=1.4)
            label = way.split()[0].replace("_", "-") if row == 0 else None
            axes.plot(mean, row + shift, "o", color=colour, markersize=5, label=label)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="x", linewidth=0.6, alpha=0.5)
    axes.set_title(title)
    if name == "right":
        axes.legend(frameon=False, loc="lower right")


def _draw_levels(axes: Axes, values: Mapping[str, Floats]) -> None:
    lines = {"right": "-", "wrong_stop": "--"}
    for name, style in lines.items():
        means = [100 * float(column(values[f"{AWARE} {level}"], name).mean()) for level in LEVELS]
        title = {"right": "right choices", "wrong_stop": "wrong stops"}[name]
        axes.plot(LEVELS, means, style, marker="o", markersize=4, color=COLOURS[AWARE], label=title)
        plain = 100 * float(column(values[PLAIN], name).mean())
        axes.axhline(plain, linestyle=style, linewidth=1.2, color=COLOURS[PLAIN])
    axes.set_ylim(0, 100)
    axes.set_xlabel("level of noise-aware (orange: plain)")
    axes.grid(axis="y", linewidth=0.6, alpha=0.5)
    axes.set_title("all families, %")
    axes.legend(frameon=False, loc="upper right")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.search.noise", description="Rules in searches whose truth is known."
    )
    parser.add_argument("--worlds", type=int, default=100, help="of every family")
    parser.add_argument("--first", type=int, default=0, help="number of the first world")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    told = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED)
    fixed = experiment(told.worlds, FIXED, told.first, told.workers)
    console.print(outcome_table(f"one run each: {PLAIN} -> {DEFAULT}", fixed, (PLAIN, DEFAULT)))
    console.print(level_table(fixed))
    console.print(claim_table(claims(told.worlds, told.first, told.workers)))
    bought = experiment(told.worlds, BOUGHT, told.first, told.workers)
    console.print(outcome_table(" -> ".join(BOUGHT), bought, tuple(BOUGHT)))
    if told.picture is not None:
        draw(fixed, told.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
