"""Count, name and locate shapes: one to five coloured shapes on a 3x3 board."""

from __future__ import annotations

from collections import Counter

import numpy as np

from eval.skills import content
from eval.skills.draw import Painter, shape
from eval.skills.scene import COLOURS, SHAPES, Question, Scene, figure_symbol

CENTRES = (12, 35, 52)
"""Pixel centres of the board's rows and columns: clear of cell edges under a jitter of 2."""
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
SIZES = (13, 14, 15, 16)
MAX_SHAPES = 5


def make(rng: np.random.Generator, split: content.Split, paint: bool = True) -> Scene:
    painter = Painter(rng, paint)
    items = []
    for spot in rng.permutation(9)[: int(rng.integers(1, MAX_SHAPES + 1))]:
        row, column = divmod(int(spot), 3)
        name, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        centre = (
            CENTRES[column] + float(rng.integers(-2, 3)),
            CENTRES[row] + float(rng.integers(-2, 3)),
        )
        alpha = shape(name, int(rng.choice(SIZES)))
        painter.stamp(alpha, centre, COLOURS[colour], figure_symbol(colour, name))
        items.append((name, colour, PLACES[row][column]))
    caption = "shapes " + " ".join(f"{c} {n} {p}" for n, c, p in items)
    questions = _questions(items)
    return Scene("shapes", painter.finish(), painter.cells, painter.mask, caption, questions)


def _questions(items: list[tuple[str, str, str]]) -> list[Question]:
    """Every question that has exactly one answer."""
    names = Counter(name for name, _, _ in items)
    colours = Counter(colour for _, colour, _ in items)
    both = Counter((name, colour) for name, colour, _ in items)
    questions = [Question("count", "how many shapes", str(len(items)))]
    for name, colour, place in items:
        if both[name, colour] == 1:
            questions.append(Question("place", f"where is the {colour} {name}", place))
        if names[name] == 1:
            questions.append(Question("colour", f"what color is the {name}", colour))
        if colours[colour] == 1:
            questions.append(Question("shape", f"what shape is {colour}", name))
    return questions
