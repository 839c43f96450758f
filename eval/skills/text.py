"""Read text: a word of three or four letters."""

from __future__ import annotations

import numpy as np

from eval.skills import content
from eval.skills.draw import FONTS, Painter, glyph
from eval.skills.scene import CELL, SIZE, Question, Scene

PITCH = 12
"""Pixels from letter to letter. With starts at multiples of 4, no centre falls on a cell's edge."""
FONT_SIZES = (15, 16, 17)


def paint_line(painter: Painter, text: str, x: float, y: float, style: tuple[str, int]) -> None:
    """Paint `text` with its first character's centre at (x, y), a fixed pitch apart; a space
    leaves a gap."""
    colour = painter.ink()
    for index, character in enumerate(text):
        if character != " ":
            painter.stamp(glyph(*style, character), (x + PITCH * index, y), colour, character)


def random_style(rng: np.random.Generator) -> tuple[str, int]:
    """A font and a size."""
    return str(rng.choice(FONTS)), int(rng.choice(FONT_SIZES))


def start_of(rng: np.random.Generator, length: int) -> float:
    """A random x for the first of `length` characters, clear of cell edges by a pixel."""
    steps = (SIZE - PITCH * length) // 4
    return 6 + 4 * int(rng.integers(0, steps + 1)) + float(rng.integers(-1, 2))


def make(rng: np.random.Generator, split: content.Split) -> Scene:
    painter = Painter(rng)
    word = str(rng.choice(content.words(split)))
    if split == "train" and rng.random() < 0.5:
        # random letters too, so that spelling cannot be guessed from a known beginning
        word = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=len(word)))
    row = int(rng.integers(1, 7))
    y = CELL * row + 4 + float(rng.integers(-2, 3))
    paint_line(painter, word, start_of(rng, len(word)), y, random_style(rng))
    questions = [Question("word", "what is the text", word)]
    return Scene("text", painter.finish(), painter.cells, painter.mask, f"text {word}", questions)
