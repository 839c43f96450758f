"""Refuse to start on data that would stop the run later, or would teach nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.data.dataset import ConversationDataset, choose
from train.data.mixture import MixtureDataset

MAX_UNSUPERVISED = 0.01
"""Share of samples without a token to learn above which a run is refused. A wrong template or
limit gives 1.0 or nearly so; scattered empty answers stay far below this."""

NAMED = 10


@dataclass(frozen=True)
class Supervision:
    """What `check_supervision` saw. `tokens` and `supervised_tokens` are sums over `checked`.

    `parsed`: records that were read for it; the others of `samples` are known from before.
    """

    samples: int
    parsed: int
    checked: int
    unsupervised: int
    cut: int
    tokens: int
    supervised_tokens: int
    named: tuple[str, ...]

    @property
    def share(self) -> float:
        """Part of the checked samples that teaches nothing, 0..1."""
        return self.unsupervised / self.checked

    @property
    def told(self) -> str:
        """For people: what was looked at, and what was found."""
        form = f"{self.parsed:,} records parsed" if self.parsed else "known to be well-formed"
        part = "all" if self.checked == self.samples else f"{self.checked:,} at random"
        return (
            f"{self.samples:,} samples; {form}; {part} encoded: {self.unsupervised:,} teach "
            f"nothing, {self.cut:,} are cut"
        )


def check_supervision(
    dataset: ConversationDataset | MixtureDataset,
    limit: float = MAX_UNSUPERVISED,
    sample: int | None = 2000,
    whole: bool = False,
) -> Supervision:
    """Look at every record of `dataset` for its form, and at `sample` random ones (all if None)
    for what they teach.

    `whole`: at all of them by `dataset.lengths()`, which packing needs anyhow. What was found out
    about the form and the lengths of records is kept, and not found out again.

    Raises `ValueError` if a record is malformed or has more image tokens than the limit, or if
    more than `limit` (0..1) of the encoded samples have no token to learn, naming some. Opens no
    picture.
    """
    parsed = dataset.check_records()
    report = _all(dataset, parsed) if whole else _some(dataset, parsed, sample)
    if report.share > limit:
        raise ValueError(
            f"data: {report.unsupervised} of {report.checked} samples ({report.share:.1%}) have no "
            f"token to learn; the limit is {limit:.1%}. For example {', '.join(report.named)}. "
            "Look at them with `python -m train.data.doctor DATA --model MODEL --show 5`: their "
            "answers are missing or empty, `max_length` cuts them off, or `labels: release` masks "
            "them."
        )
    return report


def _some(
    dataset: ConversationDataset | MixtureDataset, parsed: int, sample: int | None
) -> Supervision:
    total = len(dataset)
    checked = total if sample is None else min(sample, total)
    chosen = choose(total, checked)
    encoded = [dataset.encode(int(index)) for index in chosen]
    idle = [index for index, item in zip(chosen, encoded, strict=True) if item.supervised == 0]
    return Supervision(
        samples=total,
        parsed=parsed,
        checked=checked,
        unsupervised=len(idle),
        cut=sum(item.cut for item in encoded),
        tokens=sum(len(item.input_ids) for item in encoded),
        supervised_tokens=sum(item.supervised for item in encoded),
        named=_named(dataset, idle),
    )


def _all(dataset: ConversationDataset | MixtureDataset, parsed: int) -> Supervision:
    lengths = dataset.lengths()
    idle = np.flatnonzero(lengths.supervised == 0)
    return Supervision(
        samples=len(dataset),
        parsed=parsed,
        checked=len(dataset),
        unsupervised=len(idle),
        cut=int((lengths.tokens < lengths.length).sum()),
        tokens=int(lengths.tokens.sum(dtype=np.int64)),
        supervised_tokens=int(lengths.supervised.sum(dtype=np.int64)),
        named=_named(dataset, idle),
    )


def _named(
    dataset: ConversationDataset | MixtureDataset, indices: Sequence[int] | NDArray[np.int64]
) -> tuple[str, ...]:
    return tuple(dataset.name_of(int(index)) for index in indices[:NAMED])
