"""How a scene is drawn: plainly, as fine-tuning data is, or as varied as the world.

What an expert saw in its own task is wide, and so is the test; what the mixture learns from is
nearly all plain. Only an expert that knows the wide world by itself can carry the mixture there:
that is what experts with large pretraining sets bring, and what the suite measures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from eval.skills.content import Split
from eval.skills.scene import SIZE

WIDE_SHARE: dict[Split, float] = {"pretext": 1.0, "train": 0.05, "test": 1.0}
"""Share of scenes that are drawn widely. A few in training show which expert to trust there."""
FONTS = (
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "cmtt10.ttf",
)
"""Monospaced fonts that matplotlib bundles; the first is the plain one."""
FILLS = ("solid", "diagonals", "stripes", "checks", "outline")
"""Of figures; the first is the plain one."""
GROUNDS = ("even", "slope", "grid", "blots")
"""What is behind; the first is the plain one."""
SHADE, TINT = (0.7, 1.05), 20
"""A wide colour is a palette colour times a shade, each channel moved by at most the tint."""
OUTLINE = 5
"""Pixels of the square that eats a figure away to leave its outline: two on each side."""


@dataclass(frozen=True)
class Style:
    """Fonts to choose from, the fill of figures, the ground, and whether colours vary."""

    fonts: tuple[str, ...]
    fill: str
    ground: str
    shaded: bool


PLAIN = Style(FONTS[:1], FILLS[0], GROUNDS[0], False)


def choose_style(rng: np.random.Generator, split: Split) -> Style:
    """`PLAIN`, or a wide style, by the share that `split` has of them."""
    if rng.random() >= WIDE_SHARE[split]:
        return PLAIN
    return Style(FONTS, str(rng.choice(FILLS)), str(rng.choice(GROUNDS)), True)


def shade(
    rng: np.random.Generator, style: Style, colour: np.ndarray | tuple[int, int, int]
) -> np.ndarray:
    """`colour` (3,), or one near it where colours vary."""
    plain = np.asarray(colour, dtype=np.float32)
    if not style.shaded:
        return plain
    return plain * np.float32(rng.uniform(*SHADE)) + rng.integers(-TINT, TINT + 1, size=3)


def fill(name: str, coverage: np.ndarray) -> np.ndarray:
    """What a fill leaves of a figure's `coverage` (h,w) in 0..1."""
    y, x = np.mgrid[: coverage.shape[0], : coverage.shape[1]]
    if name == "diagonals":
        return coverage * ((x + y) // 2 % 2 == 0)
    if name == "stripes":
        return coverage * (y // 2 % 2 == 0)
    if name == "checks":
        return coverage * ((x // 3 + y // 3) % 2 == 0)
    if name == "outline":
        edge = OUTLINE // 2
        figure = Image.fromarray(np.pad((coverage > 0.5).astype(np.uint8) * 255, edge))
        inside = np.asarray(figure.filter(ImageFilter.MinFilter(OUTLINE)))[edge:-edge, edge:-edge]
        return coverage * (inside == 0)
    return coverage


def ground(name: str, rng: np.random.Generator) -> np.ndarray:
    """Light on the paper (64,64,1) in 0..1: even, falling off, ruled, or blotted."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    light = np.ones((SIZE, SIZE))
    if name == "slope":
        angle, centre = rng.uniform(0, 2 * np.pi), SIZE / 2
        ramp = np.cos(angle) * (x - centre) + np.sin(angle) * (y - centre)
        light = 0.8 + 0.2 * ramp / (centre * np.sqrt(2))
    elif name == "grid":
        pitch, start = int(rng.integers(5, 9)), int(rng.integers(0, 8))
        light -= 0.3 * (((x + start) % pitch < 1) | ((y + start) % pitch < 1))
    elif name == "blots":
        spots = rng.uniform(0.6, 1, size=(9, 9))
        picture = Image.fromarray((spots * 255).astype(np.uint8))
        large = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        light = np.asarray(large) / 255
    return light[..., None].astype(np.float32)
