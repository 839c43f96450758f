"""What stage 1 of the official code leaves: `mm_projector.bin`, the projector alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from eagle_moe.interop.keymap import Shape, below, make_plan
from eagle_moe.interop.rules import projector
from eagle_moe.interop.shards import open_shards

FILE = "mm_projector.bin"
PREFIXES = ("model.mm_projector.", "mm_projector.")


def projector_file(place: Path) -> Path:
    """The file itself, for it or for the folder that holds it."""
    return place / FILE if place.is_dir() else place


def load_projector(place: Path, expected: Mapping[str, Shape]) -> dict[str, Tensor]:
    """State dict of our connector from `mm_projector.bin`, or from the folder that holds it.

    `expected`: name -> shape of the connector's tensors. Raises `ValueError` that names the file
    and the keys if it does not fit: then it was made for other experts or another language model.
    """
    path = projector_file(place)
    (shard,) = open_shards(path)
    rules = [rule for prefix in PREFIXES for rule in below(projector(), prefix)]
    where = f"{path}: is not the projector of this model (its experts, in order, and its LLM)"
    plan = make_plan(shard.shapes, rules, expected, where)
    placed = (plan.place(key, value) for key, value in shard.read())
    return dict(pair for pair in placed if pair is not None)
