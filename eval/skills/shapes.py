"""Count, name and locate shapes: one to four coloured shapes, one in each quarter at most."""

from __future__ import annotations

from collections import Counter

import numpy as np

from eval.skills import content
from eval.skills.draw import Painter, shape
from eval.skills.scene import COLOURS, SHAPES, Question, Scene, figure_symbol

CENTRES = {
    "top left": (18, 18),
    "top right": (46, 18),
    "bottom left": (18, 46),
    "bottom right": (46, 46),
}
"""Pixel centres (x, y); they wander by 5."""
SIZES = (17, 18, 19, 20, 21)


def make(rng: np.random.Generator, split: content.Split, paint: bool = True) -> Scene:
    painter = Painter(rng, split, paint)
    places = [str(place) for place in rng.permutation(list(CENTRES))[: int(rng.integers(1, 5))]]
    items = []
    for place in places:
        name, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        x, y = CENTRES[place]
        centre = (x + float(rng.integers(-5, 6)), y + float(rng.integers(-5, 6)))
        alpha = shape(name, int(rng.choice(SIZES)))
        painter.figure(alpha, centre, COLOURS[colour], figure_symbol(colour, name))
        items.append((name, colour, place))
    caption = "shapes " + " ".join(f"{c} {n} {p}" for n, c, p in items)
    questions = _questions(items)
    return Scene("shapes", painter.finish(), painter.cells, painter.mask, caption, questions)


def _questions(items: list[tuple[str, str, str]]) -> list[Question]:
    """Every question that has exactly one answer."""
    figures = Counter((name, colour) for name, colour, _ in items)
    questions = [Question("count", "how many shapes", str(len(items)))]
    for name, colour, place in items:
        questions.append(Question("colour", f"what color is {place}", colour))
        questions.append(Question("shape", f"what shape is {place}", name))
        if figures[name, colour] == 1:
            questions.append(Question("place", f"where is the {colour} {name}", place))
    return questions
