"""Parts of a model by the names that recipes and checkpoints use.

| part             | modules                                                    |
|------------------|------------------------------------------------------------|
| `experts.<name>` | `model.vision_tower.towers.<name>` (`experts` = all)       |
| `connector`      | `model.multi_modal_projector`, `model.vision_tower.fusion` |
| `language_model` | `model.language_model`, `lm_head`                          |

The fusion counts as connector: both are made for one mixture and mean nothing in another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from eagle_moe.schema import nearest

EXPERTS = "experts"
CONNECTOR = "connector"
LANGUAGE_MODEL = "language_model"

_TOWERS = "model.vision_tower.towers."
PROJECTOR = "model.multi_modal_projector."
"""What the names of the connector's own tensors start with."""
_PREFIXES = {
    "model.vision_tower.fusion.": CONNECTOR,
    PROJECTOR: CONNECTOR,
    "model.language_model.": LANGUAGE_MODEL,
    "lm_head.": LANGUAGE_MODEL,
}


def expert_part(name: str) -> str:
    """The part of the expert `name`."""
    return f"{EXPERTS}.{name}"


def all_parts(experts: Sequence[str]) -> tuple[str, ...]:
    """Every part of a model with these experts, in model order."""
    return (*map(expert_part, experts), CONNECTOR, LANGUAGE_MODEL)


def resolve_parts(names: Iterable[str], experts: Sequence[str], where: str) -> tuple[str, ...]:
    """Parts that `names` stand for (`experts` for all of them), in model order.

    Raises `ValueError` that starts with `where` and names the nearest part.
    """
    parts = all_parts(experts)
    chosen: set[str] = set()
    for name in names:
        if name == EXPERTS:
            chosen.update(map(expert_part, experts))
        elif name in parts:
            chosen.add(name)
        else:
            raise ValueError(f'{where}: no part "{name}".{nearest(name, (EXPERTS, *parts))}')
    return tuple(part for part in parts if part in chosen)


def by_part(values: Mapping[str, Any], experts: Sequence[str]) -> dict[str, Any]:
    """Spread values that are given by part; `experts.sam` overrides `experts`."""
    spread: dict[str, Any] = {}
    for name in sorted(values, key=lambda name: name != EXPERTS):
        for part in resolve_parts([name], experts, "part"):
            spread[part] = values[name]
    return spread


def part_of(name: str) -> str:
    """The part that a parameter or buffer of an `EagleMixForConditionalGeneration` is in."""
    if name.startswith(_TOWERS):
        return expert_part(name.removeprefix(_TOWERS).partition(".")[0])
    for prefix, part in _PREFIXES.items():
        if name.startswith(prefix):
            return part
    raise AssertionError(f"{name} belongs to no part")


def expert_prefix(name: str) -> str:
    """What the names of an expert's tensors start with."""
    return f"{_TOWERS}{name}."


def part_modules(model: nn.Module, part: str) -> list[nn.Module]:
    """The modules that make up `part`."""
    prefixes = [prefix for prefix, owner in _PREFIXES.items() if owner == part]
    if part.startswith(f"{EXPERTS}."):
        prefixes = [expert_prefix(part.removeprefix(f"{EXPERTS}."))]
    return [model.get_submodule(prefix.rstrip(".")) for prefix in prefixes]


def part_blocks(model: nn.Module, part: str) -> list[nn.Module]:
    """The repeated layers of `part` in order; none in the connector.

    An expert names its own (`VisionExpert.blocks`); transformers marks those of a language model.
    """
    modules = part_modules(model, part)
    if part.startswith(f"{EXPERTS}."):
        return modules[0].blocks  # type: ignore[return-value]
    inner = (child for module in modules for child in module.modules())
    return [child for child in inner if isinstance(child, GradientCheckpointingLayer)]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps: parameters and persistent buffers, tied ones under one name."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    aliases = every - {name for name, _ in model.named_parameters()}
    return {name: value for name, value in model.state_dict().items() if name not in aliases}


def split_by_part(names: Iterable[str]) -> dict[str, list[str]]:
    """Tensor names grouped by the part that they are in."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(part_of(name), []).append(name)
    return groups


def tensor_hash(value: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(flat.numpy().data)
    return digest.hexdigest()


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> `tensor_hash`. hashlib lets go of the interpreter lock, so threads help."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(tensor_hash, tensors.values()), strict=True))


def part_hashes(hashes: Mapping[str, str]) -> dict[str, str]:
    """One SHA-256 per part, from the `tensor_hashes` of its tensors."""
    return {
        part: hashlib.sha256(
            "".join(f"{n} {hashes[n]}\n" for n in sorted(names)).encode()
        ).hexdigest()
        for part, names in split_by_part(hashes).items()
    }
