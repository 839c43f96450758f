"""Pix2Struct's encoder (arXiv 2210.03347): layers of transformers on exactly the real patches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from eagle_moe.canvas import resize
from eagle_moe.experts.base import ExpertSpec, VisionExpert
from eagle_moe.experts.registry import register_expert
from eagle_moe.schema import Schema


class Pix2StructArch(Schema):
    """Defaults: the encoder of Pix2Struct-large."""

    patch_size: int = 16
    hidden_size: int = 1536
    layers: int = 18
    heads: int = 24
    head_dim: int = 64
    mlp_size: int = 3968
    table_size: int = 4096
    """Rows of the row and of the column embedding; ids start at 1, as the processor counts."""
    norm_eps: float = 1e-6
    overlap: int = 0
    """View pixels that a patch sees beyond its cell on every side (zero, the mean, outside the
    view). Pix2Struct has none; a small encoder trained from scratch reads much better with it."""


@register_expert("pix2struct")
class Pix2StructExpert(VisionExpert):
    """Map after the final norm.

    The checkpoint's processor fits `max_patches` patches into the image's aspect ratio. A square
    image always becomes n x n patches with n = floor(sqrt(max_patches)) (45 for 2048), so the view
    is a square of n * patch_size pixels (720), every patch is real, and no mask is needed.
    """

    Arch = Pix2StructArch
    presets: ClassVar = {
        "pix2struct": {
            "view": {"size": 720},
            "card": {
                "checkpoint": "google/pix2struct-large",
                "licence": "Apache-2.0",
                "source": "https://github.com/google-research/pix2struct",
            },
        },
        "pix2struct-tiny": {
            "view": {"size": 64},
            "arch": {
                "patch_size": 8,
                "hidden_size": 96,
                "layers": 3,
                "heads": 3,
                "head_dim": 32,
                "mlp_size": 256,
                "table_size": 9,
            },
            "card": {"checkpoint": "", "licence": "Apache-2.0", "source": "this repository"},
        },
    }

    def __init__(self, spec: ExpertSpec) -> None:
        from transformers import Pix2StructVisionConfig
        from transformers.models.pix2struct.modeling_pix2struct import (
            Pix2StructLayerNorm,
            Pix2StructVisionLayer,
        )

        super().__init__(spec)
        arch: Pix2StructArch = self.arch
        self.channels, self.stride = arch.hidden_size, arch.patch_size
        self.cells = self.grid(arch.patch_size)
        if self.cells >= arch.table_size:
            raise ValueError(
                f"expert `{spec.name}`: view.size {spec.view.size} makes {self.cells} rows of"
                f" patches, but the tables hold {arch.table_size - 1}."
                f" Set arch.table_size to {self.cells + 1} or more, or shrink view.size."
            )
        config: Any = Pix2StructVisionConfig(
            hidden_size=arch.hidden_size,
            num_attention_heads=arch.heads,
            d_kv=arch.head_dim,
            d_ff=arch.mlp_size,
            layer_norm_eps=arch.norm_eps,
        )
        config._attn_implementation = "sdpa"
        pixels = 3 * (arch.patch_size + 2 * arch.overlap) ** 2
        self.patch_projection = nn.Linear(pixels, arch.hidden_size)
        self.row_embedder = nn.Embedding(arch.table_size, arch.hidden_size)
        self.column_embedder = nn.Embedding(arch.table_size, arch.hidden_size)
        self.layers = nn.ModuleList(Pix2StructVisionLayer(config) for _ in range(arch.layers))
        self.layernorm = Pix2StructLayerNorm(arch.hidden_size, eps=arch.norm_eps)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def view(self, canvas: Tensor) -> Tensor:
        """Canvas (B,3,S,S) -> (B,3,size,size), each image standardised by its own statistics.

        As Pix2StructImageProcessor does it: one mean and one population deviation over pixels in
        0..255 and channels of the whole image, before the resize; the deviation is at least
        1/sqrt(number of values), so that an image of one colour becomes zero.
        """
        x = canvas.float() if canvas.dtype == torch.uint8 else canvas.float() * 255.0
        std, mean = torch.std_mean(x, dim=(1, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / std.clamp(min=x[0].numel() ** -0.5)
        return resize(x, self.view_spec.size, self.view_spec).to(self.dtype)

    def forward(self, view: Tensor) -> Tensor:
        ids = torch.arange(1, self.cells + 1, device=view.device)
        position = self.row_embedder(ids)[:, None] + self.column_embedder(ids)[None, :]
        x = self.patch_projection(self.patches(view)) + position.flatten(0, 1)
        for layer in self.layers:
            x, _ = self.run_block(layer, x)
        x = self.layernorm(x)
        return x.transpose(1, 2).unflatten(2, (self.cells, self.cells))

    def patches(self, view: Tensor) -> Tensor:
        """View -> patches row by row (B, cells**2, values in the order y, x, channel)."""
        size, overlap = self.arch.patch_size, self.arch.overlap
        padded = F.pad(view, (overlap,) * 4)
        side = size + 2 * overlap
        windows = padded.unfold(2, side, size).unfold(3, side, size)
        return windows.permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)

    def init_weights(self, module: nn.Module) -> bool:
        """As the base class, but for queries: this attention has no 1/sqrt(head_dim), so the
        scale belongs in the weights. (The defaults of transformers are near zero here.)"""
        query = module._modules.get("query")
        if isinstance(query, nn.Linear):
            init.xavier_uniform_(query.weight, gain=self.arch.head_dim**-0.5)
            return True
        return super().init_weights(module)
