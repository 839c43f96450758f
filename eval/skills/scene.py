"""A scene: an image, what it shows cell by cell, and questions with one right answer each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SIZE = 64
"""Pixels per side of a scene."""
CELL = 8
"""Pixels per side of a transcript cell."""
GRID = SIZE // CELL

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (31, 90, 200),
    "yellow": (235, 200, 20),
    "purple": (140, 60, 170),
    "orange": (255, 127, 14),
}
SHAPES = ("circle", "square", "triangle", "cross")
BLANK = "."
GLYPHS = "abcdefghijklmnopqrstuvwxyz0123456789"
FIGURES = (*SHAPES, "bar")


def figure_symbol(colour: str, figure: str) -> str:
    """The transcript symbol of a coloured figure, such as `[red:bar]`."""
    return f"[{colour}:{figure}]"


SYMBOLS: tuple[str, ...] = (
    BLANK,
    *GLYPHS,
    *(figure_symbol(c, f) for c in COLOURS for f in FIGURES),
)
"""Every transcript symbol; a symbol's index is its class in dense pretext tasks."""


@dataclass(frozen=True)
class Question:
    """`kind` groups questions with the same range of answers (chance is measured per kind)."""

    kind: str
    question: str
    answer: str


@dataclass
class Scene:
    """One picture of one skill.

    - `image`: (64,64,3) uint8 RGB.
    - `cells`: 64 transcript symbols, row by row: what has its centre in the cell, like a picture
      drawn with characters; of a bar, its top.
    - `mask`: (64,64) bool, the pixels that belong to something drawn.
    - `caption`: a short description in words.
    """

    skill: str
    image: np.ndarray
    cells: list[str]
    mask: np.ndarray
    caption: str
    questions: list[Question] = field(default_factory=list)

    @property
    def transcript(self) -> str:
        return "".join(self.cells)
