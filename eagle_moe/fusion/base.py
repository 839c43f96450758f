"""The contract of a fusion: `{expert: map}` -> tokens. Only fusions change grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from eagle_moe.registry import Registry
from eagle_moe.schema import Schema

FUSIONS: Registry[type[Fusion]] = Registry("fusion")


class GridOptions(Schema):
    """Options shared by the fusions that lay every map on one grid."""

    grid: int = Field(32, gt=0)
    """Cells per side of the common grid (32 in Eagle: 1024 tokens)."""
    align_corners: bool = True
    """Bilinear resize rule (fp32) by which maps meet the grid: the official release's is true."""
    antialias: bool = False
    """Whether cells of a finer map are averaged, not skipped; the official release skips. Needs
    `align_corners: false`."""
    norm: Literal["none", "layernorm"] = "none"
    """A LayerNorm per expert before it meets the others. "none" is the official profile; without
    a norm the loudest expert drowns the rest when everything is small."""

    @model_validator(mode="after")
    def _resize_exists(self) -> Self:
        if self.align_corners and self.antialias:
            raise ValueError("antialias: true needs align_corners: false")
        return self


class Fusion(nn.Module):
    """Maps of named experts, each (B,C_i,h_i,w_i), to tokens (B, num_tokens, out_channels)."""

    Options: ClassVar[type[Schema]] = Schema

    num_tokens: int
    out_channels: int

    def __init__(self, channels: Mapping[str, int], options: Any) -> None:
        """`channels`: expert name -> channels of its map, in mixture order."""
        super().__init__()
        self.options = options
        self.num_tokens = self.count_tokens(options, len(channels))

    @classmethod
    def count_tokens(cls, options: Any, num_experts: int) -> int:
        """Tokens per image; the one place that computes it for this fusion."""
        raise NotImplementedError

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError


def to_grid(x: Tensor, options: GridOptions) -> Tensor:
    """Bilinear resize of a map (B,C,h,w) to (B,C,grid,grid), in fp32, cast back.

    As the official mixture does it (multi_backbone_channel_concatenation_encoder.py): maps that
    already have the grid's width are left alone.
    """
    size = (options.grid, options.grid)
    if x.shape[-2:] == size:
        return x
    resized = F.interpolate(
        x.float(),
        size,
        mode="bilinear",
        align_corners=options.align_corners,
        antialias=options.antialias,
    )
    return resized.to(x.dtype)


class GridNorms(nn.Module):
    """Resize each expert's map to the grid, flatten row-major, and normalise it if asked."""

    def __init__(self, channels: Mapping[str, int], options: GridOptions) -> None:
        super().__init__()
        self.options = options
        normed = channels if options.norm == "layernorm" else {}
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in normed.items()})

    def forward(self, name: str, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B, grid*grid, C)."""
        tokens = to_grid(x, self.options).flatten(2).transpose(1, 2)
        return self.norms[name](tokens) if name in self.norms else tokens
