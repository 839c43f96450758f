"""What a search decided, round by round: the record that reports are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from train.search.trial import UNKNOWN, Cost, Members

Verdict = Literal["better", "worse", "not distinguishable", "dropped", "failed", "not in the table"]
"""Of a gain at 95 %; "dropped" by a cheap trial, or not scored at all."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; `low` and `high` are None where nothing is known of noise."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A mixture in a round.

    - `changed`: the expert added to or removed from the incumbent; None where there is none.
    - `score`: over its seeds and items; None if no trial of it succeeded.
    - `gain`: its score minus the incumbent's, paired; None where there is no incumbent.
    - `verdict`: of that gain; None where nothing is known of noise.
    - `proxy`: the score of its last cheap trial, if it had one.
    - `seeds`: those that succeeded. `error`: of one that did not.
    - `tasks`: task -> mean score.
    """

    members: Members
    changed: str | None
    score: Interval | None
    gain: Interval | None
    verdict: Verdict | None
    seeds: tuple[int, ...] = ()
    tasks: dict[str, float] | None = None
    cost: Cost = UNKNOWN
    error: str = ""
    proxy: float | None = None


@dataclass(frozen=True)
class Proxy:
    """A cheap pass before the full one: Kendall's tau between the two over what both have seen."""

    budget: float
    candidates: int
    kept: int
    rank_agreement: float | None


@dataclass(frozen=True)
class Round:
    """One decision.

    - `incumbent`: the mixture that candidates are compared with; None in a search without one.
    - `chosen`: what goes on from here; None if the round stops the search.
    - `reason`: a sentence that names the rule and the numbers.
    - `hinges_on`: tasks without any one of which the decision would have been another.
    """

    number: int
    incumbent: Candidate | None
    candidates: tuple[Candidate, ...]
    chosen: Members | None
    reason: str
    hinges_on: tuple[str, ...] = ()
    proxies: tuple[Proxy, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The end of a search: `chosen` in the order of the pool."""

    chosen: Members
    rounds: tuple[Round, ...]
    strategy: str
    rule: str

    def dump(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
