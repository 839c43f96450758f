"""Data in WebDataset shards: tar files in which a sample's record and its pictures lie together.

    shard-00000.tar   000000.json      a record, as a line of a JSONL file
                      000000.0.jpg     its first picture
                      000000.1.png     its second
                      000001.json      ...

Members of a sample follow each other and share what comes before the first dot of their names.
`image` or `images` of a record name the rest (`0.jpg`); a record that names none has all pictures
of its sample, by name.

A tar keeps every member whole and uncompressed, so that an index of offsets makes each sample one
read of its own bytes, in any order: the order of samples, resuming included, is that of any other
file. (A row of a Parquet file costs decoding its row group, hundreds of pictures as a rule; take
such data in with `python -m train.data.write_shards`.)
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TAR = ".tar"
_RECORD = "json"
_BLOCK = 512  # of a tar; one or more that are all zero mark its end
_REMEDY = "Copy or download this shard again, or take it out of the folder."

MEMBER = np.dtype([("shard", "u4"), ("name", "u4"), ("start", "u8"), ("size", "u8")])
"""A file in a tar: number of the shard, number of what follows its key, first byte, bytes."""


@dataclass(frozen=True, slots=True)
class Member:
    """A picture inside a shard."""

    shard: str
    name: str
    start: int
    size: int

    def read(self) -> bytes:
        """Its bytes. Raises `ValueError` if the shard has become shorter."""
        return read_span(Path(self.shard), self.start, self.size)

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


def read_span(path: Path, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start`. Raises `ValueError` if they are not all there."""
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, start)
    return whole(data, size, path)


def whole(data: bytes, size: int, path: Path) -> bytes:
    """`data`, if it has `size` bytes."""
    if len(data) != size:
        raise ValueError(
            f"{path}: shorter than when it was indexed. Leave data alone while it is used, or "
            "copy it again."
        )
    return data


@dataclass(frozen=True)
class ShardTable:
    """Where the samples of some shards lie.

    - `members`: `MEMBER` rows, those of a sample next to each other, its record first.
    - `first`: (samples + 1,) where the members of each sample begin.
    - `names`: what members are called after the key, by number.
    """

    members: NDArray[Any]
    first: NDArray[np.uint64]
    names: tuple[str, ...]


def find_shards(path: str) -> list[Path]:
    """The tar files that a folder or a pattern (`data/train-*.tar`) names, sorted by name.

    Raises `FileNotFoundError` if there is none.
    """
    place = Path(path)
    if place.is_file():
        return [place]
    pattern = f"{glob.escape(path)}/*{TAR}" if place.is_dir() else path
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    if not found:
        raise FileNotFoundError(
            f"no such file: {path}, and no shards ({TAR}) in a folder or pattern of this name."
        )
    return found


def read_shards(shards: Sequence[Path], advance: Callable[[int], None]) -> ShardTable:
    """Find every sample of `shards` by the headers in them; `advance` is told bytes passed.

    Raises `ValueError`, naming the shard and the remedy, for one that is damaged or incomplete, and
    for samples without a record.
    """
    numbers: dict[str, int] = {}
    rows: list[tuple[int, int, int, int]] = []
    first: list[int] = []
    for shard, path in enumerate(shards):
        before = len(first)
        for key, group in groupby(_headers(path, advance), lambda header: _split(header.name)[0]):
            named = {_split(header.name)[1]: header for header in group}
            if _RECORD not in named:
                raise ValueError(
                    f"{path}: sample {key} has {', '.join(named)}, but no {key}.{_RECORD} with its "
                    "conversation. The shard is damaged, or made for something else."
                )
            first.append(len(rows))
            for name in sorted(named, key=_order):
                number = numbers.setdefault(name, len(numbers))
                rows.append((shard, number, named[name].offset_data, named[name].size))
        if len(first) == before:
            raise ValueError(f"{path}: the shard holds no sample. {_REMEDY}")
    first.append(len(rows))
    return ShardTable(np.array(rows, MEMBER), np.array(first, np.uint64), tuple(numbers))


def _headers(path: Path, advance: Callable[[int], None]) -> Iterator[tarfile.TarInfo]:
    """The files in a tar. Its end mark is looked at: the reader takes any odd block for the end."""
    passed = 0
    try:
        with tarfile.open(path, "r:") as archive:
            while header := archive.next():
                archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
                advance(archive.offset - passed)
                passed = archive.offset
                if header.isfile():
                    yield header
            end = archive.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole tar file ({error}). {_REMEDY}") from None
    with path.open("rb") as file:
        file.seek(end)
        mark = file.read()
    if len(mark) < _BLOCK or any(mark):
        raise ValueError(f"{path}: not a whole tar file (damaged at byte {end:,}). {_REMEDY}")


def _split(name: str) -> tuple[str, str]:
    """Key and the rest: `a/b.0.jpg` -> (`a/b`, `0.jpg`)."""
    folder, slash, base = name.rpartition("/")
    key, _, rest = base.partition(".")
    return folder + slash + key, rest


def _order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """The record first; then by name, numbers in it by value (`2.jpg` before `10.jpg`)."""
    parts = re.split(r"(\d+)", name)
    return name != _RECORD, [(int(part) if part.isdigit() else -1, part) for part in parts]
