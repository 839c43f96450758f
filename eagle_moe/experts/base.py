"""The contract of a vision expert: canvas -> view -> feature map.

An expert resizes nothing but its own view, flattens nothing, and knows no other expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from eagle_moe.canvas import ViewSpec, cut_view
from eagle_moe.schema import Schema


class Card(Schema):
    """Where an expert comes from, for model cards and licence checks."""

    checkpoint: str
    """Hub id or file name of the weights that this architecture is made for ("" = none)."""
    licence: str
    """SPDX identifier of the weights' licence, or "unknown"."""
    source: str
    """Where the weights and the reference code are published."""


class ExpertSpec(Schema):
    """All that determines an expert except its weights; recorded in a checkpoint's config."""

    name: str
    """Unique within a mixture; the name of its submodule and of its part in recipes."""
    kind: str
    """Key of the expert registry: `clip`, `sam`, ... or `timm:<model>`, `open_clip:<model>`."""
    view: ViewSpec
    arch: dict[str, Any] = Field(default_factory=dict)
    """Architecture options, validated by the class of this kind (its `Arch`)."""
    card: Card


class VisionExpert(nn.Module):
    """Base class of experts.

    Subclasses set `Arch` and `presets`, build their layers in `__init__` with random weights
    (never download there: weights are loaded after construction), set `channels` and `stride`, and
    implement `forward` and `blocks`.
    """

    Arch: ClassVar[type[Schema]] = Schema
    """Typed architecture options of this kind."""
    presets: ClassVar[Mapping[str, dict[str, Any]]] = {}
    """Named starting points: preset -> {"view": ..., "arch": ..., "card": ...}."""

    @classmethod
    def defaults(cls, kind: str) -> dict[str, Any]:
        """View, architecture and card of an entry that names a `kind` but no preset.

        Backends that serve many models by name (timm, open_clip) read them off the named model.
        """
        return {}

    gradient_checkpointing: bool = False
    """Set by transformers when activation checkpointing is switched on; `run_block` obeys it."""
    channels: int
    """Channels of the feature map."""
    stride: int
    """View pixels per feature-map cell: the map of an s-pixel view is s // stride wide."""

    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__()
        self.spec = spec
        self.arch: Any = self.Arch.parse(spec.arch, f"expert `{spec.name}`: arch")

    @property
    def view_spec(self) -> ViewSpec:
        return self.spec.view

    @property
    def card(self) -> Card:
        return self.spec.card

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the parameters, in which the view is delivered."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers in order: units of checkpointing, sharding and compilation."""
        raise NotImplementedError

    def view(self, canvas: Tensor) -> Tensor:
        """Cut this expert's view from the canvas (B,3,S,S) uint8, inside the graph."""
        return cut_view(canvas, self.view_spec, self.dtype)

    def forward(self, view: Tensor) -> Tensor:
        """View -> feature map (B, channels, h, w)."""
        raise NotImplementedError

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """Call one of `blocks`, recomputing it in the backward pass if checkpointing is on."""
        by_itself = isinstance(block, GradientCheckpointingLayer)
        if self.gradient_checkpointing and self.training and not by_itself:
            return self._gradient_checkpointing_func(block.__call__, *args)  # type: ignore[operator]
        return block(*args)

    def grid(self, patch: int) -> int:
        """Squares of `patch` pixels per side of the view; `ValueError` if not a whole number."""
        size = self.view_spec.size
        if size < patch or size % patch:
            below = max(size // patch, 1) * patch
            raise ValueError(
                f"expert `{self.spec.name}`: view.size {size} is not a multiple of {patch}, the"
                f" pixels per cell of its map. Set view.size to {below} or {below + patch}."
            )
        return size // patch

    def head_width(self, width: int, heads: int, multiple: int = 1) -> int:
        """Channels per attention head; `ValueError` if not whole, or no multiple of `multiple`."""
        if width % (heads * multiple):
            per_head = f" into multiples of {multiple}" if multiple > 1 else ""
            raise ValueError(
                f"expert `{self.spec.name}`: arch.heads {heads} does not divide arch.hidden_size"
                f" {width}{per_head}. Change one of the two."
            )
        return width // heads

    def init_weights(self, module: nn.Module) -> bool:
        """Initialise the parameters and non-persistent buffers that `module` itself holds.

        Called for every submodule, the expert last: by `build_expert`, and by the model for
        weights that a checkpoint lacks. Return True when handled; False leaves `module` to the
        rules of transformers (norms to one and zero). Use `transformers.initialization`, which
        leaves loaded weights alone. An expert that holds parameters of its own (tables, tokens)
        adds a rule for them.

        The rules here keep the scale of activations at any width; the usual normal(0, 0.02) is
        made for widths near 1000 and does not train at 96.
        """
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        else:
            return False
        bias = module._parameters.get("bias")
        if bias is not None:
            init.zeros_(bias)
        return True
