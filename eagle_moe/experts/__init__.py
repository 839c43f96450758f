"""Vision experts. One import line per file registers its kinds."""

from eagle_moe.experts import (  # noqa: F401 - register
    clip,
    convnext,
    dinov2,
    eva02,
    open_clip,
    pix2struct,
    sam,
    timm,
)
from eagle_moe.experts.base import Card, ExpertSpec, VisionExpert
from eagle_moe.experts.registry import (
    EXPERTS,
    build_expert,
    expert_class,
    presets,
    register_expert,
    resolve_expert,
)

__all__ = [
    "EXPERTS",
    "Card",
    "ExpertSpec",
    "VisionExpert",
    "build_expert",
    "expert_class",
    "presets",
    "register_expert",
    "resolve_expert",
]
