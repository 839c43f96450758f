"""Variants of the same work, timed against each other in one process.

The machine's speed drifts while a measurement goes on, so every round runs every variant, in an
order that rotates, and what is reported is the median and the range of the rounds' ratios. CPU
time of the process counts, not the clock, so that other jobs on the machine do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Clock = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """Base time / variant time over the rounds: above 1, the variant is faster.

    `seconds`: median time of one run of the variant.
    """

    name: str
    seconds: float
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.rounds)

    def __str__(self) -> str:
        low, high = min(self.rounds), max(self.rounds)
        return f"{self.median:.2f} ({low:.2f}-{high:.2f})"


def compare(
    variants: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    clock: Clock = time.process_time,
) -> list[Ratio]:
    """Time every variant `rounds` times; the first is the base, and its ratio is 1.

    Each runs once before anything is timed.
    """
    if rounds < 1 or len(variants) < 2:
        raise ValueError(f"rounds = {rounds} of {len(variants)} variants: nothing to compare.")
    names = list(variants)
    for run in variants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in _rotated(names, number):
            start = clock()
            variants[name]()
            times[name].append(clock() - start)
    base = times[names[0]]
    return [
        Ratio(
            name,
            median(times[name]),
            tuple(b / max(t, 1e-9) for b, t in zip(base, times[name], strict=True)),
        )
        for name in names
    ]


def _rotated(names: Sequence[str], by: int) -> list[str]:
    shift = by % len(names)
    return [*names[shift:], *names[:shift]]
