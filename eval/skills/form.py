"""Read a form: three ruled rows, always a, b and c, each with a two-digit number."""

from __future__ import annotations

import numpy as np

from eval.skills import content
from eval.skills.draw import Painter
from eval.skills.scene import SIZE, Question, Scene
from eval.skills.text import PITCH, paint_line, random_face

FIELDS = "abc"
TOP = 8
"""Pixel row at which the first field begins."""
FONT_SIZES = (16, 17, 18)


def make(rng: np.random.Generator, split: content.Split, paint: bool = True) -> Scene:
    painter = Painter(rng, split, paint)
    values = rng.permutation(content.numbers(split))[: len(FIELDS)]
    face = random_face(painter, FONT_SIZES)
    line = painter.ink()
    across, down = (np.full(size, 0.5, dtype=np.float32) for size in ((1, SIZE), (SIZE, 1)))
    painter.stamp(down, (PITCH - 1.5, SIZE / 2), line)
    for index, (name, value) in enumerate(zip(FIELDS, values, strict=True)):
        top = TOP + PITCH * index
        painter.stamp(across, (SIZE / 2, top + PITCH - 0.5), line)
        paint_line(painter, f"{name}{value}", top + float(rng.integers(6, 8)), face)
    caption = "form " + " ".join(f"{n} {v}" for n, v in zip(FIELDS, values, strict=True))
    questions = [
        Question("field", f"what is {name}", str(value))
        for name, value in zip(FIELDS, values, strict=True)
    ]
    return Scene("form", painter.finish(), painter.cells, painter.mask, caption, questions)
