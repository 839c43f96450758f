"""Foreign weight files, read a tensor at a time: safetensors, and pickles of plain tensors only.

A checkpoint is one file or several shards with an index; names and shapes are known before any
data is read.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SAFETENSORS = ".safetensors"
_STEMS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
"""What libraries call the weights of a folder, the safest format first."""


@dataclass(frozen=True)
class Shard:
    """One weight file. `shapes` and `dtypes`: of its tensors, by key, in the file's order.

    `inner`: keys that lead from the top of a pickle to its state dict.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    inner: tuple[str, ...] = ()

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Key and tensor, one after the other; only the current one needs to be in memory."""
        if self.path.suffix == _SAFETENSORS:
            with safe_open(self.path, framework="pt") as file:
                for key in self.shapes:
                    yield key, file.get_tensor(key)
        else:
            yield from _descend(_unpickle(self.path), self.inner).items()


def open_shards(place: Path, inner: Sequence[str] = ()) -> list[Shard]:
    """The weight files of a folder, or the one file `place`.

    `inner`: keys of which a pickle may hold one, above its tensors; the first that is there is
    taken. Raises `ValueError`, naming the file, if one is missing, damaged, or a pickle that holds
    more than plain tensors.
    """
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder. Check the path.")
    if place.is_file():
        return [_open(place, inner)]
    for stem in _STEMS:
        if (place / stem).is_file():
            return [_open(place / stem, inner)]
        if (place / f"{stem}.index.json").is_file():
            return _open_indexed(place / f"{stem}.index.json")
    raise ValueError(
        f"{place}: no weights in it: neither {' nor '.join(_STEMS)}, whole or with an index "
        "(.index.json). Copy the whole folder."
    )


def _open_indexed(index: Path) -> list[Shard]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{index}: is not an index of shards. Copy it again.") from None
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(
            f"{index.parent}: {len(missing)} of {len(names)} shards are missing: "
            f"{', '.join(missing)}. Copy them from where the others came."
        )
    shards = [_open(index.parent / name) for name in names]
    for shard in shards:
        promised = {key for key, name in weight_map.items() if name == shard.path.name}
        if absent := sorted(promised - set(shard.shapes)):
            raise ValueError(
                f"{shard.path}: lacks {len(absent)} tensors that {index.name} says it holds, "
                f"such as {absent[0]}. Copy it again."
            )
    return shards


def _open(path: Path, inner: Sequence[str] = ()) -> Shard:
    if path.suffix == _SAFETENSORS:
        return _open_safetensors(path)
    top = _unpickle(path)
    steps: tuple[str, ...] = ()
    while step := next((key for key in inner if isinstance(top, dict) and key in top), None):
        top, steps = top[step], (*steps, step)
    if not isinstance(top, dict) or not all(isinstance(key, str) for key in top):
        raise ValueError(f"{path}: holds a {type(top).__name__}, not a dictionary of tensors.")
    for key, value in top.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: `{key}` is a {type(value).__name__}, not a tensor. Is it a training "
                "state? Give the file of the weights alone."
            )
    shapes = {key: tuple(value.shape) for key, value in top.items()}
    return Shard(path, shapes, {key: value.dtype for key, value in top.items()}, steps)


def _open_safetensors(path: Path) -> Shard:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(value.get_shape()) for key, value in slices.items()}
            dtypes = {key: _DTYPES[value.get_dtype()] for key, value in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Copy it again.") from None
    except KeyError as error:
        raise ValueError(f"{path}: tensors of type {error} are not supported.") from None
    return Shard(path, shapes, dtypes)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names in a safetensors header. No checkpoint read here has weights of another type."""


def _unpickle(path: Path) -> Any:
    """The content of a file of `torch.save`; tensors stay on disk until they are used."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            return torch.load(path, mmap=True, **options)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, **options)  # written by torch before 1.6: not a zip archive
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused: it is not a file of plain tensors, and unpickling anything else can "
            f"run code that its author chose. Get the weights as safetensors. "
            f"(torch: {str(error).splitlines()[0]})"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as weights ({str(error).splitlines()[0]}). The file is "
            "damaged, incomplete or something else: copy it again."
        ) from None


def _descend(top: Any, steps: Sequence[str]) -> dict[str, Tensor]:
    for step in steps:
        top = top[step]
    return top
