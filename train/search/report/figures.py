"""The pictures of a search: its rounds with the path that was taken, and score against cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval.page import FAINT, INK, RULE, show_large
from train.search.report.mixtures import (
    Scale,
    change_title,
    is_look_back,
    pareto_front,
    short_title,
)
from train.search.rounds import Candidate, Choice, Interval
from train.search.rules import named
from train.search.trial import Cost, Members

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATH = "#1d5fc4"
"""What was chosen. The verdicts below are apart from it, and from each other, in print too."""
VERDICTS = {
    "better": "#1d5fc4",
    "not distinguishable": "#7d838c",
    "worse": "#e07a2f",
    None: "#7d838c",
}
SLOT = 0.34
"""Inches from one candidate of a round to the next."""
LETTER = 0.024
"""Of a label, as a share of the picture's height."""
MOST_LABELS = 8
"""Points of a front that are named: more would stand in each other's way."""


@dataclass(frozen=True)
class Place:
    """A candidate at `x` (in slots) of the picture of rounds."""

    x: float
    candidate: Candidate
    label: str
    chosen: bool


def draw_rounds(axes: Axes, choice: Choice, scale: Scale) -> None:
    """Rounds from left to right, in each its candidates from the lowest to the highest score, with
    their intervals; and the path that was taken."""
    places, ticks, edges = _places(choice)
    for edge in edges:
        axes.axvline(edge, color=RULE, linewidth=0.8, zorder=0)
    path = [place for place in places if place.chosen]
    xs, ys = [p.x for p in path], [_mean(p.candidate, scale) for p in path]
    axes.plot(xs, ys, color=PATH, linewidth=2, alpha=0.35, zorder=1, solid_capstyle="round")
    for place in path:
        if place.candidate.members == choice.chosen:  # up to the end
            x, y = place.x, _mean(place.candidate, scale)
            axes.plot(x, y, "o", color=PATH, markersize=13, markerfacecolor="none", alpha=0.6)
            ends = [x, max(one.x for one in places)]
            axes.plot(ends, [y, y], color=PATH, linewidth=1.2, alpha=0.5, linestyle=":", zorder=1)
    for place in places:
        _draw_candidate(axes, place, scale)
    _leave_room(axes, places, scale)
    axes.set_xlim(-0.8, max(place.x for place in places) + 0.8)
    axes.set_xticks(list(ticks.values()), list(ticks))
    axes.set_ylabel(scale.heading("score"))
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def rounds_size(choice: Choice) -> tuple[float, float]:
    """Inches that `draw_rounds` needs."""
    places, _, _ = _places(choice)
    return max(4.5, 1.0 + SLOT * (places[-1].x + 1.6)), 3.6


