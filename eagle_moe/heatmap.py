"""Where an expert's features mattered, for people: the image under its map, and the map in words.

Used by the evaluation's page and by the web chat. The maps are those of `eagle_moe.explain.weigh`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

RAISED, LOWERED = (224, 122, 47), (29, 95, 196)
"""Orange and blue, as on the demo's page: apart for colour-blind readers, and in print."""
SIDE = 192
"""Pixels of an image on the page, at least."""
HINTS = (
    "The colours are hints: gradient of that log-probability times the features, counted from that "
    "mean, cell by cell on the expert's own grid. Orange raised it, blue lowered it; colour goes "
    "with the root, on a scale common to the experts of one image."
)
"""What a map is, for captions that said whose log-probability and which mean."""
PLACES = (
    "A cell of an expert that mixes cells, as transformers do, may stand for something elsewhere "
    "in the image."
)
"""What a map does not say, for captions."""


def replaced(count: int) -> str:
    """What a silenced expert gives instead, for captions."""
    return f"its map replaced by its mean over {count:,} reference images"


def picture(canvas: np.ndarray) -> bytes:
    """The canvas (S,S,3) as a PNG, enlarged by whole pixels if it is small."""
    return _png(Image.fromarray(_enlarged(canvas)))


def overlays(canvas: np.ndarray, maps: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Expert -> the canvas (S,S,3) in pale grey under its map (h,w), PNG; one scale for all."""
    grey = 255 - 0.3 * (255 - _enlarged(canvas).mean(-1, keepdims=True))
    top = max(max(float(np.abs(x).max()) for x in maps.values()), 1e-12)
    return {name: _png(_overlay(grey, x / top)) for name, x in maps.items()}


def in_words(expert: str, weights: np.ndarray) -> str:
    """A map (h,w) in words, for those who do not see it."""
    rows, columns = weights.shape
    at, column = divmod(int(abs(weights).argmax()), columns)
    side = "raised" if weights[at, column] > 0 else "lowered"
    return (
        f"{expert}, {rows} by {columns} cells: strongest in row {at + 1}, column {column + 1}, "
        f"where it {side} the log-probability; sum {true_minus(f'{weights.sum():+.2f}')}"
    )


def true_minus(text: str) -> str:
    """A figure with a real minus sign, and no sign before a zero."""
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def _overlay(grey: np.ndarray, weights: np.ndarray) -> Image.Image:
    """`grey` (S,S,1) under cells `weights` (h,w) in -1..1; colour goes with their root."""
    side = len(grey)
    rows, columns = (np.arange(side) * count // side for count in weights.shape)
    cells = weights[rows[:, None], columns[None, :], None]
    colour = np.where(cells > 0, np.array(RAISED), np.array(LOWERED))
    cover = 0.9 * np.sqrt(np.abs(cells))
    return Image.fromarray((grey * (1 - cover) + colour * cover).round().astype(np.uint8))


def _enlarged(canvas: np.ndarray) -> np.ndarray:
    """By whole pixels if it is small; made smaller, smoothly, if it is more than twice `SIDE`."""
    times = max(1, SIDE // len(canvas))
    enlarged = canvas.repeat(times, 0).repeat(times, 1)
    if len(enlarged) <= 2 * SIDE:
        return enlarged
    return np.asarray(
        Image.fromarray(enlarged).resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    )


def _png(image: Image.Image) -> bytes:
    target = io.BytesIO()
    image.save(target, format="PNG", optimize=True)
    return target.getvalue()
