"""CLIP vision transformers (arXiv 2103.00020): layers of transformers, CLS handling of our own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from eagle_moe.canvas import CLIP_MEAN, CLIP_STD
from eagle_moe.experts.base import ExpertSpec, VisionExpert
from eagle_moe.experts.position import resize_table
from eagle_moe.experts.registry import register_expert
from eagle_moe.schema import Schema


class CLIPArch(Schema):
    """Defaults: ViT-L/14 at 336 px."""

    image_size: int = 336
    """View size at which the position table was trained; another view resamples the table."""
    patch_size: int = 14
    hidden_size: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_size: int = 4096
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    keep_cls: bool = True
    """Whether a CLS token attends beside the patches, as in training. The official Eagle release
    drops it before the first layer."""


_CARD = {
    "checkpoint": "openai/clip-vit-large-patch14-336",
    "licence": "MIT",
    "source": "https://github.com/openai/CLIP",
}
# Bicubic is the resize that CLIP was trained with (openai/CLIP, clip/clip.py).
_VIEW = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic"}
_TINY = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 96,
    "layers": 3,
    "heads": 3,
    "mlp_size": 384,
    "keep_cls": False,
}


@register_expert("clip")
class CLIPExpert(VisionExpert):
    """Map of the last layer's patch tokens, before CLIP's final norm (as Eagle reads it)."""

    Arch = CLIPArch
    presets: ClassVar = {
        "clip": {"view": {"size": 336, **_VIEW}, "card": _CARD},
        "clip-448": {"view": {"size": 448, **_VIEW}, "card": _CARD},
        "clip-tiny": {
            "view": {"size": 32, "mean": CLIP_MEAN, "std": CLIP_STD},
            "arch": _TINY,
            "card": {"checkpoint": "", "licence": "Apache-2.0", "source": "this repository"},
        },
    }

    def __init__(self, spec: ExpertSpec) -> None:
        from transformers import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPEncoderLayer

        super().__init__(spec)
        arch: CLIPArch = self.arch
        self.channels, self.stride = arch.hidden_size, arch.patch_size
        self.cells = self.grid(arch.patch_size)
        self.head_width(arch.hidden_size, arch.heads)
        native = arch.image_size // arch.patch_size
        config = CLIPVisionConfig(
            hidden_size=arch.hidden_size,
            intermediate_size=arch.mlp_size,
            num_attention_heads=arch.heads,
            hidden_act=arch.activation,
            layer_norm_eps=arch.norm_eps,
        )
        config._attn_implementation = "sdpa"
        width = arch.hidden_size
        self.patch_embedding = nn.Conv2d(
            3, width, arch.patch_size, stride=arch.patch_size, bias=False
        )
        if arch.keep_cls:
            self.class_embedding = nn.Parameter(torch.empty(width))
        # Rows: CLS first if it is kept, then the patches row by row.
        self.position_embedding = nn.Parameter(torch.empty(arch.keep_cls + native**2, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=arch.norm_eps)
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(arch.layers))

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, view: Tensor) -> Tensor:
        x = self.embed(view)
        x = self.pre_layernorm(x)
        for layer in self.layers:
            x = self.run_block(layer, x, None)
        patches = x[:, -(self.cells**2) :]
        return patches.transpose(1, 2).unflatten(2, (self.cells, self.cells))

    def embed(self, view: Tensor) -> Tensor:
        """View -> position-coded tokens (B, [1 +] cells**2, C)."""
        x = self.patch_embedding(view).flatten(2).transpose(1, 2)
        keep_cls: int = self.arch.keep_cls
        table = resize_table(self.position_embedding[keep_cls:], self.cells, antialias=True)
        x = x + table
        if keep_cls:
            cls = self.class_embedding + self.position_embedding[0]
            x = torch.cat([cls.expand(x.shape[0], 1, -1), x], dim=1)
        return x

    def init_weights(self, module: nn.Module) -> bool:
        if module is self:
            init.normal_(self.position_embedding, std=0.02)
            if self.arch.keep_cls:
                init.normal_(self.class_embedding, std=self.channels**-0.5)
            return True
        return super().init_weights(module)
