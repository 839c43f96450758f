"""The pictures of the matrix: heat maps of expert x skill."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from eagle_moe.heatmap import LOWERED, RAISED
from eagle_moe.scores.card import Score
from eval.experts.differences import Parts, holds_zero
from eval.experts.matrix import Matrix
from eval.experts.measure import LOG_PROB
from eval.experts.words import UNITS, replaced, show
from eval.page import FAINT, INK, house_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

CELL = (1.05, 0.62)
"""Inches of a cell of a matrix."""


Panel = tuple[str, Mapping[str, Parts]]
"""Metric and rows of a heat map."""


def panels(matrix: Matrix) -> dict[str, Panel]:
    """Title -> heat map of silenced experts."""
    kinds = {"Leave one out": matrix.leave_one_out, "Only one": matrix.only_one}
    return {
        f"{kind}: {UNITS[metric]}": (metric, rows[metric])
        for metric in UNITS
        for kind, rows in kinds.items()
    }


def retrained_panels(matrix: Matrix) -> dict[str, Panel]:
    """Title -> heat map of models that were trained again, with the rows that there are."""
    return {
        f"Trained again without: {UNITS[metric]}": (
            metric,
            {name: again.lost[metric] for name, again in matrix.retrained.items()},
        )
        for metric in (UNITS if matrix.retrained else ())
    }


def panel_size(rows: Mapping[str, Parts]) -> tuple[float, float]:
    """Inches of a heat map."""
    columns = len(next(iter(rows.values())))
    return 1.1 + CELL[0] * columns, 0.6 + CELL[1] * len(rows)


def draw_matrix(axes: Axes, title: str, metric: str, rows: Mapping[str, Parts]) -> None:
    """Experts by skills: each cell a difference with its interval; orange where it is above zero.

    Colour goes with the root of the figure, so that small ones beside a large one are seen. Where
    the interval holds zero, figures are faint.
    """
    values = np.array([[score.value for score in parts.values()] for parts in rows.values()])
    top = max(float(np.abs(values).max()), 1e-9)
    shade = np.sign(values) * np.sqrt(np.abs(values) / top)
    axes.imshow(shade, cmap=_colours(), vmin=-1.25, vmax=1.25, aspect="auto")
    for row, parts in enumerate(rows.values()):
        for column, score in enumerate(parts.values()):
            _write(axes, column, row, metric, score)
    columns = list(next(iter(rows.values())))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    axes.set_title(title, pad=18)


def _write(axes: Axes, column: int, row: int, metric: str, score: Score) -> None:
    value, interval = show(metric, score)
    ink = FAINT if holds_zero(score) else INK
    axes.text(column, row - 0.12, value, ha="center", va="center", color=ink, weight="bold")
    axes.text(column, row + 0.24, interval, ha="center", va="center", color=ink, fontsize=7)


def _colours() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    ends = [tuple(part / 255 for part in colour) for colour in (LOWERED, RAISED)]
    return LinearSegmentedColormap.from_list("lowered-raised", [ends[0], (1, 1, 1), ends[1]])


def draw_poster(matrix: Matrix) -> bytes:
    """All heat maps as one PNG, with what is silenced said below them."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width, height = panel_size(matrix.leave_one_out[LOG_PROB])
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.03, hspace=0.06)
    with house_style():
        size = (2 * width, 2 * height + 0.9)
        figure = Figure(figsize=size, layout=layout, dpi=110, facecolor="white")
        for axes, (title, (metric, rows)) in zip(
            figure.subplots(2, 2).flat, panels(matrix).items(), strict=True
        ):
            draw_matrix(axes, title, metric, rows)
        caption = (
            f"An expert is silenced with {replaced(matrix)}. Below each figure its 95 % interval "
            "(paired bootstrap over questions); faint where it holds zero."
        )
        figure.supxlabel(caption, fontsize=9, color=FAINT, ha="left", x=0.01)
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()
