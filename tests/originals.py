"""What the tests of original checkpoints share: experts to load into, and damage to do."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle_moe.experts import ExpertSpec, VisionExpert, build_expert, resolve_expert
from eagle_moe.experts.check import distance
from eagle_moe.interop.originals import load_original

__all__ = ["distance"]


def spec_of(kind: str, size: int, checkpoint: str = "", **arch: Any) -> ExpertSpec:
    """An expert of any kind, with the view normalised to nothing in particular."""
    card = {"checkpoint": checkpoint, "licence": "unknown", "source": "test"}
    return resolve_expert({"kind": kind, "view": {"size": size}, "arch": arch, "card": card})


def load(spec: ExpertSpec, place: str | Path) -> VisionExpert:
    """The expert with the weights at `place`, every tensor of it."""
    expert = build_expert(spec)
    expert.load_state_dict(load_original(spec, place))
    return expert.eval()


def pixels(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def as_map(tokens: Tensor, prefix: int = 1) -> Tensor:
    """Tokens (B, prefix + n*n, C) -> map (B, C, n, n) of those after the prefix."""
    patches = tokens[:, prefix:]
    side = round(patches.shape[1] ** 0.5)
    return patches.transpose(1, 2).unflatten(2, (side, side))


def swap(tensors: dict[str, Tensor], one: str, other: str) -> None:
    """A mistake that no shape gives away."""
    assert tensors[one].shape == tensors[other].shape
    tensors[one], tensors[other] = tensors[other], tensors[one]


def swap_in_file(path: Path, one: str, other: str) -> None:
    tensors = load_file(path)
    swap(tensors, one, other)
    save_file(tensors, path, metadata={"format": "pt"})
