"""Read a chart: three or four coloured bars, their heights from rows of real tables."""

from __future__ import annotations

import numpy as np

from eval.skills import content
from eval.skills.draw import Painter
from eval.skills.scene import CELL, COLOURS, GRID, SIZE, Question, Scene, figure_symbol

PITCH = 2 * CELL
BAR_WIDTH = 10


def make(rng: np.random.Generator, split: content.Split, paint: bool = True) -> Scene:
    painter = Painter(rng, split, paint)
    rows = content.bar_rows(split)
    values = rows[int(rng.integers(len(rows)))]
    colours = [str(c) for c in rng.permutation(list(COLOURS))[: len(values)]]
    lift = int(rng.integers(0, 3))
    first = int(rng.integers(0, 4 - len(values) + 1))
    for index, (value, colour) in enumerate(zip(values, colours, strict=True)):
        _paint_bar(painter, first + index, value, colour, lift)
    painter.stamp(np.ones((1, SIZE), dtype=np.float32), (SIZE / 2, SIZE - 0.5), painter.ink())
    caption = "chart " + " ".join(f"{c} {v}" for c, v in zip(colours, values, strict=True))
    questions = [
        Question("value", f"how high is {colour}", str(value))
        for colour, value in zip(colours, values, strict=True)
    ]
    questions.append(Question("bar", "which bar is highest", colours[values.index(max(values))]))
    questions.append(Question("bar", "which bar is lowest", colours[values.index(min(values))]))
    return Scene("chart", painter.finish(), painter.cells, painter.mask, caption, questions)


def _paint_bar(painter: Painter, column: int, value: int, colour: str, lift: int) -> None:
    """A bar of `value` cells' height, `lift` pixels above the floor, transcribed where it ends."""
    height = value * CELL
    x = CELL / 2 + PITCH * column + 1
    alpha = np.ones((height, BAR_WIDTH), dtype=np.float32)
    painter.figure(alpha, (x, SIZE - lift - height / 2), COLOURS[colour])
    painter.cells[(GRID - value) * GRID + int(x) // CELL] = figure_symbol(colour, "bar")
