"""Image preprocessing of the official release: padding, and crop or pad to the canvas.

The release normalises by CLIP's statistics on the host. Our canvas stays uint8 and each expert
normalises its own view; CLIP's, at the canvas's size, is what the release makes.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import pytest
from PIL import Image
from torch import Tensor

from eagle_moe.canvas import ViewSpec, cut_view, to_canvas
from eagle_moe.image_processor import EagleMixImageProcessor
from tests.eagle_release import WRONG, assert_same, groups, outputs, read
from tests.parity import distance

NAMES = outputs("preprocess", inputs=r"img\d+\.hwc_u8")
GROUPS = groups(NAMES)


def picture(group: str) -> Image.Image:
    return Image.fromarray(read("preprocess")[f"{group}.hwc_u8"].numpy())


def processed(image: Image.Image, fit: Literal["pad", "crop"], size: int) -> Tensor:
    """Through the processor, then CLIP's statistics."""
    processor = EagleMixImageProcessor(size={"height": size, "width": size}, fit=fit)
    canvas = processor(images=[image], return_tensors="pt")["pixel_values"]
    return cut_view(canvas, ViewSpec(size=size))[0]


@cache
def ours(name: str) -> Tensor:
    group, what = name.split(".")
    image, golden = picture(group), read("preprocess")[name]
    if what == "padded_hwc_u8":
        return to_canvas(image, max(image.size), "pad").permute(1, 2, 0)
    return processed(image, {"pad": "pad", "square": "crop"}[what], golden.shape[-1])


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_release(name):
    assert_same(ours(name), read("preprocess")[name])


# Deliberate mistakes, each seen on at least one of the pictures


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_the_other_fit_would_show(fit):
    what = {"pad": "square", "crop": "pad"}[fit]
    golden = {group: read("preprocess")[f"{group}.{what}"] for group in GROUPS}
    errors = [distance(processed(picture(g), fit, x.shape[-1]), x) for g, x in golden.items()]
    assert max(errors) > WRONG


def test_a_resize_on_tensors_would_show():
    """Pillow's bicubic is not torch's, even with antialias."""
    errors = []
    for group in GROUPS:
        golden = read("preprocess")[f"{group}.pad"]
        image = picture(group)
        native = to_canvas(image, max(image.size), "pad")[None]
        spec = ViewSpec(size=golden.shape[-1], interpolation="bicubic")
        errors.append(distance(cut_view(native, spec)[0], golden))
    assert max(errors) > WRONG
