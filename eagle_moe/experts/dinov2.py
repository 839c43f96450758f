"""DINOv2 (arXiv 2304.07193), with registers (arXiv 2309.16588) or without: transformers' layers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from eagle_moe.canvas import IMAGENET_MEAN, IMAGENET_STD
from eagle_moe.experts.base import ExpertSpec, VisionExpert
from eagle_moe.experts.position import resize_table
from eagle_moe.experts.registry import register_expert
from eagle_moe.schema import Schema


class DINOv2Arch(Schema):
    """Defaults: ViT-L/14 with registers."""

    image_size: int = 518
    """View size at which the position table was trained; another view resamples the table."""
    patch_size: int = 14
    hidden_size: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: int = 4
    swiglu: bool = False
    """Feed-forward of the giant model."""
    registers: int = 4
    antialias: bool = True
    """How the position table is resampled: true for the models with registers, false without."""
    norm_eps: float = 1e-6


_VIEW = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


@register_expert("dinov2")
class DINOv2Expert(VisionExpert):
    """Map of the patch tokens after the final norm; CLS and registers attend but are cut off."""

    Arch = DINOv2Arch
    presets: ClassVar = {
        "dinov2": {
            # Bicubic is the resize that DINOv2 was evaluated with (dinov2/data/transforms.py).
            "view": {"size": 448, "interpolation": "bicubic", **_VIEW},
            "card": {
                "checkpoint": "facebook/dinov2-with-registers-large",
                "licence": "Apache-2.0",
                "source": "https://github.com/facebookresearch/dinov2",
            },
        },
        "dinov2-tiny": {
            "view": {"size": 64, **_VIEW},
            "arch": {
                "image_size": 64,
                "patch_size": 8,
                "hidden_size": 96,
                "layers": 3,
                "heads": 3,
            },
            "card": {"checkpoint": "", "licence": "Apache-2.0", "source": "this repository"},
        },
    }

    def __init__(self, spec: ExpertSpec) -> None:
        from transformers import Dinov2WithRegistersConfig
        from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
            Dinov2WithRegistersLayer,
        )

        super().__init__(spec)
        arch: DINOv2Arch = self.arch
        self.channels, self.stride = arch.hidden_size, arch.patch_size
        self.cells = self.grid(arch.patch_size)
        self.head_width(arch.hidden_size, arch.heads)
        width, native = arch.hidden_size, arch.image_size // arch.patch_size
        config = Dinov2WithRegistersConfig(
            hidden_size=width,
            num_attention_heads=arch.heads,
            mlp_ratio=arch.mlp_ratio,
            use_swiglu_ffn=arch.swiglu,
            layer_norm_eps=arch.norm_eps,
        )
        config._attn_implementation = "sdpa"
        self.patch_embedding = nn.Conv2d(3, width, arch.patch_size, stride=arch.patch_size)
        self.cls_token = nn.Parameter(torch.empty(width))
        if arch.registers:
            self.register_tokens = nn.Parameter(torch.empty(arch.registers, width))
        # Rows: CLS, then the patches row by row; registers have no position.
        self.position_embeddings = nn.Parameter(torch.empty(1 + native**2, width))
        self.layers = nn.ModuleList(Dinov2WithRegistersLayer(config) for _ in range(arch.layers))
        self.layernorm = nn.LayerNorm(width, eps=arch.norm_eps)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, view: Tensor) -> Tensor:
        x = self.patch_embedding(view).flatten(2).transpose(1, 2)
        x = x + resize_table(self.position_embeddings[1:], self.cells, self.arch.antialias)
        x = torch.cat([self.prefix().expand(x.shape[0], -1, -1), x], dim=1)
        for layer in self.layers:
            x = self.run_block(layer, x)
        patches = self.layernorm(x[:, -(self.cells**2) :])
        return patches.transpose(1, 2).unflatten(2, (self.cells, self.cells))

    def prefix(self) -> Tensor:
        """CLS and registers (1 + registers, C)."""
        cls = (self.cls_token + self.position_embeddings[0])[None]
        return torch.cat([cls, self.register_tokens]) if self.arch.registers else cls

    def init_weights(self, module: nn.Module) -> bool:
        if module is self:
            for table in (self.position_embeddings, self.cls_token):
                init.normal_(table, std=0.02)
            if self.arch.registers:
                init.normal_(self.register_tokens, std=0.02)
        elif isinstance(scale := module._parameters.get("lambda1"), Tensor):
            init.ones_(scale)
        else:
            return super().init_weights(module)
        return True
