"""Recognise handwriting: four digits by real writers, one in each quarter."""

from __future__ import annotations

import numpy as np

from eval.skills import content
from eval.skills.draw import Painter, enlarge
from eval.skills.scene import Question, Scene

CENTRES = {
    "top left": (12, 12),
    "top right": (44, 12),
    "bottom left": (12, 44),
    "bottom right": (44, 44),
}
"""Pixel centres (x, y); they wander by 3 within their transcript cell, and all move together."""
SIZES = (22, 24, 26)


def make(rng: np.random.Generator, split: content.Split, paint: bool = True) -> Scene:
    painter = Painter(rng, split, paint)
    images, labels = content.digits(split)
    shift_x, shift_y = 8 * rng.integers(0, 2, size=2)
    digits = {}
    for place, (x, y) in CENTRES.items():
        index = int(rng.integers(len(labels)))
        jitter_x, jitter_y = rng.integers(-3, 4, size=2)
        centre = (float(x + shift_x + jitter_x), float(y + shift_y + jitter_y))
        digits[place] = str(labels[index])
        alpha = enlarge(images[index], int(rng.choice(SIZES)))
        painter.stamp(alpha, centre, painter.ink(), digits[place])
    questions = [Question("digit", f"what is {place}", digit) for place, digit in digits.items()]
    caption = "written " + " ".join(digits.values())
    return Scene("handwriting", painter.finish(), painter.cells, painter.mask, caption, questions)
