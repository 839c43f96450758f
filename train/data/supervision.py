"""Refuse to start on data that would stop the run later, or would teach nothing."""

from __future__ import annotations

from dataclasses import dataclass

from train.data.dataset import ConversationDataset, choose
from train.data.mixture import MixtureDataset

MAX_UNSUPERVISED = 0.01
"""Share of samples without a token to learn above which a run is refused. A wrong template or
limit gives 1.0 or nearly so; scattered empty answers stay far below this."""


@dataclass(frozen=True)
class Supervision:
    """What `check_supervision` saw. `tokens` and `supervised_tokens` are sums over `checked`."""

    samples: int
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


def check_supervision(
    dataset: ConversationDataset | MixtureDataset,
    limit: float = MAX_UNSUPERVISED,
    sample: int | None = 2000,
) -> Supervision:
    """Parse every record of `dataset`, encode `sample` random samples (all if None).

    Raises `ValueError` if a record is malformed or has more image tokens than the limit, or if
    more than `limit` (0..1) of the encoded samples have no token to learn, naming some. Opens no
    picture.
    """
    dataset.check_records()
    total = len(dataset)
    checked = total if sample is None else min(sample, total)
    encoded = [dataset.encode(int(index)) for index in choose(total, checked)]
    report = Supervision(
        samples=total,
        checked=checked,
        unsupervised=sum(item.supervised == 0 for item in encoded),
        cut=sum(item.cut for item in encoded),
        tokens=sum(len(item.input_ids) for item in encoded),
        supervised_tokens=sum(item.supervised for item in encoded),
        named=tuple(dataset.named("unsupervised")),
    )
    if report.share > limit:
        raise ValueError(
            f"data: {report.unsupervised} of {checked} samples ({report.share:.1%}) have no token "
            f"to learn; the limit is {limit:.1%}. For example {', '.join(report.named)}. Look at "
            "them with `python -m train.data.doctor DATA --model MODEL --show 5`: their answers "
            "are missing or empty, `max_length` cuts them off, or `labels: release` masks them."
        )
    return report
