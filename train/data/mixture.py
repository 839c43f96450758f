"""Several sources as one dataset, each seen as often per epoch as its weight says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from train.data.dataset import ConversationDataset, DataSpec, Seen, choose
from train.data.index import identity
from train.data.labels import Encoded
from train.data.measure import Lengths
from train.data.sampler import Work

if TYPE_CHECKING:
    from eagle_moe.processor import EagleMixProcessor


class MixtureDataset(Dataset[dict[str, Any]]):
    """Map-style dataset over `parts`, in order; shuffling is the sampler's business.

    With weight w, a part of n records contributes round(w * n) samples: every record floor(w)
    times, and a random choice of them, fixed by `seed`, once more.
    """

    def __init__(self, parts: Sequence[ConversationDataset], seed: int = 0) -> None:
        self.parts = list(parts)
        self.seed = seed
        self._times, self._extra = [], []
        for number, part in enumerate(self.parts):
            # a stream per part: adding a source must not change what is drawn from the others
            times, extra = _draw(len(part), part.spec.weight, [seed, number])
            if not times and not len(extra):
                raise ValueError(
                    f"{part.spec.path}: weight = {part.spec.weight} of {len(part)} records is "
                    "less than one sample. Raise the weight or leave the source out."
                )
            self._times.append(times)
            self._extra.append(extra)
        sizes = [
            times * len(part) + len(extra)
            for times, part, extra in zip(self._times, self.parts, self._extra, strict=True)
        ]
        self._ends = np.cumsum(sizes)
        self.work: Work | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """See `ConversationDataset`."""
        part, place = self._find(index)
        sample = part[place]
        return {**sample, "seen": replace(sample["seen"], index=index)}

    def _find(self, index: int) -> tuple[ConversationDataset, int]:
        """The source of sample `index`, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        part, times = self.parts[number], self._times[number]
        place = index - (int(self._ends[number - 1]) if number else 0)
        if place < times * len(part):
            return part, place % len(part)
        return part, int(self._extra[number][place - times * len(part)])

    @property
    def identity(self) -> str:
        """A short name for the lengths of all samples, in order."""
        parts = [(part.identity, part.spec.weight) for part in self.parts]
        return identity(parts, self.seed)

    def lengths(self) -> Lengths:
        """How long the samples are, in order; see `ConversationDataset.lengths`."""
        columns: list[list[NDArray[np.int32]]] = [[] for _ in fields(Lengths)]
        for part, times, extra in zip(self.parts, self._times, self._extra, strict=True):
            found = part.lengths()
            for place, field in zip(columns, fields(Lengths), strict=True):
                values = getattr(found, field.name)
                place += [values] * times + [values[extra]]
        return Lengths(*map(np.concatenate, columns))

    def sort_by_work(self) -> None:
        """Have samples of like length come together: sets `work`, which `order_of` looks at."""
        lengths = self.lengths()
        self.work = Work(lengths.tokens, lengths.images)

    def encode(self, index: int) -> Encoded:
        """Ids and labels of sample `index`; opens no picture."""
        part, place = self._find(index)
        return part.encode(place)

    def name_of(self, index: int) -> str:
        """By which a person finds sample `index`: `file: id`."""
        part, place = self._find(index)
        return f"{part.spec.path}: {part.name_of(place)}"

    def check_records(self) -> int:
        """Raises `ValueError` if a record of any part could not be trained on; returns how many
        had to be parsed for it."""
        return sum(part.check_records() for part in self.parts)

    def count(self, samples: Iterable[Seen]) -> None:
        """See `ConversationDataset.count`."""
        for sample in samples:
            part, place = self._find(sample.index)
            part.count([replace(sample, index=place)])

    def counts(self) -> dict[str, int]:
        """`ConversationDataset.counts` summed over the parts."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.counts())
        return dict(total)

    def share_counts(self, device: torch.device) -> None:
        """See `ConversationDataset.share_counts`."""
        for part in self.parts:
            part.share_counts(device)

    def state_dict(self) -> dict[str, Any]:
        """See `ConversationDataset.state_dict`."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ConversationDataset.load_state_dict`."""
        for part, told in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(told)

    def named(self, what: Literal["cut", "unsupervised"], limit: int = 10) -> list[str]:
        """Up to `limit` samples counted so far that were `cut` or `unsupervised`, as `file: id`."""
        names = [
            f"{part.spec.path}: {name}" for part in self.parts for name in part.named(what, limit)
        ]
        return names[:limit]


def build_dataset(
    specs: Sequence[DataSpec],
    processor: EagleMixProcessor,
    max_length: int | None,
    seed: int = 0,
) -> MixtureDataset:
    """The data of a stage. Raises `ValueError` or `FileNotFoundError` if it would be refused."""
    if not specs:
        raise ValueError("data: name at least one source.")
    return MixtureDataset(
        [ConversationDataset(spec, processor, max_length) for spec in specs], seed
    )


def _draw(count: int, weight: float, seed: Sequence[int]) -> tuple[int, NDArray[np.int64]]:
    """How often all of `count` samples are seen, and which of them once more, chosen at random."""
    times, rest = divmod(round(weight * count), count)
    return times, choose(count, rest, seed) if rest else np.zeros(0, np.int64)
