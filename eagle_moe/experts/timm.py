"""`timm:<model>`: any model of timm that gives a feature map, with no new code."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from eagle_moe.experts.backend import BackendExpert, known_interpolation, unknown_model
from eagle_moe.experts.base import ExpertSpec
from eagle_moe.experts.registry import register_expert
from eagle_moe.schema import Schema


class TimmArch(Schema):
    layer: int = -1
    """Which of the model's feature levels or blocks gives the map (negative from the end)."""
    norm: bool = False
    """Whether the model's final norm is applied to the map, where it has one."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`, for instance `{depth: 2}`."""


@register_expert("timm:")
class TimmExpert(BackendExpert):
    """Map of one level of a timm model, read through its `forward_intermediates`."""

    Arch: ClassVar[type[Schema]] = TimmArch

    @classmethod
    def defaults(cls, kind: str) -> dict[str, Any]:
        import timm

        model = kind.partition(":")[2]
        if not timm.is_model(model):
            raise unknown_model(kind, model, timm.list_models())
        try:
            cfg = timm.get_pretrained_cfg(model)
        except RuntimeError as error:
            tagged = timm.list_models(f"{model.partition('.')[0]}.*", pretrained=True)
            raise ValueError(
                f"expert {kind}: {error} With weights: {', '.join(tagged)}."
            ) from error
        if cfg is None:  # an architecture without published weights
            return {"view": {"size": 224}, "card": {"licence": "unknown", "source": "timm"}}
        return {
            "view": {
                "size": cfg.input_size[-1],
                "mean": cfg.mean,
                "std": cfg.std,
                "interpolation": known_interpolation(cfg.interpolation),
            },
            "card": {
                "checkpoint": cfg.hf_hub_id or "",
                "licence": cfg.license or "unknown",
                "source": cfg.origin_url or "https://github.com/huggingface/pytorch-image-models",
            },
        }

    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__(spec)
        self.adopt_timm(self.whole_model(), self.arch.layer, self.arch.norm)
        self.grid(self.stride)

    def whole_model(self, num_classes: int = 0, **options: Any) -> Any:
        """The named model for this view as timm makes it, before anything is pruned; `options` go
        to `timm.create_model`."""
        import timm

        model = self.spec.kind.partition(":")[2]
        cfg = timm.get_pretrained_cfg(model)
        options = {**self.arch.options, **options}
        if cfg is not None and cfg.fixed_input_size:
            options.setdefault("img_size", self.view_spec.size)
        try:
            return timm.create_model(model, num_classes=num_classes, **options)
        except TypeError as error:
            raise ValueError(f"expert `{self.spec.name}`: arch.options: {error}") from error

    def forward(self, view: Tensor) -> Tensor:
        return self.timm_map(view)
