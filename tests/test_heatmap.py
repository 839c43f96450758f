"""An image under an expert's map, and the map in words."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from eagle_moe.heatmap import LOWERED, RAISED, in_words, overlays, picture, true_minus

CANVAS = np.full((64, 64, 3), 255, np.uint8)


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_colour_stands_where_the_weight_is_and_says_its_sign() -> None:
    weights = np.zeros((2, 2), np.float32)
    weights[0, 1], weights[1, 0] = 1.0, -1.0
    shown = opened(overlays(CANVAS, {"clip": weights})["clip"]).astype(int)
    side = len(shown)
    corner = {
        (row, column): shown[side * (2 * row + 1) // 4, side * (2 * column + 1) // 4]
        for row in (0, 1)
        for column in (0, 1)
    }
    assert abs(corner[0, 1] - RAISED).max() < 30
    assert abs(corner[1, 0] - LOWERED).max() < 30
    assert (corner[0, 0] == 255).all() and (corner[1, 1] == 255).all()


def test_one_scale_for_all_experts() -> None:
    strong, weak = np.full((1, 1), 1.0), np.full((4, 4), 0.01)
    shown = {k: opened(v)[0, 0] for k, v in overlays(CANVAS, {"a": strong, "b": weak}).items()}
    assert abs(shown["b"].astype(int) - 255).max() < abs(shown["a"].astype(int) - 255).max() / 5


def test_maps_that_are_zero_leave_the_image_grey() -> None:
    assert (opened(overlays(CANVAS, {"a": np.zeros((2, 2))})["a"]) == 255).all()


@pytest.mark.parametrize(("side", "shown"), [(64, 192), (100, 100), (300, 300), (1024, 384)])
def test_pictures_are_enlarged_by_whole_pixels_and_bounded(side: int, shown: int) -> None:
    assert opened(picture(np.zeros((side, side, 3), np.uint8))).shape == (shown, shown, 3)


def test_a_map_in_words() -> None:
    weights = np.zeros((2, 3), np.float32)
    weights[1, 2] = -0.5
    assert in_words("sam", weights) == (
        "sam, 2 by 3 cells: strongest in row 2, column 3, where it lowered the log-probability; "
        "sum \N{MINUS SIGN}0.50"
    )


@pytest.mark.parametrize(
    ("text", "shown"), [("+0.10", "+0.10"), ("-0.10", "\N{MINUS SIGN}0.10"), ("-0.00", "0.00")]
)
def test_a_true_minus_and_none_before_zero(text: str, shown: str) -> None:
    assert true_minus(text) == shown
