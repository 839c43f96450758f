"""Sequence append: every expert keeps its own tokens (arXiv 2408.15998, section 2.3, Table 4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from eagle_moe.fusion.base import FUSIONS, Fusion, GridNorms, GridOptions


class SequenceAppendOptions(GridOptions):
    """`width`: common width that each expert is projected to; default the widest expert's."""

    width: int | None = None


@FUSIONS.register("sequence_append")
class SequenceAppend(Fusion):
    """All maps on one grid, each projected to a common width, appended in mixture order."""

    Options = SequenceAppendOptions

    def __init__(self, channels: Mapping[str, int], options: SequenceAppendOptions) -> None:
        super().__init__(channels, options)
        self.out_channels = options.width or max(channels.values())
        self.to_tokens = GridNorms(channels, options)
        self.to_width = nn.ModuleDict(
            {name: nn.Linear(width, self.out_channels) for name, width in channels.items()}
        )

    @classmethod
    def count_tokens(cls, options: SequenceAppendOptions, num_experts: int) -> int:
        return options.grid**2 * num_experts

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        tokens = [self.to_width[name](self.to_tokens(name, x)) for name, x in maps.items()]
        return torch.cat(tokens, dim=1)
