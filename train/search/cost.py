"""What a mixture costs to run, beside what it scores: parameters, FLOPs, images per second.

Experts, fusion and connector are counted; the language model is the same for all mixtures. The
first two come from a model without weights, so they are known before anything is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from eagle_moe.config import EagleMixConfig
from eagle_moe.connectors import CONNECTORS
from eagle_moe.vision import EagleMixVisionModel
from eval.speed.seconds import median_seconds
from train.flops import model_flops
from train.search.trial import Cost

BATCH = 8
"""Images that are encoded together when speed is measured."""


def mixture_cost(
    config: EagleMixConfig,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Cost:
    """The cost of the mixture that `config` describes.

    `device`: where images/s are measured, in `dtype` and with as many threads as torch may use
    here; None: they are not. Weights are random, which changes no speed. It is what this machine
    did at this moment: jobs beside it slow it down.
    """
    with torch.device("meta"):
        counted = _vision(config, torch.float32)
    return Cost(
        parameters=sum(parameter.numel() for parameter in counted.parameters()),
        flops=sum(model_flops(config).image.values()),
        images_per_second=None if device is None else _speed(config, torch.device(device), dtype),
    )


def _vision(config: EagleMixConfig, dtype: torch.dtype) -> nn.Sequential:
    """From canvas (B,3,S,S) to image tokens (B,M,D), without a language model."""
    tower: Any = EagleMixVisionModel._from_config(config.vision_config, dtype=dtype)
    assert config.connector is not None
    connector = CONNECTORS[config.connector["kind"]](
        tower.fusion.out_channels,
        config.text_config.hidden_size,
        tower.fusion.num_tokens,
        config.connector_options,
    )
    return nn.Sequential(tower, connector.to(dtype))


@torch.no_grad()
def _speed(config: EagleMixConfig, device: torch.device, dtype: torch.dtype) -> float:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), device:
        vision = _vision(config, dtype).eval()
        size = config.vision_config.canvas_size
        canvases = torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8)
    return BATCH / median_seconds(lambda: vision(canvases), device)
