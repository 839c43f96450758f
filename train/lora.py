"""Low-rank adapters on parts of a model, through peft.

The adapters sit inside the model, which keeps its class and its part names; the `PeftModel` around
it is only used to write adapters in peft's own format and to merge them in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from eagle_moe.schema import nearest
from train.quantize import dequantize_linears, linears, quantize_linears
from train.recipe import Lora

if TYPE_CHECKING:
    from peft import LoraModel, PeftModel


def add_lora(
    model: nn.Module, adapters: Mapping[str, Lora], compute_dtype: torch.dtype = torch.float32
) -> PeftModel | None:
    """Add an adapter to each part in `adapters`; nothing but adapters learns afterwards.

    `compute_dtype`: in which parts with `quantize` multiply.
    Raises `ValueError` naming the part, and the pattern that none of its linear layers fits.
    """
    if not adapters:
        return None
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("lora: peft is not installed. Install eagle-moe[train].") from error
    targets = {part: _targets(model, part, lora) for part, lora in adapters.items()}
    wrapper = None
    for part, lora in adapters.items():
        if lora.quantize:
            quantize_linears(model, part, compute_dtype)
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            target_modules=targets[part],
        )
        if wrapper is None:
            wrapper = get_peft_model(model, config, adapter_name=_adapter_name(part))
        else:
            wrapper.add_adapter(_adapter_name(part), config)
    assert wrapper is not None
    cast("LoraModel", wrapper.base_model).set_adapter([_adapter_name(part) for part in adapters])
    return wrapper


def merge_lora(wrapper: PeftModel, folder: Path) -> None:
    """Write the adapters to `folder/<part>` in peft's format, then merge them into the model.

    Weights in 4 bit become plain ones again first, so that the merged model computes what the
    model with adapters did, and not what a second rounding makes of it.
    """
    # False: with "auto", peft looks for the base model's config on the Hub
    wrapper.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's is a form to fill in
    dequantize_linears(wrapper)
    wrapper.merge_and_unload()


def _adapter_name(part: str) -> str:
    return part.replace(".", "_")  # it becomes part of module names


def _targets(model: nn.Module, part: str, lora: Lora) -> list[str]:
    """Full names of the linear layers of `part` that get an adapter.

    Patterns are matched here, against layers of this part alone: peft would match them against
    the whole model, where other parts have layers of the same names.
    """
    names = [name for name, _ in linears(model, part)]
    if not names:
        raise ValueError(f"lora.{part}: it has no linear layer. Put it in `trainable` instead.")
    if lora.target_modules is None:
        return names
    chosen: set[str] = set()
    for pattern in lora.target_modules:
        hits = {name for name in names if _matches(name, pattern)}
        if not hits:
            known = {name.rpartition(".")[2] for name in names}
            raise ValueError(
                f"lora.{part}.target_modules: no linear layer `{pattern}`."
                f"{nearest(pattern.rpartition('.')[2], known)}"
            )
        chosen |= hits
    return [name for name in names if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    """Whether the end of a layer's name, as many words as the pattern has, is like the pattern."""
    words = name.split(".")[-pattern.count(".") - 1 :]
    return fnmatchcase(".".join(words), pattern)
