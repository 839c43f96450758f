"""What of a model learns, by part (`eagle_moe.parts`), and how the optimizer groups it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from eagle_moe.parts import part_blocks, part_modules, part_of
from train.muon import MATRIX, is_matrix


def open_parts(model: nn.Module, parts: Iterable[str]) -> None:
    """Let the parameters of `parts` learn; what others do is left as it is."""
    parts = set(parts)
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(True)


def learning_names(model: nn.Module) -> set[str]:
    """Names of the parameters that learn."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def learning_parts(model: nn.Module) -> set[str]:
    """Parts with a parameter that learns."""
    return {part_of(name) for name in learning_names(model)}


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of the parts in which nothing learns."""
    frozen = {part_of(name) for name, _ in model.named_parameters()} - learning_parts(model)
    return [module for part in sorted(frozen) for module in part_modules(model, part)]


def parameter_groups(
    model: nn.Module,
    rates: Mapping[str, float],
    weight_decays: Mapping[str, float],
    decayed: Iterable[str],
    layer_decays: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that learn: one per part, rate, decay rule, matrix or not.

    - `rates`, `weight_decays`: part -> learning rate, weight decay.
    - `decayed`: names of the parameters that weight decay applies to.
    - `layer_decays`: part -> factor; the rate of a parameter is its part's times the factor to the
      power of `block_depths` (BEiT, arXiv 2106.08254, appendix; there counted from a head above).

    Each group carries its `part`, and `matrix`, by which `train.muon` tells its own.
    """
    decayed, layer_decays = set(decayed), layer_decays or {}
    depths = {part: block_depths(model, part) for part in layer_decays}
    groups: dict[tuple[str, float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            rate = rates[part]
            if part in depths:
                rate *= layer_decays[part] ** depths[part][name]
            key = (part, rate, name in decayed, is_matrix(name, parameter))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate,
            "weight_decay": weight_decays[part] if decays else 0.0,
            "part": part,
            MATRIX: matrix,
        }
        for (part, rate, decays, matrix), parameters in groups.items()
    ]


def block_depths(model: nn.Module, part: str) -> dict[str, int]:
    """Parameter name -> how many of the part's blocks come after it.

    The last block and what follows it (norm, neck, head) have 0, embeddings the number of blocks.
    Modules and tensors are registered in the order in which they are used.
    """
    blocks = part_blocks(model, part)
    index = {id(value): i for i, block in enumerate(blocks) for value in block.parameters()}
    depths: dict[str, int] = {}
    last = -1
    for name, parameter in model.named_parameters():
        if part_of(name) == part:
            last = index.get(id(parameter), last)
            depths[name] = len(blocks) - 1 - last
    return depths
