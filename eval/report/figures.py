"""The panels of the demo's page, drawn on matplotlib axes: used alike by the page and the PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from eagle_moe.scores.score import Estimate
from eval.page import FAINT, INK, RULE, show_seconds
from eval.report.results import MODELS, CurvePoint, Probe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "mixture": "#1d5fc4",
    "clip_only": "#e07a2f",
    "clip_best": "#f3b98b",
    "blind": "#7d838c",
    "chance": "#c3c7cd",
}
"""Blue, orange and greys: apart for colour-blind readers, and in print."""


def draw_accuracy(axes: Axes, title: str, scores: Mapping[str, Estimate]) -> None:
    """One bar per model with its 95 % interval, the first on top."""
    names = list(scores)
    rows = range(len(names))
    means = [100 * scores[name].mean for name in names]
    ends = [
        [100 * (scores[name].mean - scores[name].low) for name in names],
        [100 * (scores[name].high - scores[name].mean) for name in names],
    ]
    axes.barh(rows, means, height=0.72, color=[COLOURS[name] for name in names])
    axes.errorbar(means, rows, xerr=ends, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    for row, score in enumerate(scores.values()):
        axes.text(100 * score.high + 2.5, row, f"{100 * score.mean:.0f} %", va="center")
    axes.set_yticks(rows, [MODELS[name].replace(", ", ",\n") for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 121)  # room for the number beside a full bar
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(title)


def draw_curves(
    axes: Axes, title: str, curves: Mapping[str, Sequence[CurvePoint]], chance: float
) -> None:
    """Exact match against training steps, one line per model, with chance as a dashed line."""
    axes.axhline(100 * chance, color=COLOURS["chance"], linestyle="--", linewidth=1.2)
    for name, points in curves.items():
        ordered = sorted(points, key=lambda point: point.step)
        steps = [point.step for point in ordered]
        shares = [100 * point.exact_match for point in ordered]
        axes.plot(steps, shares, color=COLOURS[name], marker="o", markersize=3, linewidth=1.8)
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 50, 100], ["0", "50", "100 %"])
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_xlabel("training steps")
    axes.set_title(title)


def draw_seconds(axes: Axes, seconds: Mapping[str, float]) -> None:
    """One bar per step of the demo, in order."""
    names = list(seconds)
    axes.barh(range(len(names)), list(seconds.values()), height=0.66, color=COLOURS["mixture"])
    longest = max(seconds.values())
    for index, value in enumerate(seconds.values()):
        axes.text(value + 0.015 * longest, index, show_seconds(value), va="center", color=FAINT)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * longest)
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)


def draw_probe(axes: Axes, probe: Probe) -> None:
    """Experts by what can be read from their features, each cell with its number."""
    values = list(probe.rows.values())
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            ink = "white" if value > 0.55 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(probe.columns)), probe.columns)
    axes.set_yticks(range(len(probe.rows)), list(probe.rows))
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
