"""What a strategy asks for and what it gets: trials of mixtures, and their scores per item.

Nothing here or in what decides (`pool`, `scores`, `rules`, `strategies`) imports torch: a search is
the same on trained mixtures, on a published table and on numbers made up by a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

Members = tuple[str, ...]
"""Experts of a mixture, in pool order: under channel concatenation the order is part of it."""


@dataclass(frozen=True)
class Trial:
    """One mixture to train and score once.

    - `seed`: of everything after pre-alignment, whose experts all trials share.
    - `budget`: share of the steps of the stages that train the mixture; below 1 it is a proxy.
    """

    members: Members
    seed: int = 0
    budget: float = 1.0


@dataclass(frozen=True)
class Cost:
    """What a mixture costs to run; what is not known is None.

    - `parameters`: of its experts and its connector.
    - `flops`: of a forward pass through them for one image.
    - `images_per_second`: measured, on the hardware of the search.
    """

    parameters: float | None = None
    flops: float | None = None
    images_per_second: float | None = None


UNKNOWN = Cost()


@dataclass(frozen=True)
class Result:
    """How a trial ended.

    - `score`: mean over tasks of the mean over their items; None if the trial failed.
    - `items`: task -> score of each item, in an order that all trials share. Empty for published
      tables that print averages only.
    - `error`: why it failed, with the place of its log.
    """

    trial: Trial
    score: float | None = None
    items: Mapping[str, Sequence[float]] = field(default_factory=dict)
    cost: Cost = UNKNOWN
    error: str = ""


ABSENT: Final = "not in the table"
"""The `error` of a trial that a table of given scores does not have: nothing failed."""

RunTrials = Callable[[Sequence[Trial]], Sequence[Result]]
"""Runs trials, at the same time where there is room; results in the order of the trials."""
