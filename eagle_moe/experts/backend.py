"""What the experts share that wrap a whole model of timm or open_clip, chosen by its name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import initialization as init

from eagle_moe.experts.base import VisionExpert
from eagle_moe.schema import nearest


def unknown_model(kind: str, model: str, known: list[str]) -> ValueError:
    """The error for a model name that the library of `kind` does not have."""
    guess = nearest(model, known).split(" Valid:")[0]
    return ValueError(f'expert {kind}: no model "{model}".{guess} {len(known)} names are known.')


def known_interpolation(name: str | None) -> str:
    """A library's name for a resize as a view's; bicubic where a view has no such."""
    return name if name in ("nearest", "bilinear") else "bicubic"


class BackendExpert(VisionExpert):
    """`body` is a foreign model, pruned to what its map needs; subclasses read the map from it."""

    body: Any
    level: list[int]

    def adopt(self, body: nn.Module) -> None:
        """Keep `body`, with its BatchNorm layers frozen: an image's map must not depend on the
        other images of the batch, and statistics of the small batches here would be poor."""
        from timm.layers import freeze_batch_norm_2d  # type: ignore[attr-defined]

        self.body = freeze_batch_norm_2d(body)

    def adopt_timm(self, body: Any, layer: int, norm: bool) -> None:
        """Keep a timm model up to `layer` and publish what the map of `timm_map` looks like."""
        levels = len(body.feature_info)
        if not -levels <= layer < levels:
            raise ValueError(
                f"expert `{self.spec.name}`: arch.layer {layer} is not one of the {levels} levels"
                f" of {self.spec.kind}. Use {-levels} to {levels - 1}."
            )
        self.level = body.prune_intermediate_layers([layer], prune_norm=not norm)
        info = body.feature_info[self.level[0]]
        self.channels = info.get("num_chs_norm", info["num_chs"]) if norm else info["num_chs"]
        self.stride = info["reduction"]
        self.adopt(body)

    def timm_map(self, view: Tensor) -> Tensor:
        """The map of an adopted timm model."""
        maps = self.body.forward_intermediates(
            view,
            indices=self.level,
            norm=self.arch.norm,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return maps[-1]

    @property
    def blocks(self) -> list[nn.Module]:
        """Children of a container whose children are all of one class; the innermost such."""
        found: list[nn.Module] = []
        for parent in self.body.modules():
            children = list(parent.children())
            alike = isinstance(parent, nn.Sequential | nn.ModuleList) and len(children) > 1
            if alike and len({type(child) for child in children}) == 1:
                found += [c for c in children if next(c.parameters(), None) is not None]
        outer = {
            block for block in found if any(m in found for m in block.modules() if m is not block)
        }
        return [block for block in found if block not in outer]

    @property
    def gradient_checkpointing(self) -> bool:
        """Forwarded to the library's own switch, which knows the model's blocks."""
        return self.__dict__.get("_checkpointing", False)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        try:
            self.body.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise ValueError(
                f"expert `{self.spec.name}`: {self.spec.kind} cannot recompute activations."
                " Switch activation checkpointing off."
            ) from error
        self.__dict__["_checkpointing"] = enable

    def init_weights(self, module: nn.Module) -> bool:
        """The base rules, then one for the tensors that foreign modules hold themselves: biases
        zero, gains their initial value, tokens and tables small and random."""
        if type(module).__name__.startswith("FrozenBatchNorm"):
            for name, value in module.named_buffers(recurse=False):
                rule = init.ones_ if name in ("weight", "running_var") else init.zeros_
                rule(value)
        elif not super().init_weights(module):
            for name, value in module.named_parameters(recurse=False):
                self._init_own(module, name, value)
        remake = getattr(module, "init_non_persistent_buffers", None)
        if remake is not None:
            remake()
        return True

    @staticmethod
    def _init_own(module: Any, name: str, value: Tensor) -> None:
        if "bias" in name:
            init.zeros_(value)
        elif value.ndim == 1 and "embed" not in name:
            init.constant_(value, getattr(module, "init_values", None) or 1.0)
        else:
            init.normal_(value, std=0.02)
