"""Packing: several samples in one row, so that little of what is computed is padding.

    samples  [a a a] [b b b b b] [c] [d d]
    row      [b b b b b a a a c d d . . .]     positions restart with every sample

Image tokens come in large pieces, so a row that takes one image fewer than it could may stay a
fifth empty, and no short text is to be spent on a row that a longer one fills as well. A row begins
with the longest sample that is left, goes on with as many samples with images as can still fit,
each the longest within an even share of the room, and ends with text. Where images are few to a
row, it may take one fewer if these fill it nearly; how nearly is tried out, and the fewest rows are
kept. `fewest_rows` says how much better any plan could be.

Samples are packed window by window of a shuffled order, so that a row mixes sources as the data
does, and the plan depends on the lengths and the seed alone. Rows stay what they are from epoch to
epoch; `train.data.sampler` changes their order.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from train.data.dataset import ConversationDataset, Seen
from train.data.index import identity
from train.data.mixture import MixtureDataset
from train.data.sampler import Work

WINDOW = 16384
"""Samples that are packed together: the more, the better they fit; beyond this it hardly helps."""

_SPARE = (-1.0, 0.02, 0.2)
"""Shares of a row to try for `_fill_rows`; the first means never. At 4096 and 5120 tokens with 1024
of an image the first is best, at 6144 the second, at 4608 the third."""

_ENOUGH = 1.001
"""Rows, against the fewest there can be, at which nothing else is tried."""


@dataclass(frozen=True)
class Plan:
    """`order` (samples,): sample numbers, row after row; `starts` (rows + 1,): where rows begin."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> NDArray[np.int64]:
        """Numbers of the samples in a row."""
        return self.order[int(self.starts[index]) : int(self.starts[index + 1])]

    def totals(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """Sum of `values` (samples,) over each row, (rows,)."""
        return np.add.reduceat(values[self.order].astype(np.int64), self.starts[:-1])


def plan_rows(
    tokens: NDArray[Any],
    images: NDArray[Any],
    max_length: int,
    seed: int = 0,
    window: int = WINDOW,
) -> Plan:
    """Distribute samples of `tokens` (n,), `images` (n,) over rows of up to `max_length` tokens.

    Every sample is in exactly one row. Raises `ValueError` if one is longer than a row.
    """
    if len(tokens) and int(tokens.max()) > max_length:
        worst = int(tokens.argmax())
        raise ValueError(
            f"packing: sample {worst} has {int(tokens[worst])} tokens, a row takes {max_length}."
        )
    shuffled = np.random.default_rng([seed, len(tokens)]).permutation(len(tokens))
    rows: list[list[int]] = []
    for start in range(0, len(shuffled), window):
        rows += _pack(shuffled[start : start + window], tokens, images, max_length)
    order = np.fromiter((sample for row in rows for sample in row), np.int64, len(tokens))
    return Plan(order, np.cumsum([0, *map(len, rows)], dtype=np.int64))


def fewest_rows(tokens: NDArray[Any], max_length: int) -> int:
    """A number of rows that no plan for samples of `tokens` (n,), at least one each, goes below.

    The best of two countings: of tokens, and of pieces. In the second, a sample of x rows' length
    counts as `floor((k + 1) x) / k`, or as x where `(k + 1) x` is whole; what fits into a row then
    counts 1 at most, for every k: a dual feasible function (Fekete and Schepers, "New classes of
    fast lower bounds for bin packing problems", Mathematical Programming 91, 2001). With k = 3, a
    sample longer than a quarter of a row counts a third, one longer than half of it two thirds.
    """
    lengths, counts = np.unique(np.asarray(tokens, dtype=np.int64), return_counts=True)
    fewest = 0.0
    for k in range(1, max_length // int(lengths[0]) + 1):
        pieces, rest = np.divmod((k + 1) * lengths, max_length)
        counted = np.where(rest == 0, lengths / max_length, pieces / k)
        fewest = max(fewest, float(counted @ counts))
    # rows are whole; the sum is not exact to the last digits
    return max(math.ceil(fewest - 1e-6), -(-int(lengths @ counts) // max_length))


def _pack(
    samples: NDArray[np.int64], tokens: NDArray[Any], images: NDArray[Any], max_length: int
) -> list[list[int]]:
    enough = fewest_rows(tokens[samples], max_length) * _ENOUGH
    best: list[list[int]] = []
    for spare in _SPARE:
        rows = _fill_rows(samples, tokens, images, max_length, spare * max_length)
        best = rows if not best else min(best, rows, key=len)
        if len(best) <= enough:
            break
    return best


def _fill_rows(
    samples: NDArray[np.int64],
    tokens: NDArray[Any],
    images: NDArray[Any],
    max_length: int,
    spare: float,
) -> list[list[int]]:
    """`spare`: tokens that may stay free in a row that takes an image fewer than it could."""
    seeing = images[samples] > 0
    pictures = _Shelf(samples[seeing], tokens)
    texts = _Shelf(samples[~seeing], tokens)
    rows = []
    while pictures.lengths or texts.lengths:
        longest = max((shelf for shelf in (pictures, texts) if shelf.lengths), key=_Shelf.longest)
        length = longest.longest()
        row, room = [longest.take(length)], max_length - length
        while pictures.lengths and (more := room // pictures.lengths[0]):
            if more > 1 and pictures.left_of(room, more - 1) <= spare:
                more -= 1
            length = pictures.fitting(room // more)
            row.append(pictures.take(length))
            room -= length
        while texts.lengths and texts.lengths[0] <= room:
            length = texts.fitting(room)
            row.append(texts.take(length))
            room -= length
        rows.append(row)
    return rows


class _Shelf:
    """Samples by length; `lengths` are those that there are, ascending."""

    def __init__(self, samples: NDArray[np.int64], tokens: NDArray[Any]) -> None:
        self.stacks: dict[int, list[int]] = {}
        for sample, length in zip(samples.tolist(), tokens[samples].tolist(), strict=True):
            self.stacks.setdefault(length, []).append(sample)
        self.lengths = sorted(self.stacks)

    def longest(self) -> int:
        return self.lengths[-1]

    def fitting(self, room: int) -> int:
        """The greatest length up to `room`, which must be at least the smallest."""
        return self.lengths[bisect_right(self.lengths, room) - 1]

    def left_of(self, room: int, count: int) -> int:
        """What `count` samples, each the longest within an even share, would leave of `room`."""
        for others in range(count, 0, -1):
            room -= self.fitting(room // others)
        return room

    def take(self, length: int) -> int:
        stack = self.stacks[length]
        sample = stack.pop()
        if not stack:
            del self.stacks[length]
            self.lengths.pop(bisect_left(self.lengths, length))
        return sample


class PackedDataset(Dataset[list[dict[str, Any]]]):
    """Map-style dataset of rows: item i is the list of samples in row i, for `Collator`.

    The lengths of all samples are found out first (`MixtureDataset.lengths`); they and the plan are
    kept in the index of the first source, so that the next start, or a resume, reads them.
    """

    def __init__(self, dataset: MixtureDataset, max_length: int) -> None:
        self.dataset = dataset
        self.max_length = max_length
        lengths = dataset.lengths()
        self.plan = self._plan(lengths.tokens, lengths.images)
        self.work = Work(self.plan.totals(lengths.tokens), self.plan.totals(lengths.images))
        self.fewest = fewest_rows(lengths.tokens, max_length)

    def _plan(self, tokens: NDArray[Any], images: NDArray[Any]) -> Plan:
        told = (self.dataset.identity, self.max_length, WINDOW, Path(__file__).read_text())
        index, name = self.dataset.parts[0].records.index, f"plan-{identity(*told)}"
        kept = index.array(name)
        if kept is None:
            with index.locked():
                kept = index.array(name)
                if kept is None:
                    plan = plan_rows(tokens, images, self.max_length, self.dataset.seed)
                    kept = np.concatenate([[len(plan)], plan.starts, plan.order])
                    index.store(name, kept)
        rows = int(kept[0])
        return Plan(kept[rows + 2 :], kept[1 : rows + 2])

    @property
    def parts(self) -> Sequence[ConversationDataset]:
        """The sources."""
        return self.dataset.parts

    @property
    def useful(self) -> float:
        """Share of tokens that are not padding, if every row is padded to `max_length`."""
        return float(self.work.tokens.mean() / self.max_length)

    @property
    def told(self) -> str:
        """For people: how the samples were packed, and how well they could be."""
        return (
            f"{len(self.dataset):,} samples packed in {len(self):,} rows of up to "
            f"{self.max_length:,} tokens, {self.useful:.1%} full; no packing has fewer than "
            f"{self.fewest:,}"
        )

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.dataset[int(sample)] for sample in self.plan.row(index)]

    def count(self, samples: Iterable[Seen]) -> None:
        """See `ConversationDataset.count`: samples, not rows."""
        self.dataset.count(samples)

    def counts(self) -> dict[str, int]:
        """See `MixtureDataset.counts`: of samples, not of rows."""
        return self.dataset.counts()

    def share_counts(self, device: torch.device) -> None:
        """See `ConversationDataset.share_counts`."""
        self.dataset.share_counts(device)

    def state_dict(self) -> dict[str, Any]:
        """See `ConversationDataset.state_dict`."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ConversationDataset.load_state_dict`."""
        self.dataset.load_state_dict(state)

    def named(self, what: Literal["cut", "unsupervised"], limit: int = 10) -> list[str]:
        """See `MixtureDataset.named`."""
        return self.dataset.named(what, limit)


def check_keeps_apart(language_model: nn.Module) -> None:
    """Raises `ValueError` for a model that does not know samples in a row by their positions."""
    name = type(language_model).__name__
    layers = set(getattr(language_model.config, "layer_types", None) or ())
    if "position_ids" not in signature(language_model.forward).parameters:
        raise ValueError(
            f"packing: {name} takes no position_ids, so samples in a row would see each other. "
            "Leave packing out; length_aware saves padding, too."
        )
    if odd := layers - {"full_attention", "sliding_attention", "chunked_attention"}:
        raise ValueError(
            f"packing: {name} has layers ({', '.join(sorted(odd))}) that carry a state from sample "
            "to sample in a row. Leave packing out; length_aware saves padding, too."
        )
