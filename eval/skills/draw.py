"""A small paint box: glyphs, rectangles, shapes and handwriting on a 64-pixel square.

Whatever is painted is also entered in the mask, and, where a symbol is given, in the transcript
cell that holds its centre.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.skills.scene import BLANK, CELL, GRID, SIZE

FONTS = (
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "cmtt10.ttf",
)
"""Monospaced fonts that matplotlib bundles."""
OVERSAMPLE = 4
"""Shapes are drawn this many times larger and scaled down, for smooth edges."""


class Painter:
    """Paints on a plain background of a random light colour; noise is added at the end.

    With `paint=False` only the transcript is made, many times faster; it is the same, but what is
    drawn from `rng` afterwards is not.
    """

    def __init__(self, rng: np.random.Generator, paint: bool = True) -> None:
        self.rng = rng
        self.paint = paint
        paper = rng.integers(205, 256) + rng.integers(-12, 1, size=3)
        self.pixels = np.full((SIZE, SIZE, 3), paper, dtype=np.float32)
        self.mask = np.zeros((SIZE, SIZE), dtype=bool)
        self.cells = [BLANK] * (GRID * GRID)

    def ink(self) -> np.ndarray:
        """A random dark colour."""
        return self.rng.integers(0, 90, size=3).astype(np.float32)

    def stamp(
        self,
        alpha: np.ndarray,
        centre: tuple[float, float],
        colour: np.ndarray | tuple[int, int, int],
        symbol: str | None = None,
    ) -> None:
        """Blend `colour` through `alpha` (h,w) in 0..1, centred at (x, y) pixels."""
        if symbol is not None:
            self.cells[int(centre[1]) // CELL * GRID + int(centre[0]) // CELL] = symbol
        if not self.paint:
            return
        height, width = alpha.shape
        left, top = round(centre[0] - width / 2), round(centre[1] - height / 2)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, SIZE), min(top + height, SIZE)
        part = alpha[y0 - top : y1 - top, x0 - left : x1 - left, None]
        region = self.pixels[y0:y1, x0:x1]
        region += part * (np.asarray(colour, dtype=np.float32) - region)
        self.mask[y0:y1, x0:x1] |= part[..., 0] > 0.5

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
