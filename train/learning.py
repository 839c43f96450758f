"""What of a model learns, by part (`eagle_moe.parts`), and how the optimizer groups it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from eagle_moe.parts import part_modules, part_of
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
    model: nn.Module, rates: Mapping[str, float], weight_decay: float, decayed: Iterable[str]
) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that learn, one per part, decay rule and matrix or not.

    `rates`: part -> learning rate. `decayed`: names of the parameters that weight decay applies
    to. Each group carries its `part`, and `matrix`, by which `train.muon` tells its own.
    """
    decayed = set(decayed)
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (part_of(name), name in decayed, is_matrix(name, parameter))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "weight_decay": weight_decay if decays else 0.0,
            "part": part,
            MATRIX: matrix,
        }
        for (part, decays, matrix), parameters in groups.items()
    ]
