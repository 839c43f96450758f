"""The canvas: one square uint8 RGB tensor per image, and the views that experts cut from it.

`load_image` and `to_canvas` run on the host, once per image, and know nothing about experts.
`cut_view` runs inside the graph, on the canvas's device.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_moe.schema import Schema

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of CLIP's training images (openai/CLIP, clip/clip.py)."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Statistics of ImageNet-1k (torchvision)."""


class ViewSpec(Schema):
    """How an expert cuts its view from the canvas: a square of `size` pixels, normalised.

    `mean` and `std` are in units of the 0..1 pixel range. `align_corners` and `antialias` are as
    in `torch.nn.functional.interpolate`; the official Eagle release resizes with
    `align_corners=True` and without antialiasing.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    align_corners: bool = False
    antialias: bool = True


def resize(x: Tensor, size: int | tuple[int, int], spec: ViewSpec) -> Tensor:
    """Resize float `x` (B,C,H,W) to `size` by the rule of `spec`; nothing is done at equal size."""
    height, width = (size, size) if isinstance(size, int) else size
    if x.shape[-2:] == (height, width):
        return x
    if spec.interpolation == "nearest":
        return F.interpolate(x, (height, width), mode="nearest")
    return F.interpolate(
        x,
        (height, width),
        mode=spec.interpolation,
        align_corners=spec.align_corners,
        antialias=spec.antialias,
    )


def cut_view(canvas: Tensor, spec: ViewSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Resize and normalise `canvas` (B,3,S,S) to `spec`, returning (B,3,size,size) in `dtype`.

    A uint8 canvas is scaled to 0..1 first; a float canvas must be in 0..1 already. The arithmetic
    is fp32 whatever `dtype` is, so that low precision starts after normalisation.
    """
    x = canvas.float()
    if canvas.dtype == torch.uint8:
        x = x * (1.0 / 255.0)
    mean = torch.tensor(spec.mean, dtype=torch.float32, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, dtype=torch.float32, device=x.device).view(1, 3, 1, 1)
    # Normalising first commutes with the (linear) resize except for rounding; the official code
    # normalises the canvas and then resizes it, and so do we, to reproduce it to the last bits.
    return resize((x - mean) / std, spec.size, spec).to(dtype)
