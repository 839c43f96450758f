"""A small paint box: glyphs, rectangles, shapes and handwriting on a 64-pixel square.

Whatever is painted is also entered in the mask, and, where a symbol is given, in the transcript
cell that holds its centre.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.skills.content import Split
from eval.skills.scene import BLANK, CELL, GRID, SIZE
from eval.skills.style import choose_style, fill, ground, shade

OVERSAMPLE = 4
"""Shapes are drawn this many times larger and scaled down, for smooth edges."""


class Painter:
    """Paints on paper of a random light colour, in a style of the split; noise is added at the end.

    With `paint=False` only the transcript is made, many times faster; it is the same, but what is
    drawn from `rng` afterwards is not.
    """

    def __init__(self, rng: np.random.Generator, split: Split, paint: bool = True) -> None:
        self.rng = rng
        self.paint = paint
        self.style = choose_style(rng, split)
        paper = rng.integers(205, 256) + rng.integers(-12, 1, size=3)
        self.pixels = np.full((SIZE, SIZE, 3), paper, dtype=np.float32)
        self.pixels *= ground(self.style.ground, rng)
        self.mask = np.zeros((SIZE, SIZE), dtype=bool)
        self.cells = [BLANK] * (GRID * GRID)

    def ink(self) -> np.ndarray:
        """A random dark colour."""
        return self.rng.integers(0, 90, size=3).astype(np.float32)

    def figure(
        self,
        alpha: np.ndarray,
        centre: tuple[float, float],
        colour: tuple[int, int, int],
        symbol: str | None = None,
    ) -> None:
        """Stamp a figure in the style's fill and a shade of `colour`; all of it is in the mask."""
        shaded = shade(self.rng, self.style, colour)
        self.stamp(fill(self.style.fill, alpha), centre, shaded, symbol, alpha)

    def stamp(
        self,
        alpha: np.ndarray,
        centre: tuple[float, float],
        colour: np.ndarray,
        symbol: str | None = None,
        whole: np.ndarray | None = None,
    ) -> None:
        """Blend `colour` through `alpha` (h,w) in 0..1, centred at (x, y) pixels.

        `whole` (h,w): what belongs to it, if that is more than what is painted.
        """
        if symbol is not None:
            self.cells[int(centre[1]) // CELL * GRID + int(centre[0]) // CELL] = symbol
        if not self.paint:
            return
        height, width = alpha.shape
        left, top = round(centre[0] - width / 2), round(centre[1] - height / 2)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, SIZE), min(top + height, SIZE)
        seen = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
        region = self.pixels[y0:y1, x0:x1]
        region += alpha[seen][..., None] * (np.asarray(colour, dtype=np.float32) - region)
        self.mask[y0:y1, x0:x1] |= (alpha if whole is None else whole)[seen] > 0.5

    def finish(self) -> np.ndarray:
        """Add sensor noise and return the image (64,64,3) uint8."""
        if self.paint:
            noise = self.rng.standard_normal(self.pixels.shape, dtype=np.float32)
            self.pixels += noise * np.float32(self.rng.uniform(0, 6))
        return np.clip(self.pixels, 0, 255).astype(np.uint8)


@cache
def glyph(font: str, size: int, character: str) -> np.ndarray:
    """Coverage (h,w) in 0..1 of a character, cropped to its advance and the font's line box."""
    import matplotlib

    path = f"{matplotlib.get_data_path()}/fonts/ttf/{font}"
    face = ImageFont.truetype(path, size)
    ascent, descent = face.getmetrics()
    width = round(face.getlength(character))
    image = Image.new("L", (width, ascent + descent))
    ImageDraw.Draw(image).text((0, 0), character, fill=255, font=face)
    return np.asarray(image, dtype=np.float32) / 255


@cache
def shape(name: str, size: int) -> np.ndarray:
    """Coverage (size,size) in 0..1 of a circle, square, triangle or cross."""
    big = size * OVERSAMPLE
    image = Image.new("L", (big, big))
    draw = ImageDraw.Draw(image)
    edge = big - 1
    if name == "circle":
        draw.ellipse((0, 0, edge, edge), fill=255)
    elif name == "square":
        inset = big // 12
        draw.rectangle((inset, inset, edge - inset, edge - inset), fill=255)
    elif name == "triangle":
        draw.polygon([(edge / 2, 0), (edge, edge), (0, edge)], fill=255)
    else:
        third = big / 3
        draw.rectangle((third, 0, 2 * third, edge), fill=255)
        draw.rectangle((0, third, edge, 2 * third), fill=255)
    small = image.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement of a coverage map (h,w) in 0..1 to (size,size)."""
    picture = Image.fromarray((image * 255).astype(np.uint8))
    large = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(large, dtype=np.float32) / 255
