"""`open_clip:<model>[:<tag>]`: the image tower of any open_clip model, with no new code."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from eagle_moe.canvas import CLIP_MEAN, CLIP_STD
from eagle_moe.experts.backend import BackendExpert, known_interpolation, unknown_model
from eagle_moe.experts.base import ExpertSpec
from eagle_moe.experts.registry import register_expert
from eagle_moe.schema import Schema


class OpenCLIPArch(Schema):
    layer: int = -1
    """Which block or level gives the map (negative from the end)."""
    norm: bool = False
    """Whether the tower's final norm is applied to the map, where it has one."""
    quick_gelu: bool = False
    """Sigmoid form of GELU, as OpenAI's weights and some others were trained with."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Changes to the model's `vision_cfg`, for instance `{layers: 2}`."""


@register_expert("open_clip:")
class OpenCLIPExpert(BackendExpert):
    """Map of an image tower; a tower that open_clip takes from timm is read as timm's."""

    Arch: ClassVar[type[Schema]] = OpenCLIPArch

    @classmethod
    def defaults(cls, kind: str) -> dict[str, Any]:
        import open_clip

        _, model, tag = _parse(kind)
        config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
        if config is None:
            raise unknown_model(kind, model, open_clip.list_models())
        tags = open_clip.list_pretrained_tags_by_model(model)
        if tag and tag not in tags:
            raise ValueError(f'expert {kind}: no weights "{tag}" of {model}: {", ".join(tags)}.')
        published = open_clip.get_pretrained_cfg(model, tag or tags[0]) if tags else {}
        hub = published.get("hf_hub") or ""
        return {
            "view": {
                "size": config["vision_cfg"].get("image_size", 224),
                "mean": published.get("mean", CLIP_MEAN),
                "std": published.get("std", CLIP_STD),
                "interpolation": known_interpolation(published.get("interpolation")),
            },
            "arch": {
                "quick_gelu": bool(config.get("quick_gelu") or published.get("quick_gelu", False))
            },
            "card": {
                "checkpoint": hub.rstrip("/") or published.get("url", ""),
                "licence": "unknown",  # open_clip publishes none beside its weights
                "source": "https://github.com/mlfoundations/open_clip",
            },
        }

    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__(spec)
        tower = self.whole_tower()
        arch: OpenCLIPArch = self.arch
        self.from_timm = hasattr(tower, "trunk")
        if self.from_timm:
            if hasattr(tower.trunk, "set_input_size"):
                tower.trunk.set_input_size(img_size=spec.view.size)
            self.adopt_timm(tower.trunk, arch.layer, arch.norm)
        elif hasattr(tower, "transformer"):
            self._adopt_transformer(tower)
        else:
            self._adopt_resnet(tower)
        self.grid(self.stride)

    def whole_tower(self) -> Any:
        """The named model's image tower for this view, before anything is pruned."""
        # create_model would build the text tower too, and fetch its config where that is foreign.
        import open_clip
        from open_clip.model import _build_vision_tower

        _, model, _ = _parse(self.spec.kind)
        config = open_clip.get_model_config(model)
        vision = {
            **config["vision_cfg"],
            "image_size": self.spec.view.size,
            "timm_model_pretrained": False,
            **self.arch.options,
        }
        try:
            return _build_vision_tower(config["embed_dim"], vision, self.arch.quick_gelu)
        except TypeError as error:
            raise ValueError(f"expert `{self.spec.name}`: arch.options: {error}") from error

    def _adopt_transformer(self, tower: Any) -> None:
        arch: OpenCLIPArch = self.arch
        self.channels, self.stride = tower.conv1.out_channels, tower.patch_size[0]
        self.level = tower.prune_intermediate_layers([arch.layer], prune_norm=not arch.norm)
        if tower.attn_pool is not None:
            tower.attn_pool = tower.attn_pool_contrastive = None
            tower.ln_post = nn.Identity()  # its width is the pool's, not the map's
        self.adopt(tower)

    def _adopt_resnet(self, tower: Any) -> None:
        if self.arch.layer not in (-1, 4):
            raise ValueError(
                f"expert `{self.spec.name}`: arch.layer: a ResNet gives its last only."
            )
        self.channels, self.stride, self.level = tower.attnpool.c_proj.in_features, 32, [4]
        tower.attnpool = None
        self.adopt(tower)

    def forward(self, view: Tensor) -> Tensor:
        if self.from_timm:
            return self.timm_map(view)
        maps = self.body.forward_intermediates(
            view,
            indices=self.level,
            normalize_intermediates=self.arch.norm,
            intermediates_only=True,
        )
        return maps["image_intermediates"][-1]


def _parse(kind: str) -> tuple[str, str, str]:
    """`open_clip:model:tag` -> its three parts; the tag may be missing."""
    family, _, rest = kind.partition(":")
    model, _, tag = rest.partition(":")
    return family, model, tag