def draw_ranking(axes: Axes, ranked: Sequence[Candidate], chosen: Members, scale: Scale) -> None:
    """Mixtures from the best to the worst, with intervals: for searches of one large round."""
    for row, candidate in enumerate(ranked):
        colour = PATH if candidate.members == chosen else VERDICTS[None]
        assert candidate.score is not None
        mean, low, high = _scaled(candidate.score, scale)
        axes.plot([low, high], [row, row], color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(mean, row, "o", color=colour, markersize=5)
    labels = [" + ".join(candidate.members) for candidate in ranked]
    axes.set_yticks(range(len(ranked)), labels)
    for label, candidate in zip(axes.get_yticklabels(), ranked, strict=True):
        label.set_fontweight("bold" if candidate.members == chosen else "normal")
    axes.invert_yaxis()
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(scale.heading("score"))


def draw_front(
    axes: Axes,
    mixtures: Sequence[Candidate],
    chosen: Members,
    base: Members,
    scale: Scale,
    cost: Callable[[Cost], float | None],
    title: str,
    less: bool = True,
) -> None:
    """Score against one cost: all mixtures, those on the Pareto front joined and named."""
    front = pareto_front(mixtures, cost, less)
    for each in mixtures:
        assert each.score is not None
        if (price := cost(each.cost)) is not None:
            mean, low, high = _scaled(each.score, scale)
            colour = PATH if each in front else VERDICTS[None]
            axes.plot([price, price], [low, high], color=colour, linewidth=1, alpha=0.35)
            filled = colour if each.members == chosen else "white"
            axes.plot(price, mean, "o", color=colour, markerfacecolor=filled, markersize=5.5)
    steps = [(cost(each.cost) or 0.0, _mean(each, scale)) for each in front]
    style = "steps-post" if less else "steps-pre"
    axes.plot(*zip(*steps, strict=True), color=PATH, linewidth=1.2, drawstyle=style, zorder=1)
    _name_points(axes, front, chosen, base, steps, less)
    axes.set_title(title)
    axes.margins(x=0.25, y=0.2)
    axes.xaxis.set_major_formatter(lambda value, _: show_large(value).strip())
    axes.locator_params(nbins=5)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _name_points(
    axes: Axes,
    front: Sequence[Candidate],
    chosen: Members,
    base: Members,
    points: Sequence[tuple[float, float]],
    less: bool,
) -> None:
    """Labels on the side of the front where no point can be, unless that is outside."""
    near = 0.1 * (max(y for _, y in points) - min(y for _, y in points))
    start, end = min(x for x, _ in points), max(x for x, _ in points)
    level = 0
    for at, (each, point) in enumerate(zip(front, points, strict=True)):
        if len(front) > MOST_LABELS and 0 < at < len(front) - 1:
            continue
        level = level + 1 if at and abs(point[1] - points[at - 1][1]) < near else 0
        cheap = (point[0] - start if less else end - point[0]) <= 0.3 * (end - start)
        towards = 1 if cheap == less else -1  # the middle of the picture
        axes.annotate(
            short_title(each.members, base),
            point,
            xytext=(5 * towards, -5 if cheap else 4 + 9 * level),
            textcoords="offset points",
            ha="left" if towards > 0 else "right",
            va="top" if cheap else "bottom",
            fontsize=7.5,
            fontweight="bold" if each.members == chosen else "normal",
            parse_math=False,
        )


def _places(choice: Choice) -> tuple[list[Place], dict[str, float], list[float]]:
    """Candidates and where they stand; the ticks' labels and places; lines between rounds."""
    places: list[Place] = []
    ticks: dict[str, float] = {}
    edges: list[float] = []
    x = 0.0
    first = choice.rounds[0].incumbent
    if first is not None and first.score is not None:
        label = named(first.members) if len(first.members) < 3 else f"{len(first.members)} experts"
        places.append(Place(x, first, label, True))
        ticks["start"] = x
        edges.append(x + 1)
        x += 2
    for each in choice.rounds:
        if is_look_back(choice, each):
            continue
        start = x
        for candidate in sorted(each.candidates, key=_rank):
            chosen = candidate.members == each.chosen
            places.append(
                Place(x, candidate, change_title(candidate.members, each.incumbent), chosen)
            )
            x += 1
        ticks[f"round {each.number}"] = (start + x - 1) / 2
        edges.append(x)
        x += 1
    return places, ticks, edges[:-1]


def _rank(candidate: Candidate) -> float:
    return -math.inf if candidate.score is None else candidate.score.mean


def _draw_candidate(axes: Axes, place: Place, scale: Scale) -> None:
    candidate = place.candidate
    if candidate.score is None:
        axes.text(
            place.x,
            0.02,
            f"{place.label} ({candidate.verdict or 'no score'})",
            transform=axes.get_xaxis_transform(),
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=7.5,
            color=FAINT,
            parse_math=False,
        )
        return
    colour = PATH if place.chosen else VERDICTS[candidate.verdict]
    mean, low, high = _scaled(candidate.score, scale)
    axes.plot([place.x] * 2, [low, high], color=colour, linewidth=1.4, alpha=0.6, zorder=2)
    filled = colour if place.chosen else "white"
    axes.plot(place.x, mean, "o", color=colour, markerfacecolor=filled, markersize=6.5, zorder=3)
    axes.annotate(
        place.label,
        (place.x, high if place.chosen else low),
        xytext=(0, 6 if place.chosen else -6),
        textcoords="offset points",
        rotation=90,
        ha="center",
        va="bottom" if place.chosen else "top",
        fontsize=8,
        color=INK if place.chosen else FAINT,
        fontweight="bold" if place.chosen else "normal",
        parse_math=False,
    )


def _leave_room(axes: Axes, places: Sequence[Place], scale: Scale) -> None:
    """Limits with space for the labels, above what was chosen and below the rest."""
    ends = [_scaled(p.candidate.score, scale) for p in places if p.candidate.score is not None]
    lowest, highest = min(each[1] for each in ends), max(each[2] for each in ends)
    above, below = (
        max((len(p.label) for p in places if p.chosen == chosen), default=0) * LETTER + LETTER
        for chosen in (True, False)
    )
    span = ((highest - lowest) or 1.0) / (1 - above - below)
    axes.set_ylim(lowest - below * span, highest + above * span)
    if scale.unit:  # no share is below 0 or above 100 %, though a label may be
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= scale.factor])
        axes.set_ylim(lowest - below * span, highest + above * span)


def _mean(candidate: Candidate, scale: Scale) -> float:
    assert candidate.score is not None
    return scale.factor * candidate.score.mean


def _scaled(interval: Interval, scale: Scale) -> tuple[float, float, float]:
    """Mean, low and high; the last two are the mean where nothing is known of noise."""
    low = interval.mean if interval.low is None else interval.low
    high = interval.mean if interval.high is None else interval.high
    return scale.factor * interval.mean, scale.factor * low, scale.factor * high
