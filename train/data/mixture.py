"""Several sources as one dataset, each seen as often per epoch as its weight says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from train.data.dataset import ConversationDataset, DataSpec, choose
from train.data.labels import Encoded

if TYPE_CHECKING:
    from eagle_moe.processor import EagleMixProcessor


class MixtureDataset(Dataset[dict[str, Any]]):
    """Map-style dataset over `parts`, in order; shuffling is the sampler's business.

    With weight w, a part of n records contributes round(w * n) samples: every record floor(w)
    times, and a random choice of them, fixed by `seed`, once more.
    """

    def __init__(self, parts: Sequence[ConversationDataset], seed: int = 0) -> None:
        self.parts = list(parts)
        sources, indices = [], []
        for number, part in enumerate(self.parts):
            # a stream per part: adding a source must not change what is drawn from the others
            chosen = _draw(len(part), part.spec.weight, [seed, number])
            if len(chosen) == 0:
                raise ValueError(
                    f"{part.spec.path}: weight = {part.spec.weight} of {len(part)} records is "
                    "less than one sample. Raise the weight or leave the source out."
                )
            sources.append(np.full(len(chosen), number, dtype=np.int32))
            indices.append(chosen)
        self._sources: NDArray[np.int32] = np.concatenate(sources)
        self._indices: NDArray[np.int64] = np.concatenate(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """See `ConversationDataset`."""
        return self.parts[self._sources[index]][int(self._indices[index])]

    def encode(self, index: int) -> Encoded:
        """Ids and labels of sample `index`; opens no picture."""
        return self.parts[self._sources[index]].encode(int(self._indices[index]))

    def check_records(self) -> None:
        """Raises `ValueError` if a record of any part could not be trained on."""
        for part in self.parts:
            part.check_records()

    def counts(self) -> dict[str, int]:
        """`ConversationDataset.counts` summed over the parts."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.counts())
        return dict(total)

    def named(self, what: Literal["cut", "unsupervised"], limit: int = 10) -> list[str]:
        """Up to `limit` samples that were `cut` or `unsupervised`, as `file: id`."""
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


def _draw(count: int, weight: float, seed: Sequence[int]) -> NDArray[np.int64]:
    """Indices below `count`: all of them floor(weight) times, then a random remainder."""
    times, rest = divmod(round(weight * count), count)
    every = np.tile(np.arange(count, dtype=np.int64), times)
    return np.concatenate([every, choose(count, rest, seed)])
