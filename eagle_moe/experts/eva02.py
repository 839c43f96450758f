"""EVA-02 as a detection backbone (arXiv 2303.11331, section 3.3.1): no library has this form.

A ViTDet-style transformer with 2-D rotary positions and SwiGLU. Source of every constant:
baaivision/EVA, EVA-02/det, and the copy of it in the official Eagle release.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from eagle_moe.canvas import IMAGENET_MEAN, IMAGENET_STD
from eagle_moe.experts.base import ExpertSpec, VisionExpert
from eagle_moe.experts.position import resize_table
from eagle_moe.experts.registry import register_expert
from eagle_moe.experts.vitdet import ViTDetBlock
from eagle_moe.schema import Schema


class EVA02Arch(Schema):
    """Defaults: EVA-02-L, detection."""

    patch_size: int = 16
    hidden_size: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_size: int = 2730
    """Hidden width of the SwiGLU: 8/3 of `hidden_size`, rounded down."""
    window: int = 16
    global_layers: tuple[int, ...] = (2, 5, 8, 11, 14, 17, 20, 23)
    norm_eps: float = 1e-6
    table_cells: int = 14
    """Cells per side of the absolute position table (pretraining at 224 px)."""
    rotary_cells: int = 16
    """Extent that rotary positions are rescaled to, whatever the size of the map or window."""
    rotary_base: float = 10000.0


Rotary = tuple[Tensor, Tensor]


def rotary_tables(
    cells: int, head_dim: int, extent: int, base: float, device: torch.device
) -> Rotary:
    """Cosine and sine, fp32, each (cells*cells, head_dim), of a row-major square of cells.

    The first half of the channels turns with the row, the second with the column. A cell at i
    has position i / cells * extent. Adjacent channels form a pair and share an angle.
    """
    axis = head_dim // 2
    power = torch.arange(0, axis, 2, device=device, dtype=torch.float32) / axis
    position = torch.arange(cells, device=device, dtype=torch.float32) / cells * extent
    angle = (position[:, None] * base**-power).repeat_interleave(2, dim=-1)
    rows = angle[:, None, :].expand(cells, cells, axis)
    cols = angle[None, :, :].expand(cells, cells, axis)
    grid = torch.cat([rows, cols], dim=-1).reshape(cells * cells, head_dim)
    return grid.cos(), grid.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent channel pairs of `x` (B,heads,N,d): (a, b) -> (a cos - b sin, b cos + a sin).

    The arithmetic is fp32; the result has the dtype of `x`.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


class EVA02Attention(nn.Module):
    """Self-attention on a map (B,H,W,C) with rotary queries and keys; keys have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            project(x).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class SwiGLU(nn.Module):
    """w3(norm(silu(w1 x) * w2 x)): EVA-02's feed-forward with its inner LayerNorm."""

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=eps)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


_VIEW = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


@register_expert("eva02")
class EVA02Expert(VisionExpert):
    """Map of the last layer, without a final norm."""

    Arch = EVA02Arch
    presets: ClassVar = {
        "eva02": {
            "view": {"size": 1024, **_VIEW},
            "card": {
                "checkpoint": "Yuxin-CV/EVA-02: eva02_L_coco_det_sys_o365.pth",
                "licence": "MIT",
                "source": "https://github.com/baaivision/EVA/tree/master/EVA-02/det",
            },
        },
        "eva02-tiny": {
            "view": {"size": 64, **_VIEW},
            "arch": {
                "patch_size": 8,
                "hidden_size": 96,
                "layers": 3,
                "heads": 3,
                "mlp_size": 256,
                "window": 4,
                "global_layers": (2,),
                "table_cells": 8,
            },
            "card": {"checkpoint": "", "licence": "Apache-2.0", "source": "this repository"},
        },
    }

    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__(spec)
        arch: EVA02Arch = self.arch
        self.channels, self.stride = arch.hidden_size, arch.patch_size
        self.cells = self.grid(arch.patch_size)
        # Rotary positions turn pairs of channels, half of the pairs by row and half by column.
        self.head_dim = self.head_width(arch.hidden_size, arch.heads, multiple=4)
        self.patch_embed = nn.Conv2d(3, arch.hidden_size, arch.patch_size, stride=arch.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(arch.table_cells**2, arch.hidden_size))
        self.layers = nn.ModuleList(self._layer(i) for i in range(arch.layers))

    def _layer(self, index: int) -> ViTDetBlock:
        arch: EVA02Arch = self.arch
        return ViTDetBlock(
            EVA02Attention(arch.hidden_size, arch.heads),
            SwiGLU(arch.hidden_size, arch.mlp_size, arch.norm_eps),
            arch.hidden_size,
            arch.norm_eps,
            window=0 if index in arch.global_layers else arch.window,
        )

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, view: Tensor) -> Tensor:
        x = self.patch_embed(view).permute(0, 2, 3, 1)
        table = resize_table(self.pos_embed, self.cells, antialias=False)
        x = x + table.view(1, self.cells, self.cells, -1)
        rotary = {
            window: self.rotary(window or self.cells, view.device)
            for window in (0, self.arch.window)
        }
        for layer in self.layers:
            x = self.run_block(layer, x, *rotary[layer.window])
        return x.permute(0, 3, 1, 2)

    def rotary(self, cells: int, device: torch.device) -> Rotary:
        """Tables of one attention square. Made anew in every pass (a few kernels for all layers),
        so that no checkpoint, cast or meta device can spoil them."""
        arch: EVA02Arch = self.arch
        return rotary_tables(cells, self.head_dim, arch.rotary_cells, arch.rotary_base, device)

    def init_weights(self, module: nn.Module) -> bool:
        if module is self:
            init.normal_(self.pos_embed, std=0.02)
            return True
        return super().init_weights(module)
