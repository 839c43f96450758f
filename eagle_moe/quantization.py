"""Language models in 8 or 4 bits; experts and connector keep their precision.

Left alone, transformers converts every linear layer but the head: the experts' too, whose features
are what this project is about, and which are small beside a language model. Its quantizers take a
list of what to leave alone; a model class here fills it in when nobody has (`SparesVision`).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin

Quantize = Literal["int8", "nf4"]
"""`int8`: 8 bits per weight, by torchao; on a CPU and on a GPU. `nf4`: 4 bits with nested scales
(QLoRA, arXiv 2305.14314), by bitsandbytes; on a CPU only for widths that are multiples of 32."""
LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}

SPARED = (
    "lm_head",
    "model.vision_tower",
    "model.multi_modal_projector",
    "vision_tower",
    "multi_modal_projector",
)
"""What keeps its precision, as names begin: the last two in an `EagleMixModel` on its own."""
SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")
"""The fields of quantization configs that name what is left alone; none has both."""


def quantization_config(kind: str, compute_dtype: torch.dtype) -> QuantizationConfigMixin:
    """What `from_pretrained(quantization_config=...)` takes, for one of `Quantize`.

    Raises `ValueError` for another kind, or naming the extra if the library is not there.
    """
    if kind not in get_args(Quantize):
        raise ValueError(f'quantize: "{kind}": give {" or ".join(get_args(Quantize))}.')
    if find_spec(LIBRARIES[kind]) is None:
        raise ValueError(f"quantize: {kind} needs {LIBRARIES[kind]}. Install eagle-moe[quant].")
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(SPARED))
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(SPARED),
    )


def spare_vision(config: Any) -> Any:
    """`config`, a quantization config or its fields, with `SPARED` where it spares nothing yet.

    What the person has named to be left alone is left as it is.
    """
    for name in SKIP_LISTS:
        if isinstance(config, dict):
            if name in config and config[name] is None:
                config = {**config, name: list(SPARED)}
        elif hasattr(config, name) and getattr(config, name) is None:
            setattr(config, name, list(SPARED))
    return config


class SparesVision:
    """A model that `from_pretrained(quantization_config=...)` quantizes in its language part."""

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **options: Any) -> Any:
        """As in transformers; a quantization config leaves experts and connector alone, unless it
        names other modules (`llm_int8_skip_modules`, `modules_to_not_convert`)."""
        if quantization_config is not None:
            options["quantization_config"] = spare_vision(quantization_config)
        return super().from_pretrained(*args, **options)  # type: ignore[misc]
