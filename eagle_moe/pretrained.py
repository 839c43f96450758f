"""What transformers must know about every model here, and what all of them do to tensors."""

# No postponed annotations here: transformers reads the class of `config` from its annotation.
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_moe.config import EagleMixConfig
from eagle_moe.stubs import ByStub


class EagleMixPreTrainedModel(ByStub, PreTrainedModel):
    """What transformers must know about every class here."""

    config: EagleMixConfig
    base_model_prefix = "model"
    input_modalities: ClassVar[tuple[str, ...]] = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        restore_buffers(module)


def cast_for(module: nn.Module, x: Tensor) -> Tensor:
    """`x` in the dtype of the module's parameters: frozen parts may be kept in a lower one."""
    dtypes = (p.dtype for p in module.parameters() if p.is_floating_point())
    return x.to(next(dtypes, x.dtype))


def restore_buffers(module: nn.Module) -> None:
    """Recompute timm's non-persistent buffers, which loading leaves as uninitialised memory."""
    restore = getattr(module, "init_non_persistent_buffers", None)
    if restore is not None:
        restore()
