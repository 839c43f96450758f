"""ConvNeXt (arXiv 2201.03545): timm's stem and stages, without its head."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import initialization as init

from eagle_moe.canvas import CLIP_MEAN, CLIP_STD
from eagle_moe.experts.base import ExpertSpec, VisionExpert
from eagle_moe.experts.registry import register_expert
from eagle_moe.schema import Schema


class ConvNeXtArch(Schema):
    """Defaults: ConvNeXt-XXLarge."""

    depths: tuple[int, int, int, int] = (3, 4, 30, 3)
    dims: tuple[int, int, int, int] = (384, 768, 1536, 3072)
    stem: int = 4
    """Kernel and stride of the stem's convolution."""
    output_stride: Literal[8, 16, 32] = 32
    """View pixels per cell of the map; below 32, late stages dilate instead of downsampling."""
    norm_eps: float = 1e-5
    layer_scale: float | None = 1e-6
    """Initial residual scale per channel; null for none."""


@register_expert("convnext")
class ConvNeXtExpert(VisionExpert):
    """Map of the last stage, before any norm of the head."""

    Arch = ConvNeXtArch
    presets: ClassVar = {
        "convnext": {
            "view": {"size": 1024, "mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic"},
            "card": {
                "checkpoint": "timm/convnext_xxlarge.clip_laion2b_soup_ft_in1k",
                "licence": "Apache-2.0",
                "source": "https://github.com/huggingface/pytorch-image-models",
            },
        },
        "convnext-tiny": {
            "view": {"size": 64, "mean": CLIP_MEAN, "std": CLIP_STD},
            "arch": {
                "depths": (1, 1, 2, 1),
                "dims": (24, 48, 96, 96),
                "output_stride": 8,
                "layer_scale": None,
            },
            "card": {"checkpoint": "", "licence": "Apache-2.0", "source": "this repository"},
        },
    }

    def __init__(self, spec: ExpertSpec) -> None:
        from timm.models.convnext import ConvNeXt

        super().__init__(spec)
        arch: ConvNeXtArch = self.arch
        body: Any = ConvNeXt(
            depths=arch.depths,
            dims=arch.dims,
            patch_size=arch.stem,
            output_stride=arch.output_stride,
            ls_init_value=arch.layer_scale,
            norm_eps=arch.norm_eps,
            num_classes=0,
        )
        self.stem, self.stages = body.stem, body.stages
        self.channels = arch.dims[-1]
        self.stride = body.feature_info[-1]["reduction"]
        if spec.view.size < self.stride:
            raise ValueError(
                f"expert `{spec.name}`: view.size {spec.view.size} is smaller than one cell of"
                f" the map. Set view.size to {self.stride} or more."
            )

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage.blocks]

    def forward(self, view: Tensor) -> Tensor:
        x = self.stem(view)
        for stage in self.stages:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = self.run_block(block, x)
        return x

    def init_weights(self, module: nn.Module) -> bool:
        scale = module._parameters.get("gamma")
        if scale is not None:
            init.constant_(scale, self.arch.layer_scale)
            return True
        return super().init_weights(module)
