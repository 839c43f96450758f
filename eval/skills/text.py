"""Read text: two words of three or four letters, one above the other."""

from __future__ import annotations

import numpy as np

from eval.skills import content
from eval.skills.draw import Painter, glyph
from eval.skills.scene import CELL, Question, Scene

PITCH = 2 * CELL
"""Pixels from letter to letter."""
FONT_SIZES = (18, 19, 20, 21)
LINES = {"top": 16, "bottom": 46}
"""Pixel centres of the two lines; they wander up and down by 7."""


def paint_line(painter: Painter, text: str, y: float, face: tuple[str, int]) -> None:
    """Paint `text` from the left, its characters `PITCH` apart and clear of cell edges; `y` is the
    line's centre."""
    colour = painter.ink()
    left = float(painter.rng.integers(5, 8))
    for index, character in enumerate(text):
        painter.stamp(glyph(*face, character), (left + PITCH * index, y), colour, character)


def random_face(painter: Painter, sizes: tuple[int, ...] = FONT_SIZES) -> tuple[str, int]:
    """A font of the painter's style, and one of `sizes`."""
    return str(painter.rng.choice(painter.style.fonts)), int(painter.rng.choice(sizes))


def make(rng: np.random.Generator, split: content.Split, paint: bool = True) -> Scene:
    painter = Painter(rng, split, paint)
    words = {}
    for line, centre in LINES.items():
        words[line] = _word(rng, split)
        y = centre + float(rng.integers(-7, 8))
        paint_line(painter, words[line], y, random_face(painter))
    questions = [Question("word", f"what is the {line} word", word) for line, word in words.items()]
    caption = "text " + " ".join(words.values())
    return Scene("text", painter.finish(), painter.cells, painter.mask, caption, questions)


def _word(rng: np.random.Generator, split: content.Split) -> str:
    word = str(rng.choice(content.words(split)))
    if split != "test" and rng.random() < 0.5:
        # random letters too, so that spelling cannot be guessed from a known beginning
        return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=len(word)))
    return word
