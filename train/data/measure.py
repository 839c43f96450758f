"""Numbers about every record of a source, found out once, in parallel, and kept in its index.

A column holds what is known so far; records that were not looked at yet stand at -1. So a stage
that uses a part of a data set looks at this part alone, an interrupted look goes on where it was,
and the next run with the same data finds all of it done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from joblib import cpu_count
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from train.data import labels, records, release_labels
from train.data.index import identity
from train.data.labels import Encoder
from train.data.source import RecordSource

UNKNOWN = -1
_BATCH = 64
_SAVED = 100_000
"""Records between writes of a column, so that a killed process loses minutes at most."""
_MANY = 5_000
"""Records below which starting worker processes costs more than it saves."""

_CODE = (
    *(Path(str(module.__file__)).read_text() for module in (records, labels, release_labels)),
    transformers.__version__,
    tokenizers.__version__,
)
"""What reads and encodes records: after a change of it, nothing that is kept is taken for true."""

Row = tuple[int, ...]


@dataclass(frozen=True)
class Lengths:
    """Of the samples of a source: `length` before the cut, `tokens` after it, `supervised` tokens,
    `images`; each (n,) int32, image tokens included."""

    length: NDArray[np.int32]
    tokens: NDArray[np.int32]
    supervised: NDArray[np.int32]
    images: NDArray[np.int32]


class _Look(Dataset["Row | str"]):
    """What `of` says of record `index`, or why it cannot: errors would come back from a worker
    with its stack in their text."""

    def __init__(self, of: Callable[[int], Row], indices: NDArray[np.int64]) -> None:
        self.of = of
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: int) -> Row | str:
        try:
            return self.of(int(self.indices[at]))
        except ValueError as error:
            return str(error)


def column(
    source: RecordSource,
    name: str,
    width: int,
    of: Callable[[int], Row],
    wanted: NDArray[np.int64],
    title: str,
) -> tuple[NDArray[np.int32], int]:
    """The column `name` (records, width) with the rows `wanted` known, and how many were new.

    `of(index)` gives a row; it must depend on the record and on `name` alone. Raises `ValueError`
    if `of` does, for the first record that it does for.
    """
    values = _known(source, name, width)
    if (values[wanted, 0] != UNKNOWN).all():
        return values, 0
    with source.index.locked():
        values = np.array(_known(source, name, width))  # another process may have been here
        todo = wanted[values[wanted, 0] == UNKNOWN]
        for start in range(0, len(todo), _SAVED):
            part = todo[start : start + _SAVED]
            values[part] = _look(of, part, f"{title} ({start:,} of {len(todo):,} done)")
            source.index.store(name, values)
    return values, len(todo)


def count_images(source: RecordSource, wanted: NDArray[np.int64]) -> tuple[NDArray[np.int32], int]:
    """Pictures of every record in `wanted`, (records,), and how many records were parsed for it.

    Raises `ValueError` for a malformed record: what has a number here is well-formed.
    """
    values, new = column(
        source,
        f"images-{identity(source.missing_placeholder, _CODE[0])}",
        1,
        lambda index: (len(source[index].images),),
        wanted,
        f"{source.path}: check",
    )
    return values[:, 0], new


def measure(
    source: RecordSource, encoder: Encoder, blind: bool, wanted: NDArray[np.int64]
) -> tuple[Lengths, int]:
    """Lengths of the records `wanted` as `encoder` encodes them, and how many were encoded for it.

    `blind`: without their pictures. Raises `ValueError` for a record that cannot be encoded.
    """

    def of(index: int) -> Row:
        record = source[index]
        record = record.without_images() if blind else record
        encoded = encoder(record)
        images = len(record.images)
        return encoded.length, len(encoded.input_ids), encoded.supervised, images

    name = lengths_name(source, encoder, blind)
    values, new = column(source, name, 4, of, wanted, f"{source.path}: lengths")
    picked = values[wanted]
    return Lengths(*(np.ascontiguousarray(picked[:, number]) for number in range(4))), new


def lengths_name(source: RecordSource, encoder: Encoder, blind: bool) -> str:
    """The column of `measure`: of all that its numbers depend on, but the data."""
    told = (source.missing_placeholder, blind, encoder.identity, _CODE)
    return f"lengths-{identity(*told)}"


def _known(source: RecordSource, name: str, width: int) -> NDArray[np.int32]:
    values = source.index.array(name)
    if values is None or values.shape != (len(source), width):
        return np.full((len(source), width), UNKNOWN, np.int32)
    return values


def _look(of: Callable[[int], Row], indices: NDArray[np.int64], title: str) -> NDArray[np.int32]:
    workers = min(8, cpu_count()) if len(indices) >= _MANY else 0
    loader = DataLoader(
        _Look(of, indices),
        batch_size=_BATCH,
        num_workers=workers if workers > 1 else 0,
        collate_fn=list,
        multiprocessing_context="fork" if workers > 1 else None,
    )
    console = Console(stderr=True)
    quiet = len(indices) < _MANY or not console.is_terminal
    if quiet and len(indices) >= _MANY:
        console.print(title, highlight=False, soft_wrap=True)
    rows: list[Row] = []
    for batch in track(loader, title, console=console, disable=quiet):
        for row in batch:
            if isinstance(row, str):
                raise ValueError(row)
            rows.append(row)
    return np.array(rows, np.int32)
