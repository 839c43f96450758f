"""Read a form: three rows, each a letter and a two-digit number."""

from __future__ import annotations

import numpy as np

from eval.skills import content
from eval.skills.draw import Painter
from eval.skills.scene import CELL, SIZE, Question, Scene
from eval.skills.text import paint_line, random_style, start_of

FIELDS = "abcdefgh"
ROWS = 3
LENGTH = 4
"""Characters per row: the field's letter, a gap, two digits."""


def make(rng: np.random.Generator, split: content.Split) -> Scene:
    painter = Painter(rng)
    fields = rng.permutation(list(FIELDS))[:ROWS]
    values = rng.permutation(content.numbers(split))[:ROWS]
    style = random_style(rng)
    x = start_of(rng, LENGTH)
    first = int(rng.integers(1, 3))
    ruler = np.full((1, SIZE), 0.5, dtype=np.float32)
    for index, (name, value) in enumerate(zip(fields, values, strict=True)):
        y = CELL * (first + 2 * index) + 4
        painter.stamp(ruler, (SIZE / 2, y + CELL), painter.ink())
        paint_line(painter, f"{name} {value}", x, y + float(rng.integers(-1, 2)), style)
    caption = "form " + " ".join(f"{n} {v}" for n, v in zip(fields, values, strict=True))
    questions = [
        Question("field", f"what is the value of {name}", str(value))
        for name, value in zip(fields, values, strict=True)
    ]
    return Scene("form", painter.finish(), painter.cells, painter.mask, caption, questions)
