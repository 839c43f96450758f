"""Foreign weight files, read a tensor at a time: safetensors, and pickles of plain tensors only.

A checkpoint is one file or several shards with an index; names and shapes are known before any
data is read.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SAFETENSORS = ".safetensors"
STEMS = ("model.safetensors", "pytorch_model.bin")
"""What transformers and timm call the weights of a folder, the safest format first."""
OPEN_CLIP_STEMS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""The same for open_clip, whose folders may hold the weights in other libraries' form too."""


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


def open_shards(
    place: Path, inner: Sequence[str] = (), stems: Sequence[str] = (*STEMS, *OPEN_CLIP_STEMS)
) -> list[Shard]:
    """The weight files of a folder, or the one file `place`.

    `inner`: keys of which a pickle may hold one, above its tensors; the first that is there is
    taken. `stems`: names that the weights of a folder may have, the best first. Raises
    `ValueError`, naming the file, if one is missing, damaged, or a pickle that holds more than
    plain tensors.
    """
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder. Check the path.")
    if place.is_file():
        return [_open(place, inner)]
    for stem in stems:
        if (place / stem).is_file():
            return [_open(place / stem, inner)]
        if (place / f"{stem}.index.json").is_file():
            return _open_indexed(place / f"{stem}.index.json")
    raise ValueError(
        f"{place}: no weights in it: neither {' nor '.join(stems)}, whole or with an index "
        "(.index.json). Copy the whole folder, or give the file itself."
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
    _check_start(path)
    if path.suffix == _SAFETENSORS:
        return _open_safetensors(path)
    top = _unpickle(path)
    steps: tuple[str, ...] = ()
    while step := next((key for key in inner if isinstance(top, dict) and key in top), None):
        top, steps = top[step], (*steps, step)
    if not isinstance(top, dict) or not all(isinstance(key, str) for key in top):
        raise ValueError(
            f"{path}: holds no dictionary of tensors, but something of type {type(top).__name__}. "
            "Give the file of the weights."
        )
    for key, value in top.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: `{key}` is not a tensor but of type {type(value).__name__}. Is it a "
                "training state? Give the file of the weights alone."
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


def _check_start(path: Path) -> None:
    """Tell by its first bytes what is no weight file at all."""
    with path.open("rb") as file:
        start = file.read(32)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: a pointer of Git LFS instead of the weights. Fetch them with `git lfs pull`."
        )
    if path.suffix != _SAFETENSORS and not start.startswith(_PICKLES):
        raise ValueError(
            f"{path}: neither a file of torch.save nor called *{_SAFETENSORS}. Give the weights."
        )


_PICKLES = (b"PK\x03\x04", b"\x80")
"""How files of torch.save begin: a zip archive, or (before torch 1.6) a bare pickle."""


def _unpickle(path: Path) -> Any:
    """The content of a file of `torch.save`; tensors stay on disk until they are used."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused below
            try:
                return torch.load(path, mmap=True, **options)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, **options)  # not a zip archive
    except Exception as error:  # a damaged pickle fails in any way
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
            raise ValueError(
                f"{path}: refused{_what_for(error)}: it is not a file of plain tensors, and "
                "loading anything else can run code that its author chose. Get the weights as "
                "safetensors."
            ) from None
        raise ValueError(
            f"{path}: cannot be read as weights ({_cause(error)}). The file is damaged or "
            "incomplete: copy it again."
        ) from None


def _cause(error: Exception) -> str:
    """The first sentence of what a library says, or what it calls the error."""
    return re.split(r"\.\s|\n", str(error))[0] or type(error).__name__


def _what_for(error: Exception) -> str:
    """What torch would not load, of a message that goes on to explain how to load it anyway."""
    if "TorchScript" in str(error):
        return " (a TorchScript program)"
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f" ({found[1]})" if found else ""


def _descend(top: Any, steps: Sequence[str]) -> dict[str, Tensor]:
    for step in steps:
        top = top[step]
    return top
