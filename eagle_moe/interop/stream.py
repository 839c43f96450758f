"""Foreign shards -> our shards, a tensor at a time. In memory is what one of our shards holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle_moe.checkpoint import WEIGHTS
from eagle_moe.interop.keymap import Plan
from eagle_moe.interop.shards import Shard
from eagle_moe.parts import tensor_hash

SHARD_BYTES = 4 * 2**30
"""Most that one of our files holds, unless a single tensor is larger."""


@dataclass(frozen=True)
class Tensors:
    """Name -> bytes of every tensor that is written, in writing order."""

    sizes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    def files(self, limit: int) -> list[list[str]]:
        """Names for each file to write, at most `limit` bytes in one, or one tensor."""
        groups: list[list[str]] = [[]]
        held = 0
        for name, size in self.sizes.items():
            if groups[-1] and held + size > limit:
                groups.append([])
                held = 0
            groups[-1].append(name)
            held += size
        return groups


def written_tensors(shards: Sequence[Shard], plan: Plan) -> Tensors:
    """What `write_stream` will write."""
    sizes = {}
    for shard in shards:
        for key, shape in shard.shapes.items():
            blank = torch.empty(shape, dtype=shard.dtypes[key], device="meta")
            if (placed := plan.place(key, blank)) is not None:
                sizes[placed[0]] = placed[1].nbytes
    return Tensors(sizes)


def write_stream(
    shards: Sequence[Shard],
    plan: Plan,
    folder: Path,
    limit: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda size: None,
) -> dict[str, str]:
    """Write the placed tensors of `shards` to `folder` as safetensors; returns their hashes.

    One file, or several and an index. `advance` is told the bytes of each tensor.
    """
    tensors = written_tensors(shards, plan)
    groups = tensors.files(limit)
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    stream = _placed(shards, plan)
    for index, names in enumerate(groups):
        held: dict[str, Tensor] = {}
        for name in names:
            found, value = next(stream)
            assert found == name
            held[name], hashes[name] = value, tensor_hash(value)
            advance(value.nbytes)
        file = WEIGHTS
        if len(groups) > 1:
            stem, _, ending = WEIGHTS.partition(".")
            file = f"{stem}-{index + 1:05d}-of-{len(groups):05d}.{ending}"
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        content = {"metadata": {"total_size": tensors.total}, "weight_map": weight_map}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content, indent=1))
    return hashes


def _placed(shards: Sequence[Shard], plan: Plan) -> Iterator[tuple[str, Tensor]]:
    for shard in shards:
        for key, value in shard.read():
            if (placed := plan.place(key, value)) is not None:
                yield placed
