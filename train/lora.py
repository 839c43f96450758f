"""Low-rank adapters on parts of a model, through peft.

The adapters sit inside the model, which keeps its class and its part names; the `PeftModel` around
it is only used to write adapters in peft's own format and to merge them in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from eagle_moe.parts import part_of
from eagle_moe.schema import nearest
from train.recipe import Lora

if TYPE_CHECKING:
    from peft import LoraModel, PeftModel


def add_lora(model: nn.Module, adapters: Mapping[str, Lora]) -> PeftModel | None:
    """Add an adapter to each part in `adapters`; nothing but adapters learns afterwards.

    Raises `ValueError` naming the part if none of its linear layers is meant.
    """
    if not adapters:
        return None
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("lora: peft is not installed. Install eagle-moe[train].") from error
    wrapper = None
    for part, lora in adapters.items():
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            target_modules=_targets(model, part, lora),
        )
        if wrapper is None:
            wrapper = get_peft_model(model, config, adapter_name=_adapter_name(part))
        else:
            wrapper.add_adapter(_adapter_name(part), config)
    assert wrapper is not None
    cast("LoraModel", wrapper.base_model).set_adapter([_adapter_name(part) for part in adapters])
    return wrapper


def merge_lora(wrapper: PeftModel, folder: Path) -> None:
    """Write the adapters to `folder/<part>` in peft's format, then merge them into the model."""
    # False: with "auto", peft looks for the base model's config on the Hub
    wrapper.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's is a form to fill in
    wrapper.merge_and_unload()


def _adapter_name(part: str) -> str:
    return part.replace(".", "_")  # it becomes part of module names


def _targets(model: nn.Module, part: str, lora: Lora) -> list[str]:
    """Full names of the linear layers of `part` that get an adapter."""
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and _is_in(name, part)
    ]
    if lora.target_modules is None:
        chosen = linear
    else:
        last_names = {name.rpartition(".")[2] for name in linear}
        for wanted in lora.target_modules:
            if wanted not in last_names:
                raise ValueError(
                    f"lora.{part}.target_modules: no linear layer `{wanted}`."
                    f"{nearest(wanted, last_names)}"
                )
        chosen = [name for name in linear if name.rpartition(".")[2] in lora.target_modules]
    if not chosen:
        raise ValueError(f"lora.{part}: it has no linear layer. Put it in `trainable` instead.")
    return chosen


def _is_in(name: str, part: str) -> bool:
    return name.startswith(("model.", "lm_head")) and part_of(f"{name}.") == part
