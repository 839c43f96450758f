"""Recognise handwriting: two digits by real writers, side by side."""

from __future__ import annotations

import numpy as np

from eval.skills import content
from eval.skills.draw import Painter, enlarge
from eval.skills.scene import CELL, Question, Scene

CENTRES = (20, 44)
"""Pixel centres of the two digits; a jitter of 3 keeps them in their cells."""
SIZES = (24, 26, 28)


def make(rng: np.random.Generator, split: content.Split) -> Scene:
    painter = Painter(rng)
    images, labels = content.digits(split)
    digits = []
    for x in CENTRES:
        index = int(rng.integers(len(labels)))
        row = int(rng.integers(2, 6))
        centre = (x + float(rng.integers(-3, 4)), CELL * row + 4 + float(rng.integers(-3, 4)))
        alpha = enlarge(images[index], int(rng.choice(SIZES)))
        digits.append(str(labels[index]))
        painter.stamp(alpha, centre, painter.ink(), digits[-1])
    questions = [
        Question("digit", f"what is the digit on the {side}", digit)
        for side, digit in zip(("left", "right"), digits, strict=True)
    ]
    caption = "written " + " ".join(digits)
    return Scene("handwriting", painter.finish(), painter.cells, painter.mask, caption, questions)
