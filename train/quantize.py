"""Frozen linear layers in 4 bit below their adapters: QLoRA (arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from eagle_moe.parts import part_of


def require_bitsandbytes() -> ModuleType:
    """bitsandbytes. Raises `ValueError` naming the extra if it is not there or does not load."""
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:  # a build for another CUDA or machine
        raise ValueError(
            f"lora: quantize needs bitsandbytes, which cannot be imported ({error}). Install "
            "eagle-moe[quant], or leave `quantize` out."
        ) from error
    return bitsandbytes


def linears(model: nn.Module, part: str) -> list[tuple[str, nn.Linear]]:
    """The linear layers of `part` with their full names, without the language model's head."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith("model.")
        and part_of(f"{name}.") == part
    ]


def quantize_linears(model: nn.Module, part: str, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers of `part` by ones of 4 bits per weight (NF4, nested scales).

    They are rounded when they are moved to a device; here, unless they are on the meta device.
    """
    bnb = require_bitsandbytes()
    for name, layer in linears(model, part):
        rounded = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        rounded.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        rounded.bias = layer.bias
        if not layer.weight.is_meta:
            rounded = rounded.to("cuda" if torch.cuda.is_available() else layer.weight.device)
        model.set_submodule(name, rounded)


def dequantize_linears(model: nn.Module) -> None:
    """Make the layers of `quantize_linears` plain ones again, with the rounded weights."""
    quantized = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state")
    ]
    if not quantized:
        return
    dequantize = require_bitsandbytes().functional.dequantize_4bit
    for name, layer in quantized:
        packed: Any = layer.weight
        weight = dequantize(packed.data, packed.quant_state)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain)
