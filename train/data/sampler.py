"""The order of samples (or packed rows) in an epoch: from the seed and the epoch, nothing else.

It does not depend on the number of processes or loader workers, and no random numbers are taken
from torch, so that a resumed run, also one with another number of processes, sees the same samples
in the same steps. To skip to the middle of an epoch costs walking over numbers; nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

STEPS = 64
"""Steps in a window within which items are sorted by the work that they are."""


@dataclass(frozen=True)
class Work:
    """What each item costs: `tokens` for the language model, `images` for the experts; (n,)."""

    tokens: NDArray[np.integer[Any]]
    images: NDArray[np.integer[Any]]


class EpochSampler(Sampler[int]):
    """Item numbers of one epoch, in an order fixed by `seed` and `epoch`.

    - `step`: items per optimizer step over all processes.
    - `work`: bring items of like work into the same step, so that no process waits long for
      another: within windows of `STEPS` steps, items are sorted by images, then tokens, cut into
      steps, and the steps shuffled. None: a plain shuffle.

    Any number of processes gets its share of a step from neighbours in that order, so that their
    work is alike however many there are.
    """

    def __init__(self, count: int, seed: int, step: int = 1, work: Work | None = None) -> None:
        self.count = count
        self.seed = seed
        self.step = step
        self.work = work
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        for start in range(0, len(order), 4096):  # a list of all would be large
            yield from order[start : start + 4096].tolist()

    def order(self) -> NDArray[Any]:
        """All items in the order of this epoch, (count,)."""
        generator = np.random.default_rng([self.seed, self.epoch])
        items = np.arange(self.count, dtype=np.int32 if self.count < 2**31 else np.int64)
        generator.shuffle(items)
        whole = self.count - self.count % self.step
        if self.work is None or not whole:
            return items
        size = STEPS * self.step
        windows = [items[at : at + size] for at in range(0, whole, size)]
        windows[-1] = windows[-1][: whole - (len(windows) - 1) * size]
        steps = np.concatenate([self._sorted(window) for window in windows])
        steps = steps.reshape(-1, self.step)
        generator.shuffle(steps)
        return np.concatenate([steps.ravel(), items[whole:]])

    def _sorted(self, items: NDArray[Any]) -> NDArray[Any]:
        assert self.work is not None
        return items[np.lexsort((self.work.tokens[items], self.work.images[items]))]


def order_of(dataset: Any, seed: int, step: int) -> EpochSampler:
    """The sampler for a dataset, by the `work` of its items if it has any."""
    return EpochSampler(len(dataset), seed, step, getattr(dataset, "work", None))


def balance(work: Work, order: NDArray[Any], ranks: int, batch: int, image_cost: float) -> float:
    """Work of the slowest process over the mean, summed over micro-steps; 1 is perfect.

    `batch`: items of a process per micro-step; `image_cost`: tokens that an image is worth.
    """
    cost = work.tokens[order] + image_cost * work.images[order]
    together = ranks * batch
    steps = cost[: len(cost) - len(cost) % together].reshape(-1, ranks, batch).sum(2)
    return float(steps.max(1).sum() / steps.mean(1).sum())
