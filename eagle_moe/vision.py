"""The vision tower: flow 1 from the canvas to fused tokens."""

# No postponed annotations here: transformers reads the class of `config` from its annotation.
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from eagle_moe.config import EagleMixVisionConfig
from eagle_moe.experts import VisionExpert, build_expert
from eagle_moe.fusion import FUSIONS
from eagle_moe.pretrained import EagleMixPreTrainedModel, cast_for, restore_buffers


class EagleMixVisionModel(EagleMixPreTrainedModel):
    """All experts and their fusion: canvas (B,3,S,S) uint8 -> fused tokens (B,N,C)."""

    config: EagleMixVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    base_model_prefix = "vision_tower"

    def __init__(self, config: EagleMixVisionConfig) -> None:
        super().__init__(config)
        self.towers = nn.ModuleDict({spec.name: build_expert(spec) for spec in config.expert_specs})
        channels = {name: expert.channels for name, expert in self._experts()}
        assert config.fusion is not None
        self.fusion = FUSIONS[config.fusion["kind"]](channels, config.fusion_options)
        # An expert's init hook must see each of its own submodules, however deep.
        self._owner = {part: expert for _, expert in self._experts() for part in expert.modules()}
        # Whole experts stay on one device; their blocks are what FSDP wraps.
        self._no_split_modules = sorted(
            {type(part).__name__ for _, expert in self._experts() for part in expert.blocks}
            | {type(expert).__name__ for _, expert in self._experts()}
            | {type(self.fusion).__name__}
        )
        self.post_init()

    def _experts(self) -> list[tuple[str, VisionExpert]]:
        return list(self.towers.items())  # type: ignore[arg-type]

    def get_input_embeddings(self) -> None:
        return None

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Canvas (B,3,S,S) uint8 -> feature map (B,C_i,h_i,w_i) per expert, in mixture order."""
        size = self.config.canvas_size
        if tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values: expected canvases (num_images, 3, {size}, {size}), got "
                f"{tuple(pixel_values.shape)}. Make them with this model's own processor."
            )
        return {name: expert(expert.view(pixel_values)) for name, expert in self._experts()}

    def forward(self, pixel_values: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Canvas (B,3,S,S) uint8, or the maps that `encode` made of it -> fused tokens (B,N,C)."""
        maps = self.encode(pixel_values) if isinstance(pixel_values, Tensor) else pixel_values
        return self.fusion({name: cast_for(self.fusion, x) for name, x in maps.items()})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        expert = self._owner.get(module)
        if expert is not None and expert.init_weights(module):
            restore_buffers(module)
        elif expert is None and isinstance(module, nn.Linear):
            module.reset_parameters()
        else:
            super()._init_weights(module)
