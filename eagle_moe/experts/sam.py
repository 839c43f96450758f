"""Segment Anything's image encoder (arXiv 2304.02643), with attention through SDPA."""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar, Literal

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


class SAMArch(Schema):
    """Defaults: ViT-L with Eagle's short neck."""

    image_size: int = 1024
    """View size at which the position tables were trained; another view resamples them."""
    patch_size: int = 16
    hidden_size: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_size: int = 4096
    window: int = 14
    global_layers: tuple[int, ...] = (5, 11, 17, 23)
    norm_eps: float = 1e-6
    neck: Literal["short", "original", "none"] = "short"
    """`original`: 1x1 conv, norm, 3x3 conv, norm, as SAM was trained. `short`: its first half,
    which the official Eagle release trains anew. `none`: the last layer's map."""
    neck_channels: int = 256
    unshuffle: int = 2
    """Cells per side that are folded into channels after the neck (pixel-unshuffle)."""


def relative_table(table: Tensor, cells: int) -> Tensor:
    """Table (2n-1, d) of offsets 1-n..n-1 -> (cells, cells, d): the row of each (query, key).

    A table of another length is resampled linearly, as segment_anything does.
    """
    length = 2 * cells - 1
    if table.shape[0] != length:
        resized = F.interpolate(table.float().T[None], length, mode="linear")
        table = resized[0].T.to(table.dtype)
    position = torch.arange(cells, device=table.device)
    return table[position[:, None] - position[None, :] + cells - 1]


class SAMAttention(nn.Module):
    """Self-attention on a map (B,H,W,C), biased by relative row and column (arXiv 2112.01526)."""

    def __init__(self, width: int, heads: int, cells: int) -> None:
        """`cells`: cells per side at which the relative tables were trained."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.empty(2 * cells - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.empty(2 * cells - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias(q, height, width)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(x.shape))

    def bias(self, q: Tensor, height: int, width: int) -> Tensor:
        """Queries (B,heads,H*W,d), not scaled -> attention bias (B,heads,H*W,H*W)."""
        q = q.unflatten(2, (height, width))
        rows = torch.einsum("bnhwd,hkd->bnhwk", q, relative_table(self.rel_pos_h, height))
        cols = torch.einsum("bnhwd,wkd->bnhwk", q, relative_table(self.rel_pos_w, width))
        bias = rows[..., :, None] + cols[..., None, :]
        return bias.flatten(4, 5).flatten(2, 3)


class SAMNeck(nn.Module):
    """Map (B,H,W,C) -> (B,channels,H,W); the second half is absent in Eagle's short form."""

    def __init__(self, width: int, channels: int, eps: float, short: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, 1, bias=False)
        self.norm1 = nn.LayerNorm(channels, eps=eps)
        self.short = short
        if not short:
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.norm2 = nn.LayerNorm(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.permute(0, 3, 1, 2))
        x = self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.short:
            return x
        return self.norm2(self.conv2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_VIEW = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


@register_expert("sam")
class SAMExpert(VisionExpert):
    """Map after the neck, folded by `unshuffle`."""

    Arch = SAMArch
    presets: ClassVar = {
        "sam": {
            "view": {"size": 1024, **_VIEW},
            "card": {
                "checkpoint": "facebook/sam-vit-large",
                "licence": "Apache-2.0",
                "source": "https://github.com/facebookresearch/segment-anything",
            },
        },
        "sam-tiny": {
            "view": {"size": 64, **_VIEW},
            "arch": {
                "image_size": 64,
                "patch_size": 8,
                "hidden_size": 96,
                "layers": 3,
                "heads": 3,
                "mlp_size": 384,
                "window": 4,
                "global_layers": (2,),
                "neck_channels": 48,
                "unshuffle": 1,
            },
            "card": {"checkpoint": "", "licence": "Apache-2.0", "source": "this repository"},
        },
    }

    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__(spec)
        arch: SAMArch = self.arch
        width, native = arch.hidden_size, arch.image_size // arch.patch_size
        self.stride = arch.patch_size * arch.unshuffle
        self.grid(self.stride)
        self.head_width(width, arch.heads)
        self.patch_embed = nn.Conv2d(3, width, arch.patch_size, stride=arch.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(native**2, width))
        self.layers = nn.ModuleList(self._layer(i, native) for i in range(arch.layers))
        self.neck: nn.Module | None = None
        if arch.neck != "none":
            self.neck = SAMNeck(width, arch.neck_channels, arch.norm_eps, arch.neck == "short")
        self.channels = (arch.neck_channels if self.neck else width) * arch.unshuffle**2

    def _layer(self, index: int, native: int) -> ViTDetBlock:
        arch: SAMArch = self.arch
        window = 0 if index in arch.global_layers else arch.window
        attn = SAMAttention(arch.hidden_size, arch.heads, window or native)
        mlp = nn.Sequential(
            OrderedDict(
                lin1=nn.Linear(arch.hidden_size, arch.mlp_size),
                act=nn.GELU(),
                lin2=nn.Linear(arch.mlp_size, arch.hidden_size),
            )
        )
        return ViTDetBlock(attn, mlp, arch.hidden_size, arch.norm_eps, window)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, view: Tensor) -> Tensor:
        x = self.patch_embed(view).permute(0, 2, 3, 1)
        cells = x.shape[1]
        x = x + resize_table(self.pos_embed, cells, antialias=True).view(1, cells, cells, -1)
        for layer in self.layers:
            x = self.run_block(layer, x)
        x = self.neck(x) if self.neck is not None else x.permute(0, 3, 1, 2)
        return F.pixel_unshuffle(x, self.arch.unshuffle)

    def init_weights(self, module: nn.Module) -> bool:
        if module is self:
            init.normal_(self.pos_embed, std=0.02)
        elif isinstance(module, SAMAttention):
            # No preference for any offset at the start, as in segment_anything.
            init.zeros_(module.rel_pos_h)
            init.zeros_(module.rel_pos_w)
        else:
            return super().init_weights(module)
        return True
