"""Which mixtures a search tries, and the search itself: propose, try, decide, go on or stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from train.search.halving import Halving
from train.search.pool import Pool
from train.search.rounds import Choice, Round
from train.search.rules import Rule
from train.search.trial import Members, RunTrials


class Strategy(Protocol):
    """Where a search starts, and what it tries in round `number` (from 1)."""

    name: ClassVar[str]

    def start(self, pool: Pool) -> Members: ...

    def proposals(self, pool: Pool, incumbent: Members, number: int) -> Sequence[Members]: ...


@dataclass(frozen=True)
class Greedy:
    """Forward: from the base, in every round each further expert alone. The paper's."""

    name: ClassVar[str] = "greedy"


@dataclass(frozen=True)
class Backward:
    """From the whole pool, in every round without one expert; the base always stays."""

    name: ClassVar[str] = "backward"


@dataclass(frozen=True)
class Exhaustive:
    """One round of every mixture that contains the base; refused above `most`, with the count."""

    most: int = 64
    name: ClassVar[str] = "exhaustive"


@dataclass(frozen=True)
class Random:
    """One round of `count` different mixtures that contain the base, drawn with `seed`."""

    count: int
    seed: int = 0
    name: ClassVar[str] = "random"


def search(
    pool: Pool,
    strategy: Strategy,
    rule: Rule,
    run_trials: RunTrials,
    *,
    seeds: Sequence[int] = (0,),
    halving: Halving | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> Choice:
    """Choose a mixture.

    `run_trials` gets all trials that can run at the same time together and never the same twice.
    `on_round` sees every round once it is decided. Given the same results the search is the same,
    so that a stopped one goes on by starting it again with a `run_trials` that remembers.

    Raises `ValueError` if the mixture that others are compared with cannot be scored, and if
    results cannot be compared.
    """
    raise NotImplementedError
