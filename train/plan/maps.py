"""The maps of a mixture's experts: how large they are, and how long it takes to compute them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from eagle_moe.config import EagleMixConfig
from eagle_moe.experts import VisionExpert, build_expert
from eagle_moe.parts import expert_part
from eval.speed.seconds import median_seconds
from train.flops import model_flops

BATCH = 8
"""Images that go through an expert together when it is timed."""


def map_shapes(config: EagleMixConfig) -> dict[str, tuple[int, int, int]]:
    """Expert -> shape (C,h,w) of its map of one image, as it comes out of the expert."""
    shapes = {}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        for spec in config.vision_config.expert_specs:
            expert = build_expert(spec)
            side = expert.view_spec.size // expert.stride
            shapes[spec.name] = (expert.channels, side, side)
    return shapes


@torch.no_grad()
def timed_seconds(config: EagleMixConfig, dtype: torch.dtype) -> dict[str, float]:
    """Expert -> seconds per map, measured with random weights on the device that would train."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    size = config.vision_config.canvas_size
    seconds = {}
    with torch.random.fork_rng(), device:
        canvases = torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8)
        for spec in config.vision_config.expert_specs:
            encode = partial(_encode, build_expert(spec).to(dtype).eval(), canvases)
            seconds[spec.name] = median_seconds(encode, device, budget=0.5) / BATCH
    return seconds


def _encode(expert: VisionExpert, canvases: Tensor) -> Tensor:
    return expert(expert.view(canvases))


def counted_seconds(config: EagleMixConfig, tflops: float) -> dict[str, float]:
    """Expert -> seconds per map on a device that does so many TFLOP/s."""
    image = model_flops(config).image
    names = [spec.name for spec in config.vision_config.expert_specs]
    return {name: image[expert_part(name)] / (tflops * 1e12) for name in names}
