"""Channel concatenation: the fusion that Eagle settles on (arXiv 2408.15998, section 2.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eagle_moe.fusion.base import FUSIONS, Fusion, GridNorms, GridOptions


@FUSIONS.register("channel_concat")
class ChannelConcat(Fusion):
    """All maps on one grid, concatenated along channels in mixture order."""

    Options = GridOptions

    def __init__(self, channels: Mapping[str, int], options: GridOptions) -> None:
        super().__init__(channels, options)
        self.out_channels = sum(channels.values())
        self.to_tokens = GridNorms(channels, options)

    @classmethod
    def count_tokens(cls, options: GridOptions, num_experts: int) -> int:
        return options.grid**2

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([self.to_tokens(name, x) for name, x in maps.items()], dim=-1)
